"""A process that should run, and the run of it that there is now.

A `Child` is a place in the fleet and lives as long as the master; its `Run` is one process.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from streamd.instance import Identity, identify
from streamd.link import Link
from streamd.supervisor.logpipe import LogPipe
from streamd.supervisor.notify import child_environment
from streamd.supervisor.pages import BeatPage, DumpFile
from streamd.supervisor.policy import Ending, HangWatch, Restarts
from streamd.supervisor.states import Event, State, after
from streamd.wire import Failing, Lags, LogState, Owns, Plan, Stats

if TYPE_CHECKING:
    from streamd.supervisor.imports import Code


@dataclass(slots=True)
class Run:
    """One process, from its spawn to the moment its exit is dealt with."""

    pid: int
    pidfd: int
    identity: Identity
    logs: LogPipe
    started_at: float = field(default_factory=time.monotonic)
    since: float = field(default_factory=time.time)
    link: Link | None = None
    page: BeatPage | None = None
    dump: DumpFile | None = None
    plan: Plan | None = None
    link_fd: int = -1  # the descriptor behind `link`, of a process that is watched by it
    hangs: HangWatch | None = None
    starts: HangWatch | None = None  # until it is ready
    killed_for: str | None = None  # why we killed it, when it did not deserve to be asked
    killed_as: Ending | None = None
    killed_at: float = 0.0  # when it was first sent KILL, monotonic
    held_in: str = ""  # where the kernel holds it, though it was killed
    stats: Stats | None = None
    failing: Failing | None = None
    owns: dict[str, Owns] = field(default_factory=dict)  # group -> what it has of it
    draining: list[str] = field(default_factory=list)
    log_state: LogState | None = None  # the log process's last word about its file
    lags: Lags | None = None  # its last word on how far each agent is, on Kafka
    heard_at: float = 0.0  # when its last message came, monotonic
    taken_at: float = 0.0  # when it had last taken all that was sent to it, monotonic

    def signal(self, number: int) -> None:
        """Send a signal to this very process; to one that has ended, nothing."""
        if number == signal.SIGKILL:
            self.killed_at = self.killed_at or time.monotonic()
        with contextlib.suppress(ProcessLookupError, OSError):
            signal.pidfd_send_signal(self.pidfd, number)
            if number in (signal.SIGTERM, signal.SIGQUIT):
                # What is stopped takes no signal but this and KILL.
                signal.pidfd_send_signal(self.pidfd, signal.SIGCONT)

    @property
    def settled(self) -> int:
        """Events settled in this run; the page tells it even after the end."""
        return self.page.settled if self.page is not None else 0

    def close(self) -> None:
        """Give back what is left of an ended process."""
        self.logs.let_go()
        if self.link is not None:
            self.link.close()
        if self.page is not None:
            self.page.close()
        if self.dump is not None:
            self.dump.close()


@dataclass(slots=True)
class Totals:
    """Counters of a child over all its runs that ended."""

    events: dict[str, int] = field(default_factory=dict)  # agent -> events settled
    errors: int = 0
    retries: int = 0
    dead_letters: int = 0

    def add(self, stats: "Stats | Totals") -> None:
        """Take the last word of a run that ended, or all of a place that is no more."""
        for agent, count in stats.events.items():
            self.events[agent] = self.events.get(agent, 0) + count
        self.errors += stats.errors
        self.retries += stats.retries
        self.dead_letters += stats.dead_letters


class Child:
    """A process that should run."""

    def __init__(self, name: str, kind: str, group: str = "") -> None:
        self.name = name
        self.kind = kind  # "zygote" | "log" | "web" | "agent" | "canary"
        self.group = group
        self.state = State.STOPPED
        self.since = time.time()
        self.run: Run | None = None
        self.restarts = 0  # by the policy
        self.starts = 0  # processes that there were
        self.budget = Restarts()
        self.careful = False  # the last death was of the crash class
        self.hangs = 0  # runs that were ended because they hung
        self.recycles = 0  # runs that were replaced because they had grown
        self.given_up_for = ""  # why it is FATAL
        self.last_lines: list[str] = []  # of the run after which it was given up
        self.retry_at: float | None = None  # monotonic
        self.last_exit: str | None = None
        self.exit_code = 0
        self.failing: Failing | None = None  # the last reason that a run gave
        self.totals = Totals()
        self.code: Code | None = None  # what it is forked from; None: what the fleet runs
        self._changed = asyncio.Event()

    def __str__(self) -> str:
        return f"{self.name} (pid {self.run.pid})" if self.run else self.name

    def move(self, event: Event) -> None:
        """Go to the next state.

        Raises:
            StateError: There is none.
        """
        self.state = after(self.state, event)
        self.since = time.time()
        self.retry_at = None
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_change(self) -> None:
        """Wait until the state has changed."""
        await self._changed.wait()

    async def wait_state(self, *wanted: State) -> State:
        """Wait until the state is one of `wanted`; no limit of time."""
        while self.state not in wanted:
            await self._changed.wait()
        return self.state


def spawn(
    program: Sequence[str],
    arguments: Sequence[str],
    link_end: socket.socket,
    logs: LogPipe,
    *,
    keep: int = -1,
) -> int:
    """Start `python program… LINK_FD arguments…` and return its pid.

    The program is `-m` and a module, or the path of a script.

    It gets the link's end and, with `keep`, one more descriptor under the same numbers;
    standard output and error are its log pipe, and the tree's lock is inherited. The ends that
    it has are closed here.

    Raises:
        OSError: It cannot be started.
    """
    link_end.set_inheritable(True)
    if keep >= 0:
        os.set_inheritable(keep, True)
    # -P: the working folder is the user's, and a file in it may have any name.
    command = [sys.executable, "-P", *program, str(link_end.fileno()), *arguments]
    try:
        return os.posix_spawn(
            sys.executable,
            command,
            child_environment(),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, logs.write_end, 1),
                (os.POSIX_SPAWN_DUP2, logs.write_end, 2),
            ],
            setsigmask=(),
            setsigdef=[*(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})],
        )
    finally:
        if keep >= 0:
            os.set_inheritable(keep, False)
        link_end.close()
        logs.close_write_end()


def identity_of(pid: int) -> Identity:
    """Who a child is that may have ended already.

    Its pid cannot be another's: it is reaped later, by us.
    """
    try:
        return identify(pid)
    except ProcessLookupError:
        return Identity(pid, 0, "")


def handles(pid: int, number: int) -> bool:
    """True if the process has a handler for a signal that would end it otherwise."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = int(text.partition("\nSigCgt:")[2].split()[0], 16)
    return bool(caught >> (number - 1) & 1)
