"""Whose turn it is to write to the log.

Two flocks. Whoever holds `next` is first in the queue; whoever holds `mine` writes. Taking
`next`, then `mine`, then giving up `next` lets the kernel queue the waiters fairly, where
SQLite's own busy handler starves all but one. The kernel gives both up when a process dies.

The holder writes its pid and the number of its turn into `mine`, so that others can say who
does not move.
"""

import contextlib
import fcntl
import os
from pathlib import Path

from streamd.errors import BrokerError


class Turnstile:
    """One process's way through; used by one thread, opened after the last fork.

    The descriptors are not inherited by programs that this process starts.

    Raises:
        BrokerError: The data directory is not there, or may not be written.
    """

    def __init__(self, datadir: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            self._next = os.open(datadir / "turnstile.next", flags, 0o600)
            self._mine = os.open(datadir / "turnstile.mine", flags, 0o600)
        except OSError as error:
            raise BrokerError(
                f"the data directory {datadir} cannot be used: {error.strerror}",
                remedy="check that it is there and that its owner may write, or choose another "
                "with --datadir",
            ) from error
        self._pid = os.getpid()
        self._turns = 0

    def enter(self) -> None:
        """Wait for this process's turn. Blocks, without the interpreter's lock."""
        fcntl.flock(self._next, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._mine, fcntl.LOCK_EX)
        finally:
            fcntl.flock(self._next, fcntl.LOCK_UN)
        self._turns += 1
        # On a full disk nobody is told who has the turn; it is had all the same.
        with contextlib.suppress(OSError):
            os.pwrite(self._mine, b"%-12d%-20d" % (self._pid, self._turns), 0)

    def leave(self) -> None:
        """Give the turn to who waits."""
        fcntl.flock(self._mine, fcntl.LOCK_UN)

    def last_holder(self) -> int:
        """The pid that had the last turn; while somebody waits, who has it."""
        return self._read()[0]

    def turn(self) -> tuple[int, int] | None:
        """The pid that has the turn now, and which of its turns that is; None: nobody has."""
        try:
            fcntl.flock(self._mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._read()
        fcntl.flock(self._mine, fcntl.LOCK_UN)
        return None

    def _read(self) -> tuple[int, int]:
        words = os.pread(self._mine, 32, 0).split()
        return (int(words[0]), int(words[1])) if len(words) == 2 else (0, 0)

    def close(self) -> None:
        os.close(self._next)
        os.close(self._mine)
