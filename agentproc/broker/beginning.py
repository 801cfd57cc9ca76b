"""Where an agent begins in a partition in which it has no position (pure)."""

from streamd.agentproc.broker import TP
from streamd.errors import ConfigError


def beginning(reset: str, agent: str, tp: TP, low: int, end: int) -> int:
    """The position to read from, in a partition that reaches from `low` to `end`.

    Args:
        reset: earliest, latest or error, as the topic or the setting says.

    Raises:
        ConfigError: It is error, and there is something to choose between.
    """
    if reset == "error" and low != end:
        raise ConfigError(
            f"agent {agent!r} has no position in {tp}, which holds events already, and "
            "consumer_auto_offset_reset is 'error'",
            remedy="start once with --consumer-auto-offset-reset=earliest or =latest",
        )
    return end if reset == "latest" else low
