"""A terminal, pipe or socket as the end of the log. Writing to it never blocks."""

import asyncio
import contextlib
import errno
import os
import socket
import stat
import time
from collections import deque

MAX_PENDING_BYTES = 4 * 1024 * 1024
FLUSH_POLL_S = 0.002

# Of the others, a terminal that was closed is the most frequent: nobody misses anything.
_PROBLEMS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class LogStream:
    """Where log lines end that go to what somebody reads, or has redirected.

    What it does not take is kept up to a bound; then lines are lost, counted, and told.
    """

    def __init__(self, fd: int) -> None:
        """Write to what is behind `fd`, which stays the caller's."""
        self.problem: str | None = None
        self._lost = 0  # lines, not told yet
        self._is_begun = False  # the first piece that is pending was written in part
        self._is_torn = False  # so was a line whose rest is lost
        self._pending: deque[tuple[bytes, int]] = deque()  # pieces of whole lines, their number
        self._pending_bytes = 0
        self._is_waiting = False
        self._is_socket = False
        self._fd = self._open_again(fd)
        self.is_terminal = os.isatty(self._fd)

    def write(self, data: bytes, lines: int) -> None:
        """Write lines, or keep them for later, or drop them when too much is kept."""
        if self._pending_bytes + len(data) > MAX_PENDING_BYTES:
            self._lost += lines
            return
        if self._lost and not self._pending:
            notice = f"({self._lost} log lines were lost here)\n".encode()
            self._keep(b"\n" * self._is_torn + notice, self._lost)
            self._lost, self._is_torn = 0, False
        self._keep(data, lines)
        self._push()

    def reopen(self) -> None:
        """Nothing: what is no file cannot be moved away."""

    def flush(self, timeout_s: float) -> None:
        """Write what is pending; blocks for at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self._pending and time.monotonic() < deadline:
            self._push()
            if self._pending:
                time.sleep(FLUSH_POLL_S)

    def _keep(self, data: bytes, lines: int) -> None:
        self._pending.append((data, lines))
        self._pending_bytes += len(data)

    def _push(self) -> None:
        while self._pending:
            data, lines = self._pending[0]
            try:
                taken = self._write_some(data)
            except BlockingIOError:
                self._wait_writable()
                return
            except OSError as error:
                if error.errno in _PROBLEMS:
                    self.problem = f"the log cannot be written: {error.strerror}"
                self._is_torn, self._is_begun = self._is_torn or self._is_begun, False
                self._lost += sum(lines for _, lines in self._pending)
                self._pending.clear()
                self._pending_bytes = 0
                return
            self.problem = None
            self._pending_bytes -= taken
            self._is_begun = taken < len(data)
            if self._is_begun:
                self._pending[0] = data[taken:], lines
            else:
                self._pending.popleft()

    def _write_some(self, data: bytes) -> int:
        if self._is_socket:
            with socket.socket(fileno=os.dup(self._fd)) as end:
                return end.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        return os.write(self._fd, data)

    def _wait_writable(self) -> None:
        if self._is_waiting:
            return
        with contextlib.suppress(RuntimeError, OSError):  # no loop runs: `flush` tries again
            asyncio.get_running_loop().add_writer(self._fd, self._on_writable)
            self._is_waiting = True

    def _on_writable(self) -> None:
        asyncio.get_running_loop().remove_writer(self._fd)
        self._is_waiting = False
        self._push()

    def _open_again(self, fd: int) -> int:
        mode = os.fstat(fd).st_mode
        self._is_socket = stat.S_ISSOCK(mode)
        # A file never blocks, and a second opening would have a place of its own in it: what a
        # script writes after us would be written over our lines.
        if not self._is_socket and not stat.S_ISREG(mode):
            # O_NONBLOCK belongs to the open file, which is shared with the user's shell: a
            # second opening of the same thing has flags of its own.
            flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            with contextlib.suppress(OSError):
                return os.open(f"/proc/self/fd/{fd}", flags)
        return os.dup(fd)
