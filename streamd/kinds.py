"""What values of settings look like: how they are read, shown and carried.

Readers take text, or what Python and TOML have for it. It does no I/O.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta, tzinfo
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Generic, TypeVar
from zoneinfo import ZoneInfo

from streamd.log import LEVELS
from streamd.secrets import mask

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Refused(ValueError):
    """A kind does not take the value; the reason is not that it is of another type."""


class Kind(Generic[T_co]):
    """What values of a setting look like.

    `parse` takes text, or what Python and TOML have for it, and raises ValueError or TypeError
    on anything else. `show` gives text that `parse` takes, `plain` what frames can carry;
    `shown_raw` is for people, of what `parse` has refused, without its secrets.
    """

    def __init__(
        self,
        expected: str,
        parse: Callable[[Any], T_co],
        *,
        show: Callable[[Any], str] = str,
        plain: Callable[[Any], Any] = lambda value: value,
        shown_raw: Callable[[object], str] | None = None,
        choices: tuple[str, ...] = (),
        unit: str = "",
    ) -> None:
        self.expected = expected
        self.parse = parse
        self.show = show
        self.plain = plain
        self.shown_raw = shown_raw or _shown_raw
        self.choices = choices
        self.unit = unit


def _shown_raw(value: object) -> str:
    return mask(repr(value))


MAX_NUMBER = 2**63 - 1  # what a frame and a database take

_UNITS_S = {
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
    "d": 86400.0,
    "w": 604800.0,
}
_UNITS_BYTES = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_NUMBER_AND_UNIT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)")
TRUE_WORDS = {"1", "true", "yes", "on"}
FALSE_WORDS = {"0", "false", "no", "off"}


def parse_duration(value: object) -> float:
    """Seconds of `500ms`, `30s`, `5m`, `2h`, `1h 30m`, a number or a timedelta.

    >>> parse_duration("1h 30m")
    5400.0

    Raises:
        ValueError: It is none of these, or negative.
        TypeError: It is of another type.
    """
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str):
        seconds = _parse_duration_text(value.strip().lower())
    else:
        raise TypeError(value)
    if not 0 <= seconds < 1e12:
        raise ValueError(value)
    return seconds


def _parse_duration_text(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        parts = _NUMBER_AND_UNIT.findall(text)
    if not parts or _NUMBER_AND_UNIT.sub("", text).strip():
        raise ValueError(text)
    try:
        return sum(float(number) * _UNITS_S[unit] for number, unit in parts)
    except KeyError as error:
        raise ValueError(text) from error


def _duration_above_0(value: object) -> float:
    seconds = parse_duration(value)
    if not seconds:
        raise ValueError(value)
    return seconds


def show_duration(seconds: float) -> str:
    """The shortest text that `parse_duration` reads as this.

    >>> show_duration(0.05), show_duration(604800.0), show_duration(90.0)
    ('50ms', '7d', '90s')
    """
    for unit in ("d", "h", "m"):
        if seconds >= _UNITS_S[unit] and seconds % _UNITS_S[unit] == 0:
            return f"{seconds / _UNITS_S[unit]:g}{unit}"
    if 0 < seconds < 1:
        return f"{seconds * 1000:g}ms"
    return f"{seconds:.12g}s"


def parse_size(value: object) -> int:
    """Bytes of `64MiB`, `1MB`, `512` or a number.

    >>> parse_size("64MiB")
    67108864

    Raises:
        ValueError: It is none of these, or negative.
        TypeError: It is of another type.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size_bytes: float = value
    elif isinstance(value, str):
        matched = _NUMBER_AND_UNIT.fullmatch(value.strip().lower())
        if matched is None or matched[2] not in _UNITS_BYTES:
            raise ValueError(value)
        size_bytes = float(matched[1]) * _UNITS_BYTES[matched[2]]
    else:
        raise TypeError(value)
    if not 0 <= size_bytes <= MAX_NUMBER:
        raise ValueError(value)
    return int(size_bytes)


def show_size(size_bytes: int) -> str:
    """The shortest text that `parse_size` reads as this.

    >>> show_size(1048576), show_size(1000)
    ('1MiB', '1000')
    """
    for unit, name in (("gib", "GiB"), ("mib", "MiB"), ("kib", "KiB")):
        if size_bytes and size_bytes % _UNITS_BYTES[unit] == 0:
            return f"{size_bytes // _UNITS_BYTES[unit]}{name}"
    return str(size_bytes)


def parse_bool(value: object) -> bool:
    """Faust's words: 1 true yes on, 0 false no off, in any case.

    Raises:
        ValueError: It is none of these.
        TypeError: It is of another type.
    """
    if isinstance(value, bool):
        return value
    if not isinstance(value, str | int):
        raise TypeError(value)
    word = str(value).strip().lower()
    if word not in TRUE_WORDS | FALSE_WORDS:
        raise ValueError(value)
    return word in TRUE_WORDS


def parse_broker(value: object) -> str:
    """One canonical text of a broker: `embedded://`, `memory://`, `kafka://a:9092;b:9092`, or
    `kafka+ssl://…`.

    >>> parse_broker(["aiokafka://a", "b:9093"])
    'kafka://a:9092;b:9093'

    Raises:
        Refused: It is a broker that streamd does not know, or a mixture.
        TypeError: It is of another type.
    """
    if isinstance(value, str):
        urls = [part.strip() for part in re.split("[;,]", value) if part.strip()]
    elif isinstance(value, Iterable) and not isinstance(value, bytes | Mapping):
        urls = [str(part).strip() for part in value]
    else:
        raise TypeError(value)
    if not urls:
        raise Refused("no broker is named")
    schemes: list[str] = []
    servers = []
    for url in urls:
        scheme, found, rest = url.rpartition("://")
        # Later addresses of a list need no scheme, and Faust takes a bare one as Kafka's.
        scheme = scheme.lower() if found else (schemes[-1] if schemes else "kafka")
        transport, plus, tls = scheme.partition("+")
        transport = {"aiokafka": "kafka", "confluent": "kafka"}.get(transport, transport)
        schemes.append(f"{transport}{plus}{tls}")
        servers.append(rest.rstrip("/"))
    kind = schemes[0]
    known = ["embedded", "memory", "kafka", "kafka+ssl"]
    if kind not in known:
        close = get_close_matches(kind, known, 1)
        hint = f"; did you mean {close[0]}://?" if close else ""
        raise Refused(f"no broker of the kind {kind}:// is known{hint}")
    if set(schemes) != {kind}:
        raise Refused("brokers of several kinds are named")
    if not kind.startswith("kafka"):
        if any(servers) or len(servers) > 1:
            raise Refused(f"{kind}:// takes nothing behind it; datadir says where the log is")
        return f"{kind}://"
    return f"{kind}://{';'.join(_server(server) for server in servers)}"


def _server(text: str) -> str:
    user, at, address = text.rpartition("@")
    host, colon, port = address.rpartition(":")
    if not colon or address.endswith("]"):
        host, port = address, "9092"
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in address:
        raise Refused(f"{mask('kafka://' + text)} is no address of a Kafka server (host:port)")
    return f"{user}{at}{host}:{port}"


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    if not value.strip() or "\0" in value:
        raise ValueError(value)
    return value.strip()


def _path(value: object) -> Path:
    if not isinstance(value, Path):
        value = Path(_text(value))
    try:
        return value.expanduser()
    except RuntimeError as error:
        raise Refused("no user of this host has such a home directory") from error


def _app_id(value: object) -> str:
    text = _text(value)
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,150}", text) or text in {".", ".."}:
        raise ValueError(value)
    return text


def _integer(low: int, high: int = MAX_NUMBER) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise TypeError(value)
        number = int(value)
        if not low <= number <= high:
            raise ValueError(value)
        return number

    return parse


def _octal(value: Any) -> int:
    if isinstance(value, str):
        value = int(value, 8)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(value)
    if not 0 <= value <= 0o777:
        raise ValueError(value)
    return value


def _timezone(value: object) -> tzinfo:
    # pytz has `zone`, zoneinfo `key`; datetime.timezone has neither, and is UTC or no zone.
    name = value if isinstance(value, str) else getattr(value, "zone", None)
    if name is None and isinstance(value, tzinfo):
        name = getattr(value, "key", None) or value.tzname(None)
    if not isinstance(name, str):
        raise TypeError(value)
    try:
        return ZoneInfo(name.strip())
    except (OSError, ValueError, LookupError) as error:
        raise ValueError(name) from error


def _zone_name(value: object) -> str:
    return str(getattr(value, "key", value))


def _names(value: object) -> list[str]:
    if isinstance(value, str):
        return [part for part in re.split(r"[,;\s]+", value) if part]
    if not isinstance(value, list | tuple | set | frozenset):
        raise TypeError(value)
    return [_text(part) for part in value]


def _variables(value: object) -> list[str]:
    given = _names(value)
    for each in given:
        name, equals, _ = each.partition("=")
        if not equals or not name.isidentifier():
            raise Refused(f"{each!r} sets no variable")
    return given


def choice(*words: str, **others: str) -> Kind[str]:
    def parse(value: object) -> str:
        # Enum members of Faust's carry the word as their value.
        word = str(getattr(value, "value", value)).strip().lower()
        word = others.get(word, word)
        if word not in words:
            raise ValueError(value)
        return word

    return Kind(f"one of {', '.join(words)}", parse, choices=words)


def optional(kind: Kind[T], *words: str) -> Kind[T | None]:
    """`kind`, or no value, which `words` and "none" say too."""
    nothing = {"", "none", *words}

    def parse(value: Any) -> T | None:
        if value is None or (isinstance(value, str) and value.strip().lower() in nothing):
            return None
        return kind.parse(value)

    return Kind(
        f"{kind.expected}, or {words[0] if words else 'none'}",
        parse,
        show=kind.show,
        plain=lambda value: None if value is None else kind.plain(value),
        choices=kind.choices,
        unit=kind.unit,
    )


def _codec(value: object) -> Any:
    # A codec object is the user's own; the registry of codecs says whether a name is known.
    return _text(value) if isinstance(value, str) else value


def _anything(value: object) -> Any:
    return value


def _word_of(value: object) -> str:
    return value if isinstance(value, str) else str(getattr(value, "name", value))


TEXT = Kind("a text", _text)
PATH = Kind("a path", _path, plain=lambda value: str(value.absolute()))
BOOL = Kind("1, true, yes, on, or 0, false, no, off", parse_bool, show=lambda v: str(v).lower())
DURATION = Kind(
    "a duration such as 500ms, 30s, 5m, 2h, or a number of seconds",
    parse_duration,
    show=show_duration,
    unit="seconds",
)
DURATION_ABOVE_0 = Kind(
    "a duration above 0 such as 500ms, 30s, 5m, 2h, or a number of seconds",
    _duration_above_0,
    show=show_duration,
    unit="seconds",
)
SIZE = Kind(
    "a size such as 64MiB, 1MB, or a number of bytes", parse_size, show=show_size, unit="bytes"
)
COUNT = Kind("a whole number from 0", _integer(0))
COUNT_FROM_1 = Kind("a whole number from 1", _integer(1))
PORT = Kind("a port number from 0 to 65535", _integer(0, 65535))
NICE = Kind("a whole number from 0 to 19", _integer(0, 19))
VARIABLES = Kind("a list of NAME=value", _variables, show=", ".join)
OCTAL = Kind("an octal number such as 022", _octal, show=lambda value: f"{value:03o}")
TIMEZONE = Kind(
    "a time zone such as Europe/Vienna", _timezone, show=_zone_name, plain=_zone_name
)
NAMES = Kind("a list of names", _names, show=", ".join)
CODEC = Kind("the name of a codec", _codec, show=_word_of, plain=_word_of)
ANY = Kind(
    "any value",
    _anything,
    show=repr,
    plain=lambda value: value if isinstance(value, bool | str) else repr(value),
)
BROKER = Kind(
    "embedded://, memory://, kafka://host:9092;host2:9092 or kafka+ssl://user:password@host",
    parse_broker,
    show=str,
    plain=str,
)
LEVEL = choice(*LEVELS, warning="warn", critical="crit", fatal="crit")
APP_ID = Kind("letters, digits, '.', '_' and '-'", _app_id)
