"""Places where a test may end, stop or fail this process.

Obeyed only with STREAMD_TEST=1 and STREAMD_FAILPOINT=name:nth:action, e.g.
`commit.after-begin:3:kill`: the third time that the place is passed, the action is taken, once.
Unarmed, passing a place costs one comparison.

    kill    SIGKILL to this process
    exit    leave at once with status 70, no clean-up
    stop    SIGSTOP to this process; it goes on after SIGCONT
    raise   FailpointError
"""

import os
import signal

from streamd.errors import ConfigError, StreamdError

FAILPOINTS = {
    "commit.before-encode": "a checkpoint was handed to the log's thread; nothing is encoded",
    "commit.before-turnstile": "the packs are encoded; no lock is held",
    "commit.before-begin": "this process has its turn; no transaction is open",
    "commit.after-begin": "the transaction is open; nothing is written",
    "commit.after-outputs": "packs and heads are written, tables and positions are not",
    "commit.after-tables": "packs and tables are written, positions are not",
    "commit.after-positions": "all is written; COMMIT was not called",
    "commit.before-commit": "just before COMMIT",
    "commit.after-commit": "COMMIT returned; the turn is still held, nobody was woken",
    "commit.after-leave": "the turn was given up; nobody was woken",
    "commit.after-wake": "the readers were woken; the caller does not know yet",
    "open.before-claim": "a session opens; its partitions are not claimed",
    "open.inside-claim": "the epochs are raised; COMMIT was not called",
    "open.after-claim": "the partitions are claimed; nothing was read",
    "load.before-read": "a table's rows are about to be read",
    "load.after-read": "a table's rows were read",
    "trim.before-commit": "packs are deleted and the low is moved; COMMIT was not called",
    "checkpoint.before-truncate": "the log's process is about to empty the WAL",
}
"""Every failpoint of the agent processes: name -> where it is."""

ACTIONS = ("kill", "raise", "exit", "stop")


class FailpointError(StreamdError):
    """A failpoint with the action `raise` was passed."""


class _Armed:
    def __init__(self, text: str) -> None:
        name, _, rest = text.partition(":")
        nth, _, action = rest.partition(":")
        if name not in FAILPOINTS or action not in ACTIONS or not nth.isdecimal():
            raise ConfigError(
                f"STREAMD_FAILPOINT is {text!r}, expected name:nth:action with an action of "
                f"{', '.join(ACTIONS)}",
                remedy="streamd failpoints lists the names",
            )
        self.name = name
        self.action = action
        self.passes_left = int(nth)


_armed: _Armed | None = None


def arm(text: str | None) -> None:
    """Obey `name:nth:action` from now on, or nothing with None.

    Raises:
        ConfigError: The text does not name a failpoint and an action.
    """
    global _armed
    _armed = _Armed(text) if text else None


def failpoint(name: str) -> None:
    """Pass the place `name`; act if it is the armed one and its turn has come."""
    if _armed is not None and _armed.name == name:
        _act(_armed)


def _act(armed: _Armed) -> None:
    armed.passes_left -= 1
    if armed.passes_left != 0:
        return
    match armed.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            # To this thread: of a signal to the process another one may take note first, and
            # this one would run on for a while.
            signal.raise_signal(signal.SIGSTOP)
        case "exit":
            os._exit(70)
        case "raise":
            raise FailpointError(f"the failpoint {armed.name} was passed")


if os.environ.get("STREAMD_TEST") == "1":
    arm(os.environ.get("STREAMD_FAILPOINT"))
