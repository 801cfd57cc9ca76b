"""The scope of code that is no agent: a timer's tick, a task, a page's view.

It has no event, so its table writes go to the partition that each key hashes to, step by step;
its sends may wait; both become durable with the group's next checkpoint.
"""

import asyncio
from typing import TYPE_CHECKING

from streamd.agentproc.outbox import new_lanes
from streamd.context import Buffered, Callback, Lanes, Record, RecordMetadata

if TYPE_CHECKING:
    from streamd.agentproc.engine import Engine


class Errand:
    """One run of such code."""

    may_wait = True

    def __init__(self, engine: "Engine", name: str) -> None:
        self.engine = engine
        self.name = name
        self.lanes: Lanes = new_lanes()
        self.has_tables = bool(engine.tables)
        self.left_something = False  # sent or wrote, and it is not durable
        self.rolled_back = False
        self.waiting = 0  # records sent since the last checkpoint began
        self._in_flight = 0
        self._turn = 0
        self._room = asyncio.Event()

    def enter(self) -> None:
        """A step begins."""
        self.engine.enter(None)

    def leave(self) -> None:
        """A step is over: each key that it wrote goes to its partition."""
        for table in self.engine.tables:
            if table.flush():
                self.left_something = True
                self.engine.sending()

    def engine_name(self) -> str:
        """See `streamd.context.Sending`."""
        return self.engine.group

    def turn(self) -> int:
        """A number that chooses the partition of a record without key: each in turn."""
        self._turn += 1
        return self._turn

    def buffered(self, topic: str, partition: int) -> Buffered:
        """See `streamd.context.Sending`."""
        self._note()
        return Buffered(self, RecordMetadata(topic, partition, None, 0.0))

    async def wait_room(self) -> None:
        """See `streamd.context.Sending`."""
        self._note()
        self.waiting += 1
        while self.engine.is_full():
            self._room.clear()
            await self._room.wait()

    async def wait_durable(self) -> None:
        """See `streamd.context.Sending`."""
        await self.engine.durable()

    async def send_now(self, topic: str, record: Record) -> RecordMetadata:
        """See `streamd.context.Sending`."""
        return await self.engine.send_now(topic, record)

    def when_durable(self, callback: Callback, metadata: RecordMetadata) -> None:
        """See `streamd.context.Sending`."""
        self.engine.callbacks.append((callback, metadata))

    def asking(self, change: int) -> None:
        """An `ask` of this code waits; it is in nobody's way."""

    def take_lanes(self) -> Lanes:
        """What was sent, for a checkpoint."""
        lanes, self.lanes = self.lanes, new_lanes()
        self.waiting, self._in_flight = 0, self._in_flight + self.waiting
        return lanes

    def landed(self) -> None:
        """A checkpoint is durable."""
        self._in_flight = 0
        self._room.set()

    def roll_back(self) -> None:
        """What was not durable is gone."""
        if self.left_something:
            self.rolled_back = True
        self.lanes = new_lanes()
        self.waiting = 0
        self._room.set()

    def _note(self) -> None:
        self.left_something = True
        self.engine.sending()
