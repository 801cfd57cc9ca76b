"""Which event a record was sent for, and which records a reader has had already.

A sender that crashed works on some events again and sends their records again. So records of
the app's own topics say for which event they were sent: a `Run` is consecutive records of a
pack that were sent by one agent for events of one partition. A reader keeps the highest event
for each (agent, generation, topic, partition) and drops what is not above it.

One event's records are never in two packs, unless they alone fill several: those are numbered
(`part`), and an event's place is (position, part).

This module does no I/O. Tried, with its rules, over some hundred kills; see docs/kafka.md.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from streamd.agentproc.broker import TP


class Run(msgspec.Struct, array_like=True):
    """Consecutive records of a pack and the events that they were sent for."""

    count: int
    agent: str = ""  # the sender; "": these were sent for no event, and are never dropped
    generation: str = ""  # of the sender's replays
    topic: str = ""
    partition: int = 0
    first: int = 0  # position of the first record's event
    last: int = 0
    part: int = 0  # which of an event's packs this is, where it fills several
    previous: int = -1  # the last event that this sender's process sent for before, to here
    ordinals: bytes = b""  # of each record's event: position - first, as uint32


Origin = tuple[str, str, str, int]  # agent, generation, topic, partition
Place = tuple[int, int]  # position, part
Highs = dict[Origin, Place]


class Gap(NamedTuple):
    """Records came of a sender of which earlier ones never did."""

    origin: Origin
    high: int
    previous: int


def origin_of(run: Run) -> Origin:
    """Whose records these are (pure)."""
    return run.agent, run.generation, run.topic, run.partition


def sift(highs: Highs, runs: Iterable[Run], gaps: list[Gap]) -> list[tuple[int, int]]:
    """Which records of a pack are new, as slices in order; raises `highs` to their events.

    A run that leaves a gap is dropped whole and `highs` stay: its sender comes again.
    """
    kept: list[tuple[int, int]] = []
    start = 0
    for run in runs:
        end = start + run.count
        fresh = _fresh(highs, run, gaps)
        if fresh < run.count:
            if kept and kept[-1][1] == start + fresh:
                kept[-1] = kept[-1][0], end
            else:
                kept.append((start + fresh, end))
        start = end
    return kept


def _fresh(highs: Highs, run: Run, gaps: list[Gap]) -> int:
    """The index of a run's first new record; its count where none is."""
    if not run.agent:
        return 0
    origin = origin_of(run)
    high = highs.get(origin)
    if high is None or high < (run.first, run.part):
        if high is not None and run.previous > high[0]:
            gaps.append(Gap(origin, high[0], run.previous))
            return run.count
        highs[origin] = run.last, run.part
        return 0
    if high >= (run.last, run.part):
        return run.count
    highs[origin] = run.last, run.part
    ordinals = array("I", run.ordinals)
    return bisect_left(ordinals, high[0] - run.first + 1)


class Tracer:
    """What one process has sent: makes the runs of its packs."""

    def __init__(self) -> None:
        self.topics: dict[TP, str] = {}  # source -> its topic's id: one made anew is another
        self.resets: dict[int, int] = {}  # partition -> how often it was reset
        self._previous: dict[tuple[str, TP, TP], int] = {}  # agent, source, target -> position

    def run(
        self, target: TP, agent: str, source: TP, positions: Sequence[int], part: int = 0
    ) -> Run:
        """The run of records for `target`, sent for the events at `positions`, ascending."""
        first, last = positions[0], positions[-1]
        key = agent, source, target
        previous = self._previous.get(key, -1)
        self._previous[key] = last
        ordinals = b""
        if first != last:
            ordinals = array("I", [position - first for position in positions]).tobytes()
        return Run(
            len(positions), agent, self._generation(source), source.topic, source.partition,
            first, last, part, previous, ordinals,
        )  # fmt: skip

    def _generation(self, source: TP) -> str:
        """Records of one generation are replays of each other; those of two never are."""
        return f"{self.topics.get(source, '')}/{self.resets.get(source.partition, 0)}"

    def forget(self, partitions: Iterable[int]) -> None:
        """Events of these source partitions are another process's from now on."""
        lost = set(partitions)
        self._previous = {
            key: position
            for key, position in self._previous.items()
            if key[1].partition not in lost
        }
