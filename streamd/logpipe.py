"""The writing end of a log pipe: what a process logs and prints, without waiting for a reader.

The master reads the other end. One that is slow, or stopped, must not stop an agent: what does
not fit the pipe is dropped and counted, and what fits next is preceded by a line that says how
much is missing. Log records and prints of a process go through one `PipeWriter`, so that no
line of one is cut by the other. What goes around Python (C code, spawned processes) writes to
the pipe itself, and waits while it is full.
"""

import contextlib
import io
import logging
import os
import select
import sys
import threading
import time
from typing import Any, BinaryIO, cast

import msgspec

RECORD_START = "\x1e"
"""First character of a log record's line; a print of the user's has none."""

MAX_RECORD_BYTES = 48_000
"""A longer record is cut: the master takes lines of 64 KiB, which an empty pipe holds."""

MAX_REST_BYTES = 64 * 1024
POLL_PIECE_BYTES = 4096  # a pipe that polls writable takes so much at once
FLUSH_POLL_S = 0.002


def pipe_line(at: float, level: str, logger: str, text: str) -> str:
    """A log record as one line of the pipe, without its line feed; a very long text is cut."""
    # msgspec refuses lone surrogates, which file names and user data may hold.
    whole = text.encode("utf-8", "backslashreplace").decode()
    shown, kept = whole, len(whole)
    while len(line := _encoded(at, level, logger, shown)) > MAX_RECORD_BYTES:
        kept = min(kept - 1, kept * MAX_RECORD_BYTES // len(line))
        shown = f"{whole[:kept]}… ({len(whole) - kept} characters more)"
    return RECORD_START + line.decode()


def _encoded(at: float, level: str, logger: str, text: str) -> bytes:
    return msgspec.json.encode({"t": at, "l": level, "n": logger, "m": text})


class PipeWriter:
    """Writes to a log pipe and never waits, except in `flush`."""

    def __init__(self, fd: int) -> None:
        self.dropped = 0  # lines, not told yet
        self._fd = -1
        self._poll: select.poll | None = None
        self._lock = threading.RLock()  # a signal handler may print while its thread does
        self._rest = b""  # of a line that the pipe took in part
        self._is_open = False  # a line was begun and has no end yet
        self._is_skipping = False  # the beginning of a line was dropped; its end is, too
        self.attach(fd)
        os.register_at_fork(after_in_child=self._begin_anew)

    def attach(self, fd: int) -> None:
        """Write to the pipe behind `fd` from now on; `fd` stays the caller's."""
        before, self._poll = self._fd, None
        try:
            # O_NONBLOCK belongs to the open file, which spawned processes share: a second
            # opening of the same pipe has its own.
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_APPEND | os.O_CLOEXEC
            self._fd = os.open(f"/proc/self/fd/{fd}", flags)
        except OSError:  # a socket, or a pipe of another user's
            self._fd = os.dup(fd)
            self._poll = select.poll()
            self._poll.register(self._fd, select.POLLOUT)
        if before >= 0:
            os.close(before)
        self._begin_anew()

    def write(self, data: bytes) -> None:
        """Write lines, the last of which may lack its end, or drop them."""
        with self._lock:
            if self._is_skipping:
                end = data.find(b"\n") + 1
                self._is_skipping = end == 0
                data = data[end:] if end else b""
            if not data:
                return
            if not self.push():
                self._drop(data)
                return
            taken = self._put(data)
            if taken == len(data):
                self._is_open = not data.endswith(b"\n")
            elif taken == 0:
                self._drop(data)
            else:
                self._keep_rest(data, taken)

    def push(self) -> bool:
        """Write what is left of a line and of what is to be told; True if nothing is."""
        with self._lock:
            if self._rest:
                self._rest = self._rest[self._put(self._rest) :]
                if self._rest:
                    return False
            if self.dropped:
                text = f"{self.dropped} log lines were dropped here: the log pipe was full"
                notice = pipe_line(time.time(), "WARNING", __name__, text).encode() + b"\n"
                if self._is_open:
                    notice = b"\n" + notice
                taken = self._put(notice)
                if taken == 0:
                    return False
                self.dropped, self._is_open = 0, False
                self._rest = notice[taken:]
            return not self._rest

    def flush(self, timeout_s: float) -> bool:
        """Wait until all is written, at most `timeout_s`; False if it is not."""
        deadline = time.monotonic() + timeout_s
        while not self.push():
            if time.monotonic() > deadline:
                return False
            time.sleep(FLUSH_POLL_S)
        return True

    def close(self) -> None:
        """Give the pipe back; what is written from now on is lost."""
        with self._lock:
            os.close(self._fd)
            self._fd = -1

    def _begin_anew(self) -> None:
        # In a forked child the lock may be held by a thread that is not there.
        self._lock = threading.RLock()
        self.dropped, self._rest, self._is_open, self._is_skipping = 0, b"", False, False

    def _drop(self, data: bytes) -> None:
        whole = data.endswith(b"\n")
        self.dropped += data.count(b"\n") + (not whole)
        self._is_skipping = not whole

    def _keep_rest(self, data: bytes, taken: int) -> None:
        """Keep the line that was taken in part; drop what follows it."""
        end = data.find(b"\n", taken) + 1 or len(data)
        self._rest = data[taken:end]
        self._is_open = not self._rest.endswith(b"\n")
        if len(self._rest) > MAX_REST_BYTES:
            # The master cuts such a line anyway.
            self._rest = self._rest[:MAX_REST_BYTES] + b"\n" * (not self._is_open)
        if end < len(data):
            self._drop(data[end:])

    def _put(self, data: bytes) -> int:
        taken = 0
        with contextlib.suppress(OSError):  # it is full, or nobody reads it any more
            while taken < len(data) and self._fd >= 0:
                piece = data[taken:] if taken else data
                if self._poll is not None:
                    if not self._poll.poll(0):
                        break
                    piece = piece[:POLL_PIECE_BYTES]
                taken += os.write(self._fd, piece)
        return taken


class PipeHandler(logging.Handler):
    """Writes log records to a log pipe."""

    def __init__(self, writer: PipeWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode() + b"\n"
        except Exception:
            self.handleError(record)
            return
        self._writer.write(line)


class PipePrints(io.RawIOBase):
    """What lies below `sys.stdout` and `sys.stderr` of a process with a log pipe."""

    def __init__(self, writer: PipeWriter, fd: int) -> None:
        super().__init__()
        self._writer = writer
        self._fd = fd

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        """The standard descriptor, for processes that are spawned with it."""
        return self._fd

    def write(self, data: Any) -> int:
        taken = bytes(data)
        self._writer.write(taken)
        return len(taken)


def prints_to(writer: PipeWriter, fd: int) -> io.TextIOWrapper:
    """A text stream that writes through `writer`, a line at a time."""
    raw = cast(BinaryIO, PipePrints(writer, fd))
    return io.TextIOWrapper(
        raw, encoding="utf-8", errors="backslashreplace", line_buffering=True
    )


def redirect_prints(writer: PipeWriter) -> None:
    """Let `sys.stdout` and `sys.stderr` write through `writer`."""
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = prints_to(writer, fd)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
