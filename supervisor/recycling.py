"""Replacing processes that have grown, before the kernel has to.

What counts is private memory: a process that was just forked shares the app with the zygote,
and its resident size says nothing. A process is looked at now and then, with jitter, first by a
cheap figure that is never less than the private one. One that is over its limit twice in a row
is drained and replaced like in any restart by hand: warm, in its turn, and not as a crash.

Where that does not help, since a new process is about as large, it is said once and left.
"""

import random
import time
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from streamd.supervisor.figures import private_bytes, resident_bytes
from streamd.supervisor.states import State

if TYPE_CHECKING:
    from streamd.supervisor.changes import Changes
    from streamd.supervisor.child import Child
    from streamd.supervisor.fleet import Fleet

SAMPLES = 2  # in a row, over the limit
MIN_AGE_CHECKS = 4  # times the period: no process is replaced younger than that
USELESS_SHARE = 0.8  # of the limit: a new process that has so much is no better than the old


class Verdict(Enum):
    """What to do about the size of a process."""

    FINE = "fine"
    RECYCLE = "recycle"
    USELESS = "useless"  # a new one is as large: say so, once


@dataclass(slots=True)
class Growth:
    """The size of one process over its run; computes, and takes `now`."""

    pid: int
    replaces_grown: bool = False  # this run took the place of one that had grown
    due: float = 0.0  # the next look, monotonic
    over: int = 0  # looks in a row
    given_up: bool = False

    def judge(
        self, size_bytes: int, limit_bytes: int, *, age_s: float, check_s: float
    ) -> Verdict:
        """Judge one look at a process of this age."""
        if self.given_up:
            return Verdict.FINE
        if self.replaces_grown and age_s >= check_s:
            self.replaces_grown = False
            if size_bytes > USELESS_SHARE * limit_bytes:
                self.given_up = True
                return Verdict.USELESS
        self.over = self.over + 1 if size_bytes > limit_bytes else 0
        if self.over < SAMPLES or age_s < MIN_AGE_CHECKS * check_s:
            return Verdict.FINE
        self.over = 0
        return Verdict.RECYCLE

    def next_look(self, now: float, check_s: float, random: float) -> None:
        """Look again after about a period; `random` is in [0, 1)."""
        self.due = now + check_s * (0.8 + 0.4 * random)


class Recycling:
    """Looks at the agent processes of a fleet."""

    def __init__(self, fleet: "Fleet", changes: "Changes") -> None:
        self._fleet = fleet
        self._changes = changes
        self._growths: dict[str, Growth] = {}  # process -> its growth
        self._replaced: set[str] = set()  # processes whose next run takes a grown one's place

    def look(self, now: float) -> None:
        """Look at the processes whose turn it is; to be called some times a second."""
        settings, hello = self._fleet.settings, self._fleet.hello
        if settings is None or hello is None:
            return
        highest = settings.max_memory_bytes
        if not highest and not any(group.max_memory_bytes for group in hello.groups):
            return
        for child in self._fleet.agents:
            if child.run is None or child.state is not State.RUNNING:
                continue
            growth = self._growths.get(child.name)
            if growth is None or growth.pid != child.run.pid:
                growth = Growth(child.run.pid, child.name in self._replaced)
                self._replaced.discard(child.name)
                self._growths[child.name] = growth
                growth.next_look(now, settings.memory_check_s, random.random())
            elif now >= growth.due:
                growth.next_look(now, settings.memory_check_s, random.random())
                info = self._fleet.group_info(child)
                limit = (info.max_memory_bytes if info is not None else 0) or highest
                if limit:
                    self._look_at(child, growth, limit, settings.memory_check_s)

    def _look_at(self, child: "Child", growth: Growth, limit: int, check_s: float) -> None:
        assert child.run is not None
        pid = growth.pid
        size_bytes = resident_bytes(pid)
        if size_bytes > USELESS_SHARE * limit:
            size_bytes = private_bytes(pid)
        age_s = time.monotonic() - child.run.started_at
        verdict = growth.judge(size_bytes, limit, age_s=age_s, check_s=check_s)
        if verdict is Verdict.FINE:
            return
        if verdict is Verdict.USELESS:
            self._fleet.note(
                "ERROR",
                "memory",
                f"{child} has {_mib(size_bytes)} of private memory as soon as it runs; its "
                f"limit is {_mib(limit)}: replacing it does not help, so it is left alone: "
                "raise max_memory",
                child.name,
            )
        elif self._changes.is_idle:
            # Else at the next look: one change at a time, so never two at once.
            self._fleet.note(
                "INFO",
                "memory",
                f"{child} has {_mib(size_bytes)} of private memory, over its limit of "
                f"{_mib(limit)}: it is drained and replaced",
                child.name,
            )
            child.recycles += 1
            self._replaced.add(child.name)
            self._changes.restart([child.name], is_told=True)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"
