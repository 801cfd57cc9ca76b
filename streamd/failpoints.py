"""Places where a test may end, stop or fail a process of streamd.

Obeyed only with STREAMD_TEST=1 and STREAMD_FAILPOINT=name:nth:action, e.g.
`commit.after-begin:3:kill`: the third time that a process passes the place, it takes the
action. Several are separated by commas. Each acts once in a tree, however often its processes
are restarted: a file of its name in the runtime folder says that it did. Unarmed, passing a
place costs one comparison.

    kill    SIGKILL to this process
    exit    leave at once with status 70, no clean-up
    stop    SIGSTOP to this process; it goes on after SIGCONT
    raise   FailpointError
"""

import os
import signal
import threading

from streamd.errors import ConfigError, StreamdError
from streamd.instance import TREE_VARIABLE, runtime_root

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
    "engine.recovered": "the tables are loaded; nothing was read",
    "checkpoint.before-take": "no event is in work; nothing is taken for the checkpoint",
    "checkpoint.after-take": "outputs, rows and positions are taken; events are handed out",
    "checkpoint.committed": "the checkpoint is durable; the tables are not folded",
    "checkpoint.landed": "the tables are folded; who waits is about to go on",
    "rollback.before-drop": "an event failed; nothing of its try is dropped",
    "rollback.after-drop": "what the failed try left is dropped; nothing is read again",
    "zygote.before-fork": "the zygote was told to fork, and has not",
    "zygote.before-tell": "the forked process exists, and has not told its pid",
    "zygote.after-tell": "the forked process has told its pid and does nothing else",
    "zygote.in-child": "the forked process has its own descriptors; it may be no child yet",
    "zygote.adopted": "the forked process is the master's child; its engine is not started",
    "master.locked": "the master has its lock; nothing is started",
    "master.claimed": "the master has the data directory; the log is not started",
    "master.before-fork": "the master is about to ask for a process",
    "master.forked": "the master knows a process that was forked; nothing is noted of it",
    "master.on-exit": "the end of a process was seen; nothing is decided",
    "master.before-ready": "all processes run; nobody was told",
    "master.stopping": "the agents ended warm; zygote and log have not",
    "trim.before-commit": "packs are deleted and the low is moved; COMMIT was not called",
    "checkpoint.before-truncate": "the log's process is about to empty the WAL",
    "kafka.before-outputs": "a checkpoint was handed to the writing thread; nothing is sent",
    "kafka.after-outputs": "what the events sent is handed to the producer; rows are not",
    "kafka.before-flush": "outputs and rows are with the producer; none is known to be there",
    "kafka.before-markers": "outputs and rows are on the cluster; no marker says so",
    "kafka.before-marker-flush": "markers are with the producer; none is known to be there",
    "kafka.after-markers": "markers are on the cluster; the caller does not know yet",
    "kafka.before-begin": "the writing thread has a checkpoint; no transaction is open",
    "kafka.after-begin": "a transaction is open; it holds nothing",
    "kafka.before-offsets": "a transaction holds all but the offsets",
    "kafka.before-commit": "a transaction holds all; it is not committed",
    "kafka.after-commit": "a transaction is committed; the caller does not know yet",
    "kafka.before-restore": "markers were read; no row was",
    "kafka.before-repair": "rows were read; what came after the marker is not repaired",
    "kafka.before-claim": "repairs are on the cluster; no marker of this owner is",
    "kafka.after-claim": "the claim is on the cluster; nobody looked for rivals",
}
"""Every failpoint: name -> where it is."""

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


_armed: dict[str, _Armed] | None = None


def arm(text: str | None) -> None:
    """Obey these `name:nth:action` from now on, or nothing with None.

    Raises:
        ConfigError: The text does not name failpoints and actions.
    """
    global _armed
    each = [_Armed(part) for part in text.split(",")] if text else []
    _armed = {armed.name: armed for armed in each} or None


def failpoint(name: str) -> None:
    """Pass the place `name`; act if it is armed and its turn has come."""
    if _armed is not None and name in _armed:
        _act(_armed[name])


def _act(armed: _Armed) -> None:
    armed.passes_left -= 1
    if armed.passes_left != 0 or not _is_first(armed.name):
        return
    match armed.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            # To this thread: one sent to the process may stop another thread first, and this
            # one would go on for a moment.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        case "exit":
            os._exit(70)
        case "raise":
            raise FailpointError(f"the failpoint {armed.name} was passed")


def fired_path(tree: str, name: str) -> str:
    """The file that says that a failpoint has acted in a tree."""
    return str(runtime_root() / f"{tree}.{name}")


def _is_first(name: str) -> bool:
    """True for the one process of the tree that asks first; without a tree, for each."""
    tree = os.environ.get(TREE_VARIABLE)
    if not tree:
        return True
    try:
        os.close(os.open(fired_path(tree, name), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


if os.environ.get("STREAMD_TEST") == "1":
    arm(os.environ.get("STREAMD_FAILPOINT"))
