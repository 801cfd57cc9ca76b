"""The scope of code that is no agent: a timer's tick, a page's view, a task.

It has no event, so what it writes to tables goes to the partition that each key hashes to. A
tick or a view counts as one event: no checkpoint holds a part of it. Of a task, which may run
for ever, each stretch between two awaits does. Both become durable with the group's next
checkpoint.
"""

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from streamd.agentproc.outbox import new_lanes
from streamd.context import Buffered, Callback, Lanes, Record, RecordMetadata

if TYPE_CHECKING:
    from streamd.agentproc.engine import Engine

TURN_SENDS = 1000  # after so many the loop has its turn


class Errand:
    """One run of such code."""

    may_wait = True
    traces = False

    def __init__(self, engine: "Engine", name: str, whole: bool) -> None:
        self.engine = engine
        self.name = name
        self.whole = whole  # a tick or a view
        self.lanes: Lanes = new_lanes()
        self.has_tables = bool(engine.tables)
        self.left_something = False  # sent or wrote, and it may not be durable
        self.rolled_back = False
        self.waiting = 0  # records sent since the last checkpoint began
        self.since = time.monotonic()
        self.task: asyncio.Task[object] | None = None
        self.tasks: WeakSet[asyncio.Task[Any]] = WeakSet()  # its own, and those it started
        self._callbacks: list[tuple[Callback, RecordMetadata]] = []
        self._wrote = False  # to a table
        self._asked: Counter[str] = Counter()  # agent -> asks that wait for a reply
        self._turn = 0
        self._sends = 0  # sends so far
        self._room = asyncio.Event()

    def enter(self) -> None:
        """A step begins."""
        self.engine.enter(None)

    def leave(self) -> None:
        """A step is over: each key that it wrote goes to its partition."""
        for table in self.engine.tables:
            table.check()
        written = [table.flush() for table in self.engine.tables]
        if not any(written):
            return
        first, self._wrote, self.left_something = not self._wrote, True, True
        if not self.whole:
            self.engine.sending()
        elif first:
            self.engine.gate.started(self)
            for agent, count in self._asked.items():
                self.engine.gate.asking(agent, count)

    def engine_name(self) -> str:
        """See `streamd.context.Sending`."""
        return self.engine.group

    def turn(self) -> int:
        """A number that chooses the partition of a record without key: each in turn."""
        self._turn += 1
        return self._turn

    def buffered(self, topic: str, partition: int) -> Buffered:
        """See `streamd.context.Sending`."""
        self.left_something = True
        if not self.whole:
            self.engine.sending()
        return Buffered(self, RecordMetadata(topic, partition, None, 0.0))

    async def wait_room(self) -> None:
        """See `streamd.context.Sending`; what counts as one event never waits."""
        self._sends += 1
        if self._sends % TURN_SENDS == 0:
            await asyncio.sleep(0)
        if self.whole:
            return
        self.waiting += 1
        while self.engine.is_full():
            self._room.clear()
            await self._room.wait()

    async def wait_durable(self) -> None:
        """See `streamd.context.Sending`; after a table write, the end of the code does it."""
        self.leave()  # what it wrote in this very step counts
        if not self.whole:
            await self.engine.pending.durable(self)
        elif not self._wrote:
            self.engine.pending.outbox.append(self.take_lanes())
            self.left_something = False
            await self.engine.pending.durable(self)

    async def send_now(self, topic: str, record: Record) -> RecordMetadata:
        """See `streamd.context.Sending`."""
        return await self.engine.send_now(topic, record)

    def when_durable(self, callback: Callback, metadata: RecordMetadata) -> None:
        """See `streamd.context.Sending`."""
        self._callbacks.append((callback, metadata))

    def asking(self, agent: str, change: int) -> None:
        """An `ask` of this code begins or ends; once it wrote, see `Gate.lets`."""
        self._asked[agent] += change
        if self in self.engine.gate.working:
            self.engine.gate.asking(agent, change)

    def over(self) -> None:
        """The code has returned; what it started and left behind is in nobody's way."""
        if self in self.engine.gate.working:
            for agent, count in self._asked.items():
                self.engine.gate.asking(agent, -count)
            self.engine.gate.stopped(self)

    def cut(self) -> None:
        """A checkpoint waits; there is nothing more that would be handed out to this code."""

    def describe(self, *, key: bool = False) -> str:
        """What is being worked on, for people; it has no key."""
        return f"{self.name} for {time.monotonic() - self.since:.1f} s"

    def take_lanes(self) -> Lanes:
        """What was sent, for a checkpoint."""
        lanes, self.lanes = self.lanes, new_lanes()
        self.engine.pending.callbacks += self._callbacks
        self._callbacks = []
        self.waiting = 0
        if not self.whole:
            self._wrote = False
        return lanes

    def landed(self) -> None:
        """A checkpoint is durable."""
        self._room.set()

    def roll_back(self) -> bool:
        """What was not durable is gone; True for code that lost something: it is to end.

        A task that wrote nothing since the last checkpoint loses nothing: what it sent then
        does not come from a failed try.
        """
        self._room.set()
        if not (self.left_something if self.whole else self._wrote):
            return False
        self.rolled_back = True
        self.lanes, self._callbacks, self.waiting = new_lanes(), [], 0
        return True
