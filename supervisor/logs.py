"""The log of the whole tree: read from every process's pipe, kept, shown and written.

Every line goes one way: pipe → `Line` → ring, followers, output. Nothing here waits: a pipe is
read a piece a turn, so that a chatty process does not hold up the master, and an output that
does not take what it is given loses lines, which are counted, not time.
"""

import asyncio
import contextlib
import fcntl
import functools
import logging
import os
import socket
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec

RING_LINES = 10_000
RING_BYTES = 16 * 1024 * 1024
MAX_LINE_BYTES = 64 * 1024
READ_BYTES = 64 * 1024  # a pipe and turn of the loop
PIPE_BYTES = 1024 * 1024
MAX_PENDING_BYTES = 4 * 1024 * 1024
FOLLOWER_LINES = 5_000

_RECORD = b"\x1e"
_F_SETPIPE_SZ = 1031
_COLORS = {"WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[1;31m"}
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"

# What a print holds must not move the reader's cursor or set his title.
_VISIBLE = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)
}


class Line(NamedTuple):
    """One entry of the log; `text` may have several lines."""

    t: float  # unix seconds
    process: str
    pid: int
    level: str
    text: str


class _Record(msgspec.Struct):
    t: float
    l: str  # noqa: E741 - the name in the pipe's format
    n: str
    m: str


_decode = msgspec.json.Decoder(_Record).decode


@functools.lru_cache(maxsize=64)
def level_number(name: str) -> int:
    """The number of a level in any case, by logging's names or the command line's."""
    upper = {"WARN": "WARNING", "CRIT": "CRITICAL"}.get(name.upper(), name.upper())
    return logging.getLevelNamesMapping().get(upper, logging.INFO)


def parse(data: bytes, process: str, pid: int) -> Line:
    """A line of a log pipe, without its end."""
    if data.startswith(_RECORD):
        try:
            record = _decode(data[1:])
            return Line(record.t, process, pid, record.l, record.m)
        except (msgspec.DecodeError, UnicodeDecodeError):
            data = data[1:]
    return Line(time.time(), process, pid, "INFO", data.decode(errors="replace"))


class Logs:
    """Takes lines from everywhere and hands them on."""

    def __init__(
        self, output: "Output", *, style: str, level: str, color: bool = False
    ) -> None:
        """
        Args:
            style: "text" or "json", a line of the output.
            level: What is below is not kept.
        """
        self._output = output
        self._json = style == "json"
        self._color = color
        self._level = level_number(level)
        self._ring: deque[Line] = deque(maxlen=RING_LINES)
        self._ring_bytes = 0
        self._followers: set[asyncio.Queue[Line]] = set()
        self._second = (0, "")  # the last second that was formatted, and its text

    def put(self, line: Line) -> None:
        """Take one line."""
        if level_number(line.level) < self._level:
            return
        if len(self._ring) == RING_LINES:
            self._ring_bytes -= len(self._ring.popleft().text)
        self._ring.append(line)
        self._ring_bytes += len(line.text)
        while self._ring_bytes > RING_BYTES:
            self._ring_bytes -= len(self._ring.popleft().text)
        for follower in self._followers:
            if not follower.full():
                follower.put_nowait(line)
        self._output.write(self._format(line).encode(errors="replace"))

    def select(
        self, names: Callable[[str], bool], *, lines: int, level: str, since: float
    ) -> list[Line]:
        """The last `lines` kept lines of these processes, from a level and a moment on."""
        lowest = level_number(level)
        chosen: list[Line] = []
        for line in reversed(self._ring):
            if len(chosen) >= lines or line.t < since:
                break
            if names(line.process) and level_number(line.level) >= lowest:
                chosen.append(line)
        return chosen[::-1]

    def processes(self) -> list[str]:
        """The processes that kept lines are of."""
        return sorted({line.process for line in self._ring})

    @contextlib.contextmanager
    def followed(self) -> Iterator["asyncio.Queue[Line]"]:
        """A queue that gets every line from now on; a reader that is too slow misses some."""
        queue: asyncio.Queue[Line] = asyncio.Queue(FOLLOWER_LINES)
        self._followers.add(queue)
        try:
            yield queue
        finally:
            self._followers.discard(queue)

    def reopen(self) -> None:
        """Open the log file anew, after it was moved away."""
        self._output.reopen()

    def move_to(self, output: "Output") -> None:
        """Write to another output from now on, without colours; the old one is flushed."""
        self._output.flush(1.0)
        self._output = output
        self._color = False

    def flush(self, timeout_s: float) -> None:
        """Write what is pending; blocks for at most `timeout_s`."""
        self._output.flush(timeout_s)

    def _format(self, line: Line) -> str:
        if self._json:
            return msgspec.json.encode(line._asdict()).decode() + "\n"
        second = int(line.t)
        if second != self._second[0]:
            self._second = (second, time.strftime("%H:%M:%S", time.localtime(second)))
        at, level = self._second[1], f"{line.level:<7}"
        text = line.text.translate(_VISIBLE).replace("\n", "\n    ")
        if self._color:
            at = f"{_DIM}{at}{_PLAIN}"
            if color := _COLORS.get(line.level):
                level = f"{color}{level}{_PLAIN}"
        return f"{at} {level} {line.process}  {text}\n"


class Output:
    """Where log lines end: a file, a terminal, a pipe or a socket. Never blocks."""

    def __init__(self, path: str | None, fd: int = 2) -> None:
        """
        Args:
            path: The log file, made if it is not there; None: what is behind `fd`.

        Raises:
            OSError: The file cannot be opened.
        """
        self._path = path
        self._dropped = 0
        self._pending = bytearray()
        self._waiting = False
        self._is_socket = False
        self._is_file = True
        self._fd = self._open_file(path) if path is not None else self._open_again(fd)

    @property
    def is_terminal(self) -> bool:
        """True if people look at it right now."""
        return os.isatty(self._fd)

    def write(self, data: bytes) -> None:
        """Write, or keep for later, or drop when too much is kept."""
        if len(self._pending) + len(data) > MAX_PENDING_BYTES:
            self._dropped += 1
            return
        if self._dropped and not self._pending:
            self._pending += f"({self._dropped} log lines were lost here)\n".encode()
            self._dropped = 0
        self._pending += data
        self._push()

    def reopen(self) -> None:
        """Open the file anew; what has no file is left alone."""
        if self._path is None:
            return
        try:
            fd = self._open_file(self._path)
        except OSError:
            # The old file is still better than none.
            return
        os.close(self._fd)
        self._fd = fd

    def flush(self, timeout_s: float) -> None:
        """Write what is pending; blocks for at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self._pending and time.monotonic() < deadline:
            self._push()
            if self._pending:
                time.sleep(0.002)

    def _push(self) -> None:
        while self._pending:
            try:
                taken = self._write_some()
            except BlockingIOError:
                self._wait_writable()
                return
            except OSError:
                # Disk full, terminal closed: the ring still has the lines.
                self._dropped += self._pending.count(b"\n")
                self._pending.clear()
                return
            del self._pending[:taken]

    def _write_some(self) -> int:
        if self._is_socket:
            with socket.socket(fileno=os.dup(self._fd)) as end:
                return end.send(self._pending, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        return os.write(self._fd, self._pending)

    def _wait_writable(self) -> None:
        if self._waiting:
            return
        with contextlib.suppress(RuntimeError, OSError):  # no loop runs: `flush` tries again
            asyncio.get_running_loop().add_writer(self._fd, self._on_writable)
            self._waiting = True

    def _on_writable(self) -> None:
        asyncio.get_running_loop().remove_writer(self._fd)
        self._waiting = False
        self._push()

    def _open_file(self, path: str) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        return os.open(path, flags, 0o640)

    def _open_again(self, fd: int) -> int:
        mode = os.fstat(fd).st_mode
        self._is_socket = stat.S_ISSOCK(mode)
        self._is_file = stat.S_ISREG(mode)
        # A file never blocks, and a second opening would have a place of its own in it: what a
        # script writes after us would be written over our lines.
        if not self._is_socket and not self._is_file:
            # O_NONBLOCK belongs to the open file, which is shared with the user's shell: a
            # second opening of the same thing has flags of its own.
            flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            with contextlib.suppress(OSError):
                return os.open(f"/proc/self/fd/{fd}", flags)
        return os.dup(fd)


class LogPipe:
    """The reading end of one process's log pipe."""

    def __init__(self, process: str, put: Callable[[Line], None]) -> None:
        self.process = process
        self.pid = 0
        self.captured: list[str] | None = None  # takes plain lines while stacks are collected
        self._put = put
        self._rest = bytearray()
        self._fd, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._fd, False)
        self._enlarge()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._on_readable)

    def _enlarge(self) -> None:
        # Holds what is printed while the master is stopped. Refused where the user has used up
        # his share of pipe memory: then a pipe has what it has.
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._fd, _F_SETPIPE_SZ, PIPE_BYTES)

    def close_write_end(self) -> None:
        """To be called once the process has it."""
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    def drain(self) -> None:
        """Read all that is there now: the last words of a process that died."""
        for _ in range(2 * PIPE_BYTES // READ_BYTES):
            if not self._on_readable():
                return

    def close(self) -> None:
        """Read no more; part of a line becomes a line."""
        self.close_write_end()
        if self._fd < 0:
            return
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = -1
        if self._rest:
            self._take(bytes(self._rest))
            self._rest.clear()

    def _on_readable(self) -> bool:
        """Read one piece; False when there is nothing more."""
        if self._fd < 0:
            return False
        try:
            data = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self.close()
            return False
        for line in self._lines(data):
            self._take(line)
        return True

    def _lines(self, data: bytes) -> Iterator[bytes]:
        *whole, rest = data.split(b"\n")
        for piece in whole:
            self._rest += piece
            yield bytes(self._rest)
            self._rest.clear()
        self._rest += rest
        if len(self._rest) > MAX_LINE_BYTES:
            yield bytes(self._rest)
            self._rest.clear()

    def _take(self, data: bytes) -> None:
        if len(data) > MAX_LINE_BYTES and not data.startswith(_RECORD):
            data = data[:MAX_LINE_BYTES]
        if not data.strip():
            return
        if self.captured is not None and not data.startswith(_RECORD):
            self.captured.append(data.decode(errors="replace"))
            return
        self._put(parse(data, self.process, self.pid))


class LogsHandler(logging.Handler):
    """Sends the master's own records straight into the log."""

    def __init__(self, logs: Logs) -> None:
        super().__init__()
        self._logs = logs
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:
            self.handleError(record)
            return
        self._logs.put(Line(record.created, "master", os.getpid(), record.levelname, text))


def as_data(line: Line) -> dict[str, Any]:
    """A line as the `logs` verb gives it."""
    return line._asdict()
