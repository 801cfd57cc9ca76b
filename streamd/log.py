"""What the processes of a tree write to their log pipes.

A process logs to its stderr, which is a pipe that the master reads: one line a record, as
`docs/internals.md` "Log lines" describes. A master that does not read must not stop an agent,
so a line that does not fit the pipe is dropped and counted.
"""

import contextlib
import logging
import os
import select
import time
import traceback
from pathlib import Path

import msgspec

from streamd.errors import StreamdError
from streamd.secrets import mask

RECORD_START = "\x1e"
"""First character of a line that `PipeFormatter` wrote; a print of the user's has none."""

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "crit": logging.CRITICAL,
}

# An empty pipe holds 64 KiB: a line below that is written whole or not at all.
_MAX_TEXT_CHARS = 48_000

_HERE = f"{Path(__file__).parent}{os.sep}"
_DEMO = f"{_HERE}demo{os.sep}"
_LIBRARY = f"{Path(os.__file__).parent}{os.sep}"
_MACHINERY = tuple(
    f"{_LIBRARY}{name}" for name in ("asyncio", "importlib", "runpy", "contextlib")
)


def user_traceback(error: BaseException) -> str:
    """The traceback of `error` and its causes, as text, cut to frames that the user can act on.

    Frames of streamd, asyncio and the import system are left out, unless streamd's own are
    the innermost ones of an error that streamd did not raise on purpose: then the fault may
    be there. Where nothing would be left, all is kept. Local variables are never shown, and
    secrets are masked.
    """
    shown = traceback.TracebackException.from_exception(error, compact=True)
    _cut(shown, keep_inner=not isinstance(error, StreamdError), seen=set())
    return mask("".join(shown.format()).rstrip("\n"))


def is_user_frame(filename: str) -> bool:
    """True unless the file belongs to streamd or to what runs its calls."""
    if filename.startswith(_HERE):
        return filename.startswith(_DEMO)
    return not filename.startswith(("<frozen", *_MACHINERY))


def _cut(shown: traceback.TracebackException, *, keep_inner: bool, seen: set[int]) -> None:
    if id(shown) in seen:
        return
    seen.add(id(shown))
    own = [index for index, frame in enumerate(shown.stack) if is_user_frame(frame.filename)]
    if not own and shown.exc_type is not None and issubclass(shown.exc_type, SyntaxError):
        # It names the user's file and line by itself.
        shown.stack = traceback.StackSummary.from_list([])
    if own:
        kept = [shown.stack[index] for index in own]
        if keep_inner:
            kept += shown.stack[own[-1] + 1 :]
        shown.stack = traceback.StackSummary.from_list(kept)
    for inner in (shown.__cause__, shown.__context__, *(shown.exceptions or ())):
        if inner is not None:
            _cut(inner, keep_inner=keep_inner, seen=seen)


class PipeFormatter(logging.Formatter):
    """Turns a record into one line of JSON that begins with `RECORD_START`.

    With `debug`, tracebacks are whole.
    """

    def __init__(self, *, debug: bool = False) -> None:
        super().__init__()
        self._debug = debug

    def format(self, record: logging.LogRecord) -> str:
        try:
            text = record.getMessage()
        except Exception as error:
            # A wrong format string of the user's: show what was meant all the same.
            text = f"{record.msg} {record.args!r} ({type(error).__name__}: {error})"
        if record.exc_info and record.exc_info[1] is not None:
            text = f"{text}\n{self._traceback(record.exc_info[1])}"
        if record.stack_info:
            text = f"{text}\n{record.stack_info}"
        return pipe_line(record.created, record.levelname, record.name, mask(text))

    def _traceback(self, error: BaseException) -> str:
        if self._debug:
            return "".join(traceback.format_exception(error)).rstrip("\n")
        return user_traceback(error)


def pipe_line(at: float, level: str, logger: str, text: str) -> str:
    """One log line of the pipe, without its line feed; a very long text is cut."""
    if len(text) > _MAX_TEXT_CHARS:
        text = f"{text[:_MAX_TEXT_CHARS]}… ({len(text) - _MAX_TEXT_CHARS} characters more)"
    # msgspec refuses lone surrogates, which file names and user data may hold.
    text = text.encode("utf-8", "backslashreplace").decode()
    fields = {"t": at, "l": level, "n": logger, "m": text}
    return RECORD_START + msgspec.json.encode(fields).decode()


class PipeHandler(logging.Handler):
    """Writes lines to a pipe and never waits for its reader.

    What does not fit is dropped; the next line that fits is preceded by one that says how many.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self.dropped = 0
        self._rest = b""  # of a line that the pipe took in part
        try:
            # O_NONBLOCK belongs to the open file, which the user's prints share: a second
            # opening of the same pipe has its own.
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_APPEND | os.O_CLOEXEC
            self._fd = os.open(f"/proc/self/fd/{fd}", flags)
            self._poll = None
        except OSError:  # a socket, or a pipe of another user's
            self._fd = os.dup(fd)
            self._poll = select.poll()
            self._poll.register(self._fd, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode() + b"\n"
        except Exception:
            self.handleError(record)
            return
        if self.dropped and self._write(self._notice()):
            self.dropped = 0
        if self.dropped or not self._write(line):
            self.dropped += 1

    def _notice(self) -> bytes:
        text = f"{self.dropped} log lines were dropped here: the log pipe was full"
        return pipe_line(time.time(), "WARNING", __name__, text).encode() + b"\n"

    def _write(self, line: bytes) -> bool:
        """Write `line`; False if none of it was taken. A rest is written by the next call."""
        if self._rest:
            self._rest = self._rest[self._put(self._rest) :]
            if self._rest:
                return False
        taken = self._put(line)
        if taken:
            self._rest = line[taken:]
        return taken > 0

    def _put(self, data: bytes) -> int:
        taken = 0
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while taken < len(data):
                piece = data[taken:]
                if self._poll is not None:
                    # A pipe that polls writable takes 4096 bytes at once.
                    if not self._poll.poll(0):
                        break
                    piece = piece[:4096]
                taken += os.write(self._fd, piece)
        return taken

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        super().close()


def setup_child_logging(level: str, fd: int = 2) -> None:
    """Send the root logger and Python's warnings to `fd`, as lines of `PipeFormatter`.

    To be called again in a forked child, once its `fd` is its own pipe: a handler that was
    inherited would write into the parent's. Handlers of the user's stay.

    Args:
        level: One of `LEVELS`.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, PipeHandler):
            root.removeHandler(handler)
            handler.close()
    handler = PipeHandler(fd)
    handler.setFormatter(PipeFormatter(debug=level == "debug"))
    root.addHandler(handler)
    root.setLevel(LEVELS[level])
    logging.captureWarnings(True)
