"""The zygote: imports the app once, says what it is, and forks the processes that run it.

It is started by start.py.

It has one thread and one blocking socket, so that a fork copies a quiet process: no lock is
held, no loop is shared, and the memory of the import is shared by all that it forks.

What is forked is a child of the master, which owns its exit status (forking.py). Where the
system or a thread of the import stands in the way it takes two forks: the process between ends
at once, and the master, a subreaper, adopts the child. That does nothing before: a PDEATHSIG
set earlier would fire when the process between ends.

The child tells its pid before anything else can be heard of it. Who forked it tells it too,
should it have died at birth; the second word is not needed.
"""

import ctypes
import errno
import faulthandler
import logging
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, cast

import msgspec

from streamd.agentproc import forking, process
from streamd.agentproc.sharing import prepare_for_forks
from streamd.app import App
from streamd.config import bootstrap
from streamd.errors import StreamdError
from streamd.failpoints import failpoint
from streamd.finder import find_app
from streamd.log import flush_log, setup_child_logging, user_traceback
from streamd.partition import fast_partition_for
from streamd.secrets import mask
from streamd.wire import (
    Fork,
    Forked,
    ForkFailed,
    FrameReader,
    Hello,
    Import,
    ImportFailed,
    Message,
    encode_frame,
)

log = logging.getLogger(__name__)

EXIT_CONFIG = 78
EXIT_NO_DESCRIPTORS = 1
FORK_DESCRIPTORS = 4
ADOPTION_S = 5.0
GOODBYE_S = 0.2
SIGNALS = signal.valid_signals()

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


class Zygote:
    """The serving end of the link to the master."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._master = os.getppid()
        self._reader = FrameReader()
        self._frames: deque[tuple[int, Message]] = deque()
        self._descriptors: deque[int] = deque()  # received, not yet claimed by a Fork
        self._forks_for_master = False  # in one step
        self._handled: list[int] = []  # signals that the import has set handlers for

    def run(self) -> int:
        """Import, then fork on request until the master closes the link; the exit code."""
        if (frame := self._receive()) is None:
            return 0
        id, order = frame
        if not isinstance(order, Import):
            raise SystemExit(f"the first frame was {type(order).__name__}, expected Import")
        try:
            app, hello = import_app(order)
        except BaseException as error:
            # Whatever it is: the master waits for an answer.
            failed = describe_failure(order.app, error)
            self._send(-id, failed)
            return failed.exit_code
        prepare_for_forks()
        self._forks_for_master = forking.is_possible()
        self._handled = handled_signals()
        self._send(-id, hello)
        while (frame := self._receive()) is not None:
            id, order = frame
            if isinstance(order, Fork):
                if len(self._descriptors) < FORK_DESCRIPTORS:
                    # What the kernel dropped cannot be told from what is still to come.
                    log.error(
                        "only %d of %d descriptors came with the order to fork %s: the limit "
                        "of open files is reached; this zygote ends and is replaced",
                        len(self._descriptors), FORK_DESCRIPTORS, order.plan.process,
                    )  # fmt: skip
                    return EXIT_NO_DESCRIPTORS
                self._fork(id, order, app)
            else:
                log.warning("a %s came to the zygote, which only forks", type(order).__name__)
        return 0

    def _fork(self, id: int, order: Fork, app: App) -> None:
        failpoint("zygote.before-fork")
        ends = [self._descriptors.popleft() for _ in range(FORK_DESCRIPTORS)]
        # Nothing may arrive at the child before its handlers stand: it would act on the
        # zygote's, or be lost. The process unblocks them itself.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        flush_output()
        try:
            if self._forks_for_master:
                pid = forking.fork_for_parent()
                if pid == 0:
                    self._become(id, order, app, ends, self._master)
                self._send(-id, Forked(order.id, pid))
            else:
                self._fork_twice(id, order, app, ends)
        except OSError as error:
            self._send(-id, ForkFailed(order.id, fork_error(error)))
        finally:
            for end in ends:
                os.close(end)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def _fork_twice(self, id: int, order: Fork, app: App, ends: list[int]) -> None:
        middle = os.fork()
        if middle == 0:
            self._fork_again(id, order, app, ends)
        _, status = os.waitpid(middle, 0)
        if status != 0:
            # It may have told or not; what it has forked ends with its link.
            code = os.waitstatus_to_exitcode(status)
            error = f"the process that forks ended with {code}"
            self._send(-id, ForkFailed(order.id, error))

    def _fork_again(self, id: int, order: Fork, app: App, ends: list[int]) -> NoReturn:
        """In the middle process: fork the child, tell the master, end."""
        code = 0
        try:
            middle = os.getpid()
            pid = os.fork()
            if pid == 0:
                self._become(id, order, app, ends, middle)
            self._send(-id, Forked(order.id, pid))
        except OSError as error:
            self._send(-id, ForkFailed(order.id, fork_error(error)))
        except BaseException:
            traceback.print_exc()
            code = 70
        finally:
            os._exit(code)

    def _become(self, id: int, order: Fork, app: App, ends: list[int], parent: int) -> NoReturn:
        """In the child: let go of the zygote's things and run the plan.

        Args:
            parent: Who forked it, or whose child it was made.
        """
        code, plan = 70, order.plan
        try:
            failpoint("zygote.before-tell")
            self._send(-id, Forked(order.id, os.getpid()))
            failpoint("zygote.after-tell")
            link, log_pipe, page, dump = ends
            os.dup2(log_pipe, 1)
            os.dup2(log_pipe, 2)
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            for other in (log_pipe, null, *self._descriptors):
                os.close(other)
            self._link.close()
            failpoint("zygote.in-child")
            if wait_adopted(parent, self._master):
                failpoint("zygote.adopted")
                reset_process(plan.process, self._handled)
                code = process.run(plan, app, process.Ends(link, page, dump))
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            # Never by sys.exit: exit handlers of what was imported belong to the zygote.
            flush_output()
            os._exit(code)

    def _receive(self) -> tuple[int, Message] | None:
        """The next frame, or None when the master closed the link.

        Descriptors arrive with or before the last byte of their frame, in order.
        """
        while not self._frames:
            data, descriptors, _, _ = socket.recv_fds(
                self._link, 65536, 4 * FORK_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
            if not data:
                return None
            self._descriptors += descriptors
            self._frames += self._reader.feed(data)
        return self._frames.popleft()

    def _send(self, id: int, message: Message) -> None:
        self._link.sendall(encode_frame(id, message))


def import_app(order: Import) -> tuple[App, Hello]:
    """Import the app and resolve its settings; what it is.

    Raises:
        StreamdError: It cannot be imported, or contradicts itself.
    """
    file = None if order.config_file is None else Path(order.config_file)
    setup_child_logging(bootstrap(os.environ, file, order.options).loglevel)
    found, origin = find_app(order.app, Path.cwd())
    app = cast(App, found)
    app.configure(os.environ, file, order.options)
    setup_child_logging(app.settings.loglevel, debug=app.settings.debug)
    hello = app.hello(origin, order.alone)
    # Here, so that the time and the memory of importing Kafka's client are spent once.
    fast_partition_for()
    threads = thread_names()
    if len(threads) > 1:
        warning = (
            f"importing the app started {len(threads) - 1} threads "
            f"({', '.join(threads[1:])}), which the forked processes do not have: "
            "start them in a task"
        )
        hello = msgspec.structs.replace(hello, warnings=[*hello.warnings, warning])
    return app, hello


def describe_failure(app: str, error: BaseException) -> ImportFailed:
    """What to tell about an app that could not be imported."""
    if isinstance(error, StreamdError):
        return ImportFailed(str(error), error.seen, error.remedy, "", error.exit_code)
    what = mask(f"{type(error).__name__}: {error}".partition("\n")[0])
    return ImportFailed(
        f"cannot import app {app!r}: {what}", [], None, user_traceback(error), EXIT_CONFIG
    )


def wait_adopted(parent: int, master: int) -> bool:
    """Wait until the master is the parent of this process; False: it is dead.

    Where another process is the parent this takes until that has ended, at most `ADOPTION_S`.
    """
    deadline = time.monotonic() + ADOPTION_S
    while parent != master and os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(0.0002)
    os.setsid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Asked after the prctl: a master that died before it sends no signal any more.
    return os.getppid() == master


def handled_signals() -> list[int]:
    """The signals that do not mean here what they mean by default."""
    return [
        number
        for number in SIGNALS - {signal.SIGKILL, signal.SIGSTOP}
        if signal.getsignal(number) not in (None, signal.SIG_DFL)
    ]


def reset_process(name: str, handled: Iterable[int]) -> None:
    """Undo what a process inherits from the one that imported the app.

    Args:
        name: Of the process.
        handled: The signals that the import has set handlers for.
    """
    signal.set_wakeup_fd(-1)
    for number in handled:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.unregister(signal.SIGUSR1)
    faulthandler.disable()
    os.environ["STREAMD_AGENT"] = name  # by which the master knows what it leaves behind
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    set_title(name)


def set_title(name: str) -> None:
    """Show `name` in `ps`: the command, and with setproctitle the whole line."""
    if _setproctitle is not None:
        _setproctitle(f"streamd: {name}")
    # After the title, which sets the command as well.
    _prctl(_PR_SET_NAME, ctypes.c_char_p(os.fsencode(name)[:15]))


def flush_output() -> None:
    """Write what prints left in the buffers, if anybody still reads it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            # Reader gone, or closed by the user's code: there is nobody to tell.
            continue
    flush_log(GOODBYE_S)


def thread_names() -> list[str]:
    """The threads of this process, the main one first; by Python's name where it has one."""
    named = {thread.native_id: thread.name for thread in threading.enumerate()}
    ids = sorted(int(entry.name) for entry in Path("/proc/self/task").iterdir())
    return [
        named.get(id) or Path(f"/proc/self/task/{id}/comm").read_text().strip() for id in ids
    ]


def fork_error(error: OSError) -> str:
    """The reason of a failed fork, for people."""
    name = errno.errorcode.get(error.errno or 0, "?")
    return f"fork failed: {error.strerror} ({name})"


def _prctl(option: int, value: Any) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _load_setproctitle() -> Any:
    # Without this variable the title overwrites /proc/PID/environ, by which the processes of
    # a dead master are found.
    os.environ["SPT_NOENV"] = "1"
    try:
        import setproctitle  # noqa: PLC0415
    except ImportError:
        return None
    return setproctitle.setproctitle


_setproctitle = _load_setproctitle()


def main() -> NoReturn:
    """Run the zygote on the descriptor that the first argument names."""
    link = socket.socket(fileno=int(sys.argv[1]))
    link.setblocking(True)
    link.set_inheritable(False)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    setup_child_logging("info", prints=True)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    set_title("zygote")
    try:
        code = Zygote(link).run()
    except (BrokenPipeError, ConnectionResetError):
        # The master closed the link while this imported or forked.
        code = 0
    flush_output()
    # Threads that the import started would keep the interpreter from ending.
    os._exit(code)
