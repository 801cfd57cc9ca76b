"""Seeing every child's end, known and adopted.

Known children are watched through a pidfd each. Orphans of theirs are adopted, since the master
is a subreaper: they are named, shown, and reaped one by one. `waitpid(-1)` is never called: it
would steal the exit status of a known child.
"""

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from streamd.supervisor import tree
from streamd.supervisor.policy import Exit

ADOPTION_RETRY_S = 0.001
ADOPTION_TRIES = 2_000


@dataclass(frozen=True, slots=True)
class Stray:
    """An orphan of a process of the tree that the master adopted."""

    pid: int
    name: str
    session: int  # where it has not changed it: the pid of the process that it is from
    created_at: float  # unix seconds
    start_ticks: int  # with the pid, its identity
    origin: str  # the process that it is from, by its environment; "" where that says nothing

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


class Reaper:
    """Watches the children of this process."""

    def __init__(self) -> None:
        self.strays: dict[int, Stray] = {}  # pid -> who
        self.reaped_strays = 0
        self._known: dict[
            int, tuple[int, Callable[[Exit], None]]
        ] = {}  # pid -> pidfd, callback
        self._loop = asyncio.get_running_loop()

    def watch(self, pid: int, on_exit: Callable[[Exit], None]) -> int:
        """Call `on_exit` once, when `pid` has ended and is reaped.

        Returns:
            A pidfd, valid until `on_exit` is called.

        Raises:
            ProcessLookupError: There is no such process, not even a zombie.
        """
        fd = os.pidfd_open(pid)
        self._known[pid] = (fd, on_exit)
        self._loop.add_reader(fd, self._on_end, pid, ADOPTION_TRIES)
        return fd

    def _on_end(self, pid: int, tries: int) -> None:
        fd, on_exit = self._known[pid]
        self._loop.remove_reader(fd)
        try:
            result = os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            # It ended before the process between us and it, and is not ours yet.
            if tries > 0:
                self._loop.call_later(ADOPTION_RETRY_S, self._on_end, pid, tries - 1)
                return
            result = None
        del self._known[pid]
        os.close(fd)
        if result is None:
            on_exit(Exit(None, None))
        elif result.si_code == os.CLD_EXITED:
            on_exit(Exit(result.si_status))
        else:
            on_exit(Exit(None, result.si_status))

    def sweep(self, *, spare: Iterable[int] = (), expecting: bool = False) -> None:
        """Reap adopted children that ended and note those that live.

        Args:
            spare: Children that somebody else waits for.
            expecting: A child may be here whose name the zygote has not told yet; leave alone
                what is not known.
        """
        if expecting:
            return
        spared = set(spare)
        alive: dict[int, Stray] = {}
        for pid in tree.children():
            if pid in self._known or pid in spared:
                continue
            found = tree.look_at(pid)
            if found is None:
                continue
            if found.state in "ZX":
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
                self.reaped_strays += 1
                continue
            alive[pid] = self.strays.get(pid) or _describe(found)
        self.strays = alive

    def forget_all(self) -> None:
        """Watch nothing any more, before everything is killed and reaped at once."""
        for fd, _ in self._known.values():
            self._loop.remove_reader(fd)
            os.close(fd)
        self._known.clear()


def _describe(found: tree.Found) -> Stray:
    # Only an instance with orphans needs it, and it is a megabyte of the master's memory.
    import psutil  # noqa: PLC0415

    try:
        process = psutil.Process(found.pid)
        with process.oneshot():
            name, created_at = process.name(), process.create_time()
    except psutil.Error:
        name, created_at = found.command, 0.0
    origin = tree.variable(found.pid, b"STREAMD_AGENT")
    return Stray(found.pid, name, found.session, created_at, found.start_ticks, origin)
