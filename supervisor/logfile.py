"""A log file: written by whole lines, exchanged for a new one by size and by age.

`log` is the newest, `log.1` the one before, and so on. The order of an exchange: the oldest is
removed, each other moves up by one, a new file is opened; a crash between two steps loses
nothing. A file that somebody else has moved away or cut (logrotate) is left to him.
"""

import contextlib
import os
import re
import time

RETRY_S = 60.0  # after an exchange that failed

_JSON_TIME = re.compile(rb'"t":(\d+(?:\.\d*)?)')


class LogFile:
    """The file at the end of the log. Writing blocks as long as the file system does."""

    is_terminal = False

    def __init__(
        self, path: str, *, max_size_bytes: int = 0, max_age_s: float = 0.0, keep: int = 0
    ) -> None:
        """Open the file, made if it is not there.

        Args:
            max_size_bytes: A file that would become larger is exchanged; 0: no limit.
            max_age_s: So is one whose first line is older; 0: no limit.
            keep: How many old files there are at most; with 0 the file is emptied.

        Raises:
            OSError: The file cannot be opened.
        """
        self.problem: str | None = None
        self._path = path
        self._max_size_bytes = max_size_bytes
        self._max_age_s = max_age_s
        self._keep = keep
        self._lost = 0  # lines, not told yet
        self._why_lost = ""
        self._is_torn = False  # the file ends in a part of a line
        self._retry_at = 0.0  # monotonic
        self._fd = -1
        self._size_bytes = 0
        self._began_at = 0.0  # unix seconds
        self.reopen()

    def write(self, data: bytes, lines: int) -> None:
        """Write lines, all of them or none; those that the disk does not take are counted."""
        if self._is_due(len(data)):
            self._exchange()
        if self._lost:
            text = f"({self._lost} log lines were lost here: {self._why_lost})\n"
            data = b"\n" * self._is_torn + text.encode() + data
        written_bytes = 0
        try:
            while written_bytes < len(data):
                written_bytes += os.write(self._fd, data[written_bytes:])
        except OSError as error:
            self._take_back(written_bytes)
            self._lost += lines
            self._why_lost = error.strerror or str(error)
            self.problem = (
                f"the log file {self._path} cannot be written: {self._why_lost}; "
                "what runs goes on"
            )
            return
        self._size_bytes += written_bytes
        if self._lost:
            self._lost, self._is_torn, self.problem = 0, False, None

    def reopen(self) -> None:
        """Open the file anew, as after a logrotate.

        Raises:
            OSError: It cannot be opened; the one that was open is written on.
        """
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        before, self._fd = self._fd, os.open(self._path, flags, 0o640)
        if before >= 0:
            os.close(before)
        self._size_bytes = os.fstat(self._fd).st_size
        self._began_at = time.time()
        if self._size_bytes and self._max_age_s:
            self._began_at = _began_at(self._path)
        self._is_torn = False

    def flush(self, timeout_s: float) -> None:
        """Nothing: what is written is with the kernel."""

    def _take_back(self, written_bytes: int) -> None:
        """Remove the part of lines that was written."""
        if not written_bytes:
            return
        with contextlib.suppress(OSError):
            if os.fstat(self._fd).st_size == self._size_bytes + written_bytes:
                os.ftruncate(self._fd, self._size_bytes)
                return
        self._size_bytes += written_bytes
        self._is_torn = True

    # Exchanging.

    def _is_due(self, more_bytes: int) -> bool:
        if not self._size_bytes:
            return False
        if self._max_size_bytes and self._size_bytes + more_bytes > self._max_size_bytes:
            return True
        return bool(self._max_age_s) and time.time() - self._began_at >= self._max_age_s

    def _exchange(self) -> None:
        if time.monotonic() < self._retry_at:
            return
        try:
            if self._is_ours():
                self._move_up()
            self.reopen()
        except OSError as error:
            self._retry_at = time.monotonic() + RETRY_S
            self.problem = (
                f"the log file {self._path} cannot be exchanged for a new one: "
                f"{error.strerror}; it grows on"
            )
            return
        self._retry_at = 0.0
        if not self._lost:
            self.problem = None

    def _is_ours(self) -> bool:
        """False where somebody has moved the file away, or cut it to less than is due."""
        with contextlib.suppress(FileNotFoundError):
            there, here = os.stat(self._path), os.fstat(self._fd)
            is_same = (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
            return is_same and here.st_size >= self._size_bytes
        return False

    def _move_up(self) -> None:
        if self._keep == 0:
            os.ftruncate(self._fd, 0)
            return
        for number in range(self._keep, 0, -1):
            older = self._path if number == 1 else f"{self._path}.{number - 1}"
            with contextlib.suppress(FileNotFoundError):
                os.rename(older, f"{self._path}.{number}")
        # There are more where fewer are to be kept than before.
        number = self._keep + 1
        while os.path.lexists(f"{self._path}.{number}"):
            os.unlink(f"{self._path}.{number}")
            number += 1


def _began_at(path: str) -> float:
    """When the first line of a log file was written, in unix seconds; as far as it says so."""
    with open(path, "rb") as file:
        head = file.read(4096).partition(b"\n")[0]
    if found := _JSON_TIME.search(head):
        return float(found[1])
    with contextlib.suppress(ValueError):
        return time.mktime(
            time.strptime(head[:19].decode(errors="replace"), "%Y-%m-%d %H:%M:%S")
        )
    return os.stat(path).st_mtime
