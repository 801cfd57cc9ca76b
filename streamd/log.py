"""What the processes of a tree write to their log pipes.

A process logs to its stderr, which is a pipe that the master reads: one line a record, as
`docs/internals.md` "Log lines" describes. A master that does not read must not stop an agent,
so a line that does not fit the pipe is dropped and counted.
"""

import logging
import os
import traceback
from pathlib import Path

from streamd.errors import StreamdError
from streamd.logpipe import PipeHandler, PipeWriter, pipe_line, redirect_prints
from streamd.secrets import mask

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "crit": logging.CRITICAL,
}

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


_writer: PipeWriter | None = None  # this process's


def setup_child_logging(
    level: str, fd: int = 2, *, prints: bool = False, debug: bool = False
) -> None:
    """Send the root logger and Python's warnings to `fd`, as lines of `PipeFormatter`.

    May be called again, with another level. Handlers of the user's stay. A forked child whose
    `fd` is another pipe calls `follow_log`.

    Args:
        level: One of `LEVELS`.
        prints: `sys.stdout` and `sys.stderr` go there as well, and never wait; a forked child
            inherits that.
        debug: Show whole tracebacks, not only the user's part of them.
    """
    global _writer
    if _writer is None:
        _writer = PipeWriter(fd)
    else:
        _writer.attach(fd)
    if prints:
        redirect_prints(_writer)
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, PipeHandler):
            root.removeHandler(handler)
    handler = PipeHandler(_writer)
    handler.setFormatter(PipeFormatter(debug=debug or level == "debug"))
    root.addHandler(handler)
    root.setLevel(LEVELS[level])
    logging.captureWarnings(True)


def follow_log(fd: int = 2) -> None:
    """Let what was set up before the fork write to the pipe that `fd` is now."""
    if _writer is not None:
        _writer.attach(fd)


def push_log() -> None:
    """Write what the log pipe had no room for, if it has now; to be called now and then."""
    if _writer is not None:
        _writer.push()


def flush_log(timeout_s: float) -> None:
    """Wait until the log pipe has everything, at most `timeout_s`."""
    if _writer is not None:
        _writer.flush(timeout_s)
