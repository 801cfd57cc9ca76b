"""Every error that streamd raises on purpose.

    StreamdError
    ├── UsageError            exit 2    wrong options or arguments
    ├── ConfigError           exit 78   the user's settings
    ├── AppError              exit 78   the user's code: import, names, groups
    ├── NotRunning            exit 3    the instance that was asked for does not run
    ├── NotPermitted          exit 4    another user's instance, a missing token
    ├── Busy                  exit 75   another instance holds the lock, the log or the port
    ├── BrokerError           exit 69   the broker cannot be reached or refuses
    │   ├── Fenced            exit 70   another process took over these partitions
    │   ├── Outdated                    a checkpoint of partitions that are taken over anew
    │   └── LogDamaged        exit 78   the embedded log cannot be trusted as it is
    ├── TimedOut              exit 124
    │   └── ReplyTimeout                no reply to an `ask` in time
    ├── WireError             exit 70   a frame that cannot be right: a bug of ours
    ├── StateError                      a transition that the state table does not have
    ├── TableError                      a table used where it may not be
    ├── DecodeError                     a record that its topic's types refuse
    │   └── ValidationError             a Record's field does not have its type
    └── EncodeError                     a value that its topic's codec cannot write

An error's text is one sentence: what was found, what was expected. `seen` holds further
lines of what was seen, `remedy` a command or a change that helps; the command line prints
them as `Error:`, indented lines, and `Try:`. Secrets in them are masked from the beginning.
"""

from collections.abc import Sequence

from streamd.secrets import mask


class StreamdError(Exception):
    """Something that streamd noticed and can explain."""

    exit_code = 1

    def __init__(
        self, message: str = "", *, seen: Sequence[str] = (), remedy: str | None = None
    ) -> None:
        super().__init__(mask(message or (self.__doc__ or "").strip().splitlines()[0]))
        self.seen = [mask(line) for line in seen]
        self.remedy = mask(remedy) if remedy is not None else None


class UsageError(StreamdError):
    """The command was given wrong options or arguments."""

    exit_code = 2


class ConfigError(StreamdError):
    """A setting has a value that cannot be used."""

    exit_code = 78


class AppError(StreamdError):
    """The app cannot be imported or contradicts itself."""

    exit_code = 78


class NotRunning(StreamdError):
    """The instance does not run."""

    exit_code = 3


class NotPermitted(StreamdError):
    """The caller may not do this."""

    exit_code = 4


class Busy(StreamdError):
    """Another instance holds what is needed."""

    exit_code = 75


class BrokerError(StreamdError):
    """The broker cannot be reached, or refused."""

    exit_code = 69


class Fenced(BrokerError):
    """Another process took over these partitions."""

    exit_code = 70


class Outdated(BrokerError):
    """Partitions of this checkpoint went, or are recovered anew: go back to where they are."""


class BrokerLost(StreamdError):
    """What the broker has got is not known any more: the process ends and another reads on."""

    exit_code = 69


class LogDamaged(BrokerError):
    """The embedded log cannot be trusted as it is."""

    exit_code = 78


class TimedOut(StreamdError):
    """The time given was not enough."""

    exit_code = 124


class ReplyTimeout(TimedOut):
    """No reply came in time."""


class WireError(StreamdError):
    """A frame that cannot be right came over a link."""

    exit_code = 70


class StateError(StreamdError):
    """A transition that the state table does not have."""


class TableError(StreamdError):
    """A table was used where it may not be."""


class DecodeError(StreamdError):
    """A record does not have the type its topic declares."""


class EncodeError(StreamdError):
    """A value cannot be written with its topic's codec."""


class ValidationError(DecodeError):
    """A field of a Record does not have the type that its class declares."""
