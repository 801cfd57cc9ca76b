"""The reading end of a process's log pipe: bytes become lines.

A pipe is read a piece a turn of the loop, so that a chatty process does not hold up the master.
Nothing that arrives can break a line of another: a line has a limit, bytes that are no UTF-8
are shown as such, and a record that was written behind the beginning of a print is found.
"""

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

import msgspec

from streamd.secrets import mask, may_hold_secrets
from streamd.supervisor.logs import Line, Logs

MAX_LINE_BYTES = 64 * 1024
TOO_LONG = "… (the line is longer than 64 KiB: the rest is left out)"
READ_BYTES = 64 * 1024  # a pipe and turn of the loop
TURN_BYTES = 1024 * 1024  # all pipes together
PIPE_BYTES = 1024 * 1024
MANY_PIPES = 24  # from so many on, a pipe is smaller: a user may have 64 MiB in all
MANY_PIPE_BYTES = 256 * 1024

_RECORD = b"\x1e"
_RECORD_BEGINS = b'\x1e{"t":'
_F_SETPIPE_SZ = 1031


class _Record(msgspec.Struct):
    t: float
    l: str  # noqa: E741 - the name in the pipe's format
    n: str
    m: str


_decode = msgspec.json.Decoder(_Record).decode


def parse(data: bytes, process: str, pid: int) -> Line:
    """A line of a log pipe, without its end."""
    if data.startswith(_RECORD):
        try:
            record = _decode(data[1:])
            return Line(record.t, process, pid, record.l, record.m)
        except (msgspec.DecodeError, UnicodeDecodeError):
            data = data[1:]
    text = data.decode(errors="backslashreplace").removesuffix("\r")
    return Line(time.time(), process, pid, "INFO", text)


_open: set["LogPipe"] = set()


def drain_all() -> None:
    """Read all that is in any pipe now."""
    for pipe in list(_open):
        pipe.drain()


class LogPipe:
    """The reading end of one process's log pipe."""

    def __init__(self, process: str, logs: Logs) -> None:
        self.process = process
        self.pid = 0
        self.captured: list[str] | None = None  # takes plain lines while stacks are collected
        self._logs = logs
        self._rest = b""  # a line that has no end yet
        self._is_cutting = False  # what follows belongs to a line that was too long
        self._fd, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._fd, False)
        self._enlarge()
        _open.add(self)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._on_readable)

    def _enlarge(self) -> None:
        # Holds what is printed while the master is stopped. Refused where the user has used up
        # his share of pipe memory: then a pipe has what it has.
        size_bytes = PIPE_BYTES if len(_open) < MANY_PIPES else MANY_PIPE_BYTES
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._fd, _F_SETPIPE_SZ, size_bytes)

    def close_write_end(self) -> None:
        """To be called once the process has it."""
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    def drain(self) -> None:
        """Read all that is there now: the last words of a process that died."""
        taken_bytes = 0
        while taken_bytes < 2 * PIPE_BYTES and (piece_bytes := self._read(READ_BYTES)):
            taken_bytes += piece_bytes

    def let_go(self) -> None:
        """Take the last words of a process that has ended; then read on until the last of
        those that it has started, who share the pipe, has ended too."""
        self.close_write_end()
        self.drain()
        self._end_line()
        self._logs.end_run(self.process)

    def close(self) -> None:
        """Read no more; part of a line becomes a line."""
        self.close_write_end()
        if self._fd < 0:
            return
        _open.discard(self)
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._end_line()

    def _on_readable(self) -> None:
        self._read(max(4096, min(READ_BYTES, TURN_BYTES // len(_open))))

    def _read(self, size_bytes: int) -> int:
        """Read one piece; its size, 0 when there is nothing more."""
        if self._fd < 0:
            return 0
        try:
            data = os.read(self._fd, size_bytes)
        except BlockingIOError:
            return 0
        if data:
            self._take(self._lines(data), data)
        else:
            self.close()
        return len(data)

    def _end_line(self) -> None:
        rest, self._rest, self._is_cutting = self._rest, b"", False
        if rest:
            self._take([rest], rest)

    def _lines(self, data: bytes) -> list[bytes]:
        if self._is_cutting:
            _, end, data = data.partition(b"\n")
            self._is_cutting = not end
        *whole, rest = (self._rest + data).split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            whole.append(rest)
            rest, self._is_cutting = b"", True
        self._rest = rest
        return whole

    def _take(self, pieces: list[bytes], data: bytes) -> None:
        lines = []
        # Records were masked where they were made; one look at all prints together.
        is_suspect: bool | None = None
        for piece in _apart(pieces):
            is_record = piece.startswith(_RECORD)
            if not is_record and self.captured is not None:
                self.captured.append(piece.decode(errors="backslashreplace"))
                continue
            line = parse(_cut(piece), self.process, self.pid)
            if len(piece) > MAX_LINE_BYTES:
                line = line._replace(text=line.text + TOO_LONG)
            if not is_record:
                if is_suspect is None:
                    is_suspect = may_hold_secrets(b"\n".join(pieces).decode(errors="replace"))
                if is_suspect:
                    line = line._replace(text=mask(line.text))
            lines.append(line)
        if lines:
            self._logs.put_all(lines)


def _apart(pieces: list[bytes]) -> Iterator[bytes]:
    """The lines that are not empty; a record behind a print without an end is one."""
    for piece in pieces:
        at = piece.find(_RECORD_BEGINS, 1)
        if at > 0:
            yield piece[:at]
            piece = piece[at:]
        if piece and not piece.isspace():
            yield piece


def _cut(data: bytes) -> bytes:
    """`data` up to the limit of a line, not ending in a part of a character."""
    if len(data) <= MAX_LINE_BYTES:
        return data
    end = MAX_LINE_BYTES
    while end > MAX_LINE_BYTES - 4 and data[end] & 0xC0 == 0x80:
        end -= 1
    return data[:end]
