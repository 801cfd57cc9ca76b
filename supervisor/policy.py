"""What becomes of a process that ended, and in which order things start and stop.

Nothing here reads a clock, sends a signal or rolls dice of its own: `now` (monotonic seconds)
and the random numbers are arguments.
"""

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from streamd.wire import GroupInfo, Suspect

BUDGET_CRASHES = 5
BUDGET_WINDOW_S = 60.0
STABLE_S = 10.0
MAX_DELAY_S = 60.0
FIRST_DELAY_S = 0.25
DEATHS_TO_PARK = 3
MAX_PARKED = 100
PARKED_IN_ROW = 3

# A run shorter than this has at best done again what the one before it had done.
PROGRESS_MIN_S = 1.0

# How a process ends that somebody else ended, and not its own fault.
_FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


class Ending(Enum):
    """Why a run ended, as far as a restart depends on it."""

    CRASH = "crash"
    EARLY = "ended by itself"  # with exit code 0, which nobody had asked for
    HANG = "hang"
    OUT_OF_MEMORY = "out of memory"
    OUTSIDE = "ended from outside"
    DEPENDENCY = "dependency"  # a broker that cannot be reached
    PERMANENT = "permanent"  # nothing that a restart would change


class RestartType(Enum):
    """When a process is started again after it ended by itself; OTP's three."""

    PERMANENT = "permanent"  # always
    TRANSIENT = "transient"  # unless it ended with exit code 0
    TEMPORARY = "temporary"  # never


class Strategy(Enum):
    """What is restarted with a process that died; OTP's three, over groups."""

    ONE_FOR_ONE = "one_for_one"  # nothing
    ONE_FOR_ALL = "one_for_all"  # the processes of all groups
    REST_FOR_ONE = "rest_for_one"  # those of the groups that start after its own


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended: its exit code, or the signal that ended it."""

    code: int | None
    signal: int | None = None

    def __str__(self) -> str:
        if self.signal is not None:
            return f"was ended by {signal_name(self.signal)}"
        return f"exited with {self.code}"


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with a process that ended: start it again, after a while, or not.

    One that is not restarted is FATAL, or STOPPED when it is `done`, as its restart type wants.
    """

    restart: bool
    delay_s: float
    reason: str
    done: bool = False
    probe: bool = False  # FATAL, but worth another try after a long time


def signal_name(number: int) -> str:
    """SIGKILL for 9; "signal 40" where there is no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def classify(exit: Exit, *, out_of_memory: bool = False) -> Ending:
    """Why a process ended that nobody here had asked to, and nobody here killed.

    Args:
        out_of_memory: The kernel killed something for lack of memory since the last look.
    """
    if exit.signal is not None:
        if exit.signal == signal.SIGKILL and out_of_memory:
            return Ending.OUT_OF_MEMORY
        return Ending.OUTSIDE if exit.signal in _FROM_OUTSIDE else Ending.CRASH
    if exit.code == 0:
        return Ending.EARLY
    if exit.code == 78:
        return Ending.PERMANENT
    if exit.code == 69:
        return Ending.DEPENDENCY
    return Ending.CRASH


def is_crash(ending: Ending) -> bool:
    """True if the event in work may be what ended the process."""
    return ending in {Ending.CRASH, Ending.EARLY, Ending.HANG, Ending.OUT_OF_MEMORY}


@dataclass(slots=True)
class Restarts:
    """The restart budget of one process; keyed on progress, so no crash loop is endless."""

    crashes: list[float] = field(default_factory=list)  # moments, since the last progress
    attempt: int = 0  # restarts since the last stable run
    parked_in_row: int = 0  # events given up with no healthy one between them
    probing: bool = False  # this run is the one more try of what was given up

    def decide(
        self,
        ending: Ending,
        *,
        now: float,
        uptime_s: float,
        settled: int,
        random: float,
        type: RestartType = RestartType.PERMANENT,
    ) -> Decision:
        """What to do after a run of `uptime_s` that settled `settled` events.

        Args:
            random: A number in [0, 1), for the jitter.
        """
        if type is RestartType.TEMPORARY:
            return Decision(False, 0.0, "restart='temporary'", done=True)
        if type is RestartType.TRANSIENT and ending is Ending.EARLY:
            return Decision(False, 0.0, "it was done: restart='transient'", done=True)
        progressed = settled > 0 and uptime_s >= PROGRESS_MIN_S
        if settled > 0:
            self.parked_in_row = 0
        if progressed or uptime_s >= STABLE_S:
            self.attempt = 0
        if progressed:
            self.crashes.clear()
        if ending is Ending.PERMANENT:
            return Decision(False, 0.0, "a restart would change nothing")
        if ending is Ending.OUTSIDE:
            return Decision(True, 0.0, "not its fault")
        if ending is not Ending.DEPENDENCY:
            if self.probing and not progressed and uptime_s < STABLE_S:
                return Decision(False, 0.0, "one more try failed too", probe=True)
            self.probing = False
            self.crashes = [at for at in self.crashes if now - at < BUDGET_WINDOW_S]
            self.crashes.append(now)
            if len(self.crashes) >= BUDGET_CRASHES:
                span_s = now - self.crashes[0]
                return Decision(
                    False,
                    0.0,
                    f"{len(self.crashes)} crashes in {span_s:.0f} s without progress",
                    probe=True,
                )
        self.attempt += 1
        if self.attempt == 1 and ending is not Ending.DEPENDENCY:
            return Decision(True, 0.0, "first restart")
        highest = min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self.attempt, 30))
        return Decision(True, random * highest, f"try {self.attempt}")

    def blame_event(self) -> None:
        """The crashes were an event's fault, which is parked now.

        Not for ever: where one event after the other takes the process down, they are not
        to blame, and the dead letters are not the place for all of them.
        """
        self.parked_in_row += 1
        if self.parked_in_row <= PARKED_IN_ROW:
            self.crashes.clear()
            self.attempt = 0

    def forgive(self) -> None:
        """Begin anew: a person asked for the process."""
        self.crashes.clear()
        self.attempt = 0
        self.probing = False


Place = tuple[str, str, int, int]  # agent, topic, partition, position


@dataclass(slots=True)
class Suspects:
    """Which events took the processes of a group down, and how often.

    A process that is not careful writes its place only now and then, so its death counts for an
    event not known yet: the one that the first careful death names.
    """

    deaths: dict[Place, int] = field(default_factory=dict)
    parked: list[Suspect] = field(default_factory=list)
    _unknown: int = 0

    def on_death(self, place: Place | None, *, careful: bool) -> Suspect | None:
        """Count a death of the crash class; the event that is parked from now on, if any."""
        if not careful:
            self._unknown = 1
            return None
        if place is None:
            return None
        count = self.deaths.get(place, 0) + 1 + self._unknown
        self._unknown = 0
        self.deaths[place] = count
        if count < DEATHS_TO_PARK:
            return None
        del self.deaths[place]
        agent, topic, partition, position = place
        suspect = Suspect(agent, topic, partition, position, count)
        self.parked = [*self.parked[-(MAX_PARKED - 1) :], suspect]
        return suspect


@dataclass(slots=True)
class HangWatch:
    """Judges the signs of life of one run, by two bad looks in a row. A limit of 0: never."""

    limit_s: float
    armed_at: float = 0.0  # beats are not asked for before that
    _bad: int = 0
    _clear_until: float = 0.0  # the last beat counts until then

    def is_clear(self, now: float) -> bool:
        """True while a beat that was judged is recent enough: there is no need to look."""
        return now < self._clear_until

    def is_hung(self, beat: float, now: float) -> bool:
        """Judge one look; to be called at each look, with the moment of the last beat."""
        late_s = now - max(beat, self.armed_at)
        if beat <= 0.0 or late_s <= self.limit_s or self.limit_s <= 0.0:
            self._bad = 0
            self._clear_until = beat + self.limit_s if beat > 0.0 else 0.0
            return False
        self._bad += 1
        return self._bad >= 2

    def forgive(self, now: float) -> None:
        """Count from `now`: whoever judges was itself late, stopped or asleep."""
        self.armed_at = now
        self._bad = 0


@dataclass(slots=True)
class LateWatch:
    """Notices that the master itself did not run: a stop, a suspended machine, a slow turn."""

    period_s: float
    _due: float = 0.0
    _asleep_s: float = 0.0  # how far CLOCK_BOOTTIME is ahead of CLOCK_MONOTONIC

    def was_late(self, now: float, boottime: float) -> bool:
        """True if this look comes a period or more too late, or the machine slept."""
        late = self._due > 0.0 and now > self._due + self.period_s
        asleep_s = boottime - now
        slept = self._due > 0.0 and asleep_s > self._asleep_s + self.period_s
        self._due = now + self.period_s
        self._asleep_s = asleep_s
        return late or slept


def start_order(groups: Sequence[str]) -> list[str]:
    """Sinks first, so that what a source sends is read; `groups` has sources first."""
    return list(reversed([name for name in groups if name != "app"])) + [
        name for name in groups if name == "app"
    ]


def stop_order(groups: Sequence[str]) -> list[str]:
    """Sources first; tasks, timers and pages (`app`) are the first of the sources.

    >>> stop_order(["split", "count", "app"])
    ['app', 'split', 'count']
    """
    return list(reversed(start_order(groups)))


def stop_ranks(groups: Sequence[GroupInfo]) -> list[list[str]]:
    """The groups that are stopped together, in the order of `stop_order`.

    A group waits for those that send to it or read a table of it, as far as is known; of groups
    that need each other the first is stopped first.

    Args:
        groups: All groups, sources first.
    """
    readers: dict[str, set[str]] = {}  # topic -> groups
    for group in groups:
        for agent in group.agents:
            for topic in agent.topics:
                readers.setdefault(topic, set()).add(group.name)
    holders = {table: group.name for group in groups for table in group.tables}
    needs: dict[str, set[str]] = {group.name: set() for group in groups}
    for group in groups:
        for agent in group.agents:
            needs[group.name].update(*(readers.get(topic, ()) for topic in agent.sends))
            needs[group.name] |= {holders[table] for table in agent.tables if table in holders}
        needs[group.name].discard(group.name)
    left = stop_order([group.name for group in groups])
    ranks = []
    while left:
        if left[0] == "app":
            # What it needs is not known.
            rank = left[:1]
        else:
            needed: set[str] = set().union(*(needs[name] for name in left))
            rank = [name for name in left if name not in needed] or left[:1]
        ranks.append(rank)
        left = [name for name in left if name not in rank]
    return ranks


def dies_with(strategy: Strategy, group: str, groups: Sequence[str]) -> list[str]:
    """The groups whose processes are restarted when one of `group` died, in order of the start.

    Groups start sinks first, so those that start after a group are the ones that send to it,
    or could.

    Args:
        groups: All groups, sources first.

    >>> dies_with(Strategy.REST_FOR_ONE, "count", ["split", "count", "report", "app"])
    ['split', 'app']
    """
    order = start_order(groups)
    if strategy is Strategy.ONE_FOR_ONE or group not in order:
        return []
    if strategy is Strategy.ONE_FOR_ALL:
        return order
    return order[order.index(group) + 1 :]


def expand(names: Iterable[str], processes: Sequence[str]) -> tuple[list[str], list[str]]:
    """The processes that `names` mean, each a process or a group, and the names that mean none.

    >>> expand(["count", "web", "x"], ["count#0", "count#1", "web"])
    (['count#0', 'count#1', 'web'], ['x'])
    """
    chosen: list[str] = []
    unknown: list[str] = []
    for name in names:
        found = [
            process for process in processes if name in (process, process.partition("#")[0])
        ]
        if not found:
            unknown.append(name)
        chosen += [process for process in found if process not in chosen]
    return chosen, unknown
