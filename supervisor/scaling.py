"""How many processes a group may have, should have, and which group is next.

Nothing here does I/O or reads a clock: `now` is in monotonic seconds.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from streamd.errors import UsageError
from streamd.wire import Hello

LATE_S = 2.0  # of work waiting: behind
LATE_EVENTS = 10  # fewer are nobody's concern
LEAST_RATE = 0.01  # events a second; with less it stands still
LATE_HOLD_S = 5.0  # behind for so long: more processes
CATCH_UP_S = 30.0  # in which more processes should work off what waits
REST_S = 15.0  # after a change, until its effect is seen
QUIET_S = 0.5  # of work waiting: not behind
QUIET_HOLD_S = 60.0  # too many for so long: one less
SPARE = 0.7  # of what the others could do is what they should have to
GAIN = 1.1  # what more processes must bring
IN_VAIN_S = 600.0  # after they brought less


@dataclass(frozen=True, slots=True)
class Load:
    """A group, as it works at a moment."""

    group: str
    processes: int
    most: int  # as many partitions as it has, at the most
    behind: int = 0  # events
    rate: float = 0.0  # events a second, of all its processes


@dataclass(frozen=True, slots=True)
class Step:
    """A group's next number of processes, and why."""

    processes: int
    reason: str


def most_processes(hello: Hello, group: str) -> int:
    """How many processes of a group can have something to do; 0: there is no such group."""
    info = next((each for each in hello.groups if each.name == group), None)
    if info is None:
        return 0
    read = {topic for agent in info.agents for topic in agent.topics}
    counts = [topic.partitions for topic in hello.topics if topic.name in read]
    counts += [table.partitions for table in hello.tables if table.name in info.tables]
    return max(counts, default=1)


def check_size(hello: Hello, group: str, processes: int) -> None:
    """Let a number of processes pass that a group can have.

    Raises:
        UsageError: There is no such group, or it cannot have so many.
    """
    most = most_processes(hello, group)
    if most == 0:
        names = ", ".join(each.name for each in hello.groups)
        raise UsageError(f"there is no group {group!r}", seen=[f"there is {names}"])
    if not isinstance(processes, int) or processes < 1:
        raise UsageError(f"a group has 1 process or more, not {processes!r}")
    if group == hello.groups[-1].name and processes > 1:
        raise UsageError(
            f"group {group!r} has no agent: its tasks, timers and pages run in one process"
        )
    if processes > most:
        raise UsageError(
            f"{group} cannot have {processes} processes: its topics have {most} "
            f"partition{'s' * (most > 1)}, and a process without one has nothing to do",
            remedy=f"streamd scale {group}={most}, or more partitions for a new topic",
        )


def next_to_grow(loads: Iterable[Load]) -> Load | None:
    """The group furthest behind of those that can have one more; of equals the smallest."""
    able = [load for load in loads if load.processes < load.most]
    return max(able, key=lambda load: (load.behind, -load.processes), default=None)


def next_to_shrink(loads: Iterable[Load]) -> Load | None:
    """The group with most processes of those that have several; of equals the least behind."""
    able = [load for load in loads if load.processes > 1]
    return max(able, key=lambda load: (load.processes, -load.behind), default=None)


@dataclass(slots=True)
class AutoScale:
    """Lets one group's processes follow how far it is behind.

    Up: where it is behind for a while, by as many as catch up soon, at most doubled; taken back
    where that brought nothing, so a group that waits for something else does not grow.
    Down: one less, where the others could do the work with room to spare, by what they were
    seen to do when there was enough of it. What leads up and what leads down lie apart, and
    each must hold for a while.
    """

    capacity: float = 0.0  # events a second that one process was seen to do; 0: not known
    _late_since: float | None = None
    _quiet_since: float | None = None
    _changed_at: float = float("-inf")
    _before: tuple[int, float] | None = None  # processes and rate before the last step up
    _in_vain_until: float = float("-inf")

    def decide(self, load: Load, *, least: int, most: int, now: float) -> Step | None:
        """What to do at this look, one a second or so; None: nothing."""
        if load.processes < least or load.processes > most:
            return self._go(
                load, min(max(load.processes, least), most), now, "its bounds changed"
            )
        late = load.rate > LEAST_RATE and load.behind > max(LATE_EVENTS, load.rate * LATE_S)
        if late:
            self._late_since = now if self._late_since is None else self._late_since
        else:
            self._late_since = None
        if now - self._changed_at < REST_S:
            return None
        if self._late_since is not None and now - self._late_since >= LATE_HOLD_S:
            self._quiet_since = None
            self.capacity = load.rate / load.processes
            return self._up(load, most, now)
        return self._down(load, least, now)

    def _up(self, load: Load, most: int, now: float) -> Step | None:
        work_s = load.behind / load.rate
        before, self._before = self._before, None
        if before is not None and load.rate < GAIN * before[1]:
            self._in_vain_until = now + IN_VAIN_S
            return self._go(load, before[0], now, "more processes did not help")
        if load.processes >= most or now < self._in_vain_until:
            return None
        self._before = load.processes, load.rate
        more = math.ceil(load.behind / CATCH_UP_S / self.capacity)
        return self._go(
            load,
            min(most, 2 * load.processes, load.processes + more),
            now,
            f"{load.behind} events behind, {work_s:.0f} s of work",
        )

    def _down(self, load: Load, least: int, now: float) -> Step | None:
        could = self.capacity * (load.processes - 1) * SPARE
        quiet = load.behind <= max(LATE_EVENTS, load.rate * QUIET_S)
        if quiet:
            self._before = None  # the last step up has helped
        if load.processes == least or not quiet or (self.capacity and load.rate > could):
            self._quiet_since = None
            return None
        self._quiet_since = now if self._quiet_since is None else self._quiet_since
        if now - self._quiet_since < QUIET_HOLD_S:
            return None
        fewer = load.processes - 1
        self._before = None
        return self._go(
            load, fewer, now, f"{load.rate:.0f} events/s are few for {load.processes}"
        )

    def _go(self, load: Load, processes: int, now: float, reason: str) -> Step | None:
        self._changed_at = now
        self._late_since = self._quiet_since = None
        return Step(processes, reason) if processes != load.processes else None
