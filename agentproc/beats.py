"""The page through which the master sees that a process is alive and gets on.

The page is a memfd that the master keeps: it can be read while the loop hangs and after the
process died. `docs/internals.md` has the layout. Every number is stored by one assignment to a
cast memoryview, so a reader never sees half of it; `struct.pack_into` would show zeros.
"""

import asyncio
import mmap
import os
import time
from enum import IntEnum

import msgspec

PAGE_BYTES = 4096
BEAT_S = 0.25

_BEAT, _SETTLED, _IN_WORK, _OLDEST, _STAGE, _STAGE_SINCE = range(6)
_PLACE_LENGTH = 1016 // 8
_PLACE = 1024


class Stage(IntEnum):
    """How far a process is."""

    STARTING = 0
    RECOVERING = 1
    RUNNING = 2
    DRAINING = 3


class Place(msgspec.Struct, frozen=True):
    """The event that is being worked on."""

    agent: str
    topic: str
    partition: int
    position: int


class Beats:
    """The writing end of the page."""

    def __init__(self, page: int) -> None:
        """Map the page behind the descriptor `page`, which the caller may close then."""
        # A mapping beyond the end of its file can be made; storing there is a SIGBUS.
        if os.fstat(page).st_size < PAGE_BYTES:
            os.ftruncate(page, PAGE_BYTES)
        self._page = mmap.mmap(page, PAGE_BYTES)
        view = memoryview(self._page)
        self._doubles = view.cast("d")
        self._ints = view.cast("q")
        self._work: dict[str, tuple[int, float]] = {}  # group -> events in work, oldest since
        self._encode_place = msgspec.json.Encoder().encode
        self.enter(Stage.STARTING)

    def start(self) -> None:
        """Beat from now on, each `BEAT_S`, from the running loop and by nothing else."""
        self._doubles[_BEAT] = time.monotonic()
        asyncio.get_running_loop().call_later(BEAT_S, self.start)

    def enter(self, stage: Stage) -> None:
        """Say how far the process is; the moment is noted."""
        now = time.monotonic()
        self._doubles[_BEAT] = now
        self._ints[_STAGE] = stage
        self._doubles[_STAGE_SINCE] = now

    def settled(self, count: int) -> None:
        """Add events that are done; the progress that the master goes by."""
        self._ints[_SETTLED] += count

    def in_work(self, group: str, count: int, oldest_at: float) -> None:
        """Say how many events `group` works on and since when the oldest (monotonic)."""
        self._work[group] = (count, oldest_at)
        if len(self._work) > 1:
            at_work = [work for work in self._work.values() if work[0]]
            count = sum(work[0] for work in at_work)
            oldest_at = min((work[1] for work in at_work), default=0.0)
        self._ints[_IN_WORK] = count
        self._doubles[_OLDEST] = oldest_at if count else 0.0

    def place(self, place: Place | None) -> None:
        """Write down what is being worked on, for the master to read should it kill us."""
        # Length last: a process that dies between these lines leaves no place, not half of one.
        self._ints[_PLACE_LENGTH] = 0
        if place is not None:
            text = self._encode_place(place)
            if len(text) <= PAGE_BYTES - _PLACE:
                self._page[_PLACE : _PLACE + len(text)] = text
                self._ints[_PLACE_LENGTH] = len(text)
