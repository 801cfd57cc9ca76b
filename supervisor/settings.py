"""The settings that the master itself goes by, of all that the app resolved."""

from dataclasses import dataclass
from pathlib import Path

from streamd.secrets import hide, secrets_of
from streamd.supervisor.policy import Strategy
from streamd.wire import Hello


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings that the master goes by, as the app resolved them."""

    datadir: Path
    broker: str
    grace_s: float
    hang_limit_s: float
    web_enabled: bool
    web_bind: str
    web_port: int
    web_host: str  # "": by the address that is listened on
    start_limit_s: float
    strategy: Strategy
    fatal_retry_s: float  # 0: never
    strays: str  # "keep" or "kill"
    max_memory_bytes: int  # 0: no limit
    memory_check_s: float

    @classmethod
    def of(cls, hello: Hello) -> "Settings":
        """Take them from what the zygote told; secrets among them are masked from then on."""
        given = hello.settings
        hide(secrets_of(given))
        return cls(
            Path(given["datadir"]).absolute(),
            str(given["broker"]),
            float(given["grace"]),
            float(given["hang_limit"]),
            bool(given["web_enabled"]),
            str(given["web_bind"]),
            int(given["web_port"]),
            str(given["web_host"] or ""),
            float(given["start_limit"]),
            Strategy(given["strategy"]),
            float(given["fatal_retry"]),
            str(given["strays"]),
            int(given["max_memory"] or 0),
            float(given["memory_check"]),
        )
