"""The broker's semantics over dicts, for tests: the same sessions, until the process ends.

All sessions of one MemoryBroker share its content. It does no I/O; everything is done at once,
on the loop.
"""

import asyncio
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from streamd.agentproc.broker import (
    TP,
    Batch,
    Checkpoint,
    Headers,
    Holder,
    Output,
    SoleHost,
    Subscription,
)
from streamd.agentproc.broker.beginning import beginning
from streamd.errors import BrokerError, ConfigError, Fenced
from streamd.failpoints import failpoint
from streamd.wire import GroupInfo, StandbyRow, TableInfo, TopicInfo


@dataclass(slots=True)
class _Log:
    """The events of one partition; the first of the columns has offset `low`."""

    low: int = 0
    keys: list[bytes | None] = field(default_factory=list)
    values: list[bytes | None] = field(default_factory=list)
    timestamps: list[float] = field(default_factory=list)
    headers: list[Headers] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.low + len(self.values)


class MemoryBroker:
    """Topics, tables, positions and claims of one test.

    Attributes:
        failing: Raised by each commit and append while it is set: nothing is written.
    """

    def __init__(self, default_partitions: int = 8) -> None:
        self.default_partitions = default_partitions
        self.failing: BrokerError | None = None
        self._topics: dict[str, list[_Log]] = {}
        self._tables: dict[str, list[dict[bytes, bytes]]] = {}
        self._positions: dict[tuple[str, TP], int] = {}
        self._epochs: dict[tuple[str, int], int] = {}  # group, partition -> epoch
        self._sessions: set[MemorySession] = set()

    traces = False
    installation = ""
    waits_for = ""

    def client_figures(self) -> dict[str, float]:
        """See `streamd.agentproc.broker.Broker`."""
        return {}

    def standby(self) -> list[StandbyRow]:
        """See `streamd.agentproc.broker.Broker`."""
        return []

    def session(
        self, subscription: Subscription, holder: Holder | None = None
    ) -> "MemorySession":
        """A session that is not open yet; its partitions stay with it."""
        return MemorySession(self, subscription)

    async def lead(self, group: str, tell: Callable[[bool], None]) -> SoleHost:
        """See `streamd.agentproc.broker.Broker`."""
        tell(True)
        return SoleHost()

    async def declare(
        self, topics: list[TopicInfo], tables: list[TableInfo], groups: list[GroupInfo]
    ) -> None:
        """Make what an app names.

        Raises:
            ConfigError: A topic or table is there with another number of partitions.
        """
        for topic in topics:
            self.make_topic(topic.name, topic.partitions)
        for table in tables:
            self._make_table(table.name, table.partitions)

    async def close(self) -> None:
        """Nothing to let go of: another session may read on."""

    def make_topic(self, name: str, partitions: int = 0) -> int:
        """The number of partitions of a topic, made if it is not there (0: any number)."""
        logs = self._topics.get(name)
        if logs is None:
            logs = [_Log() for _ in range(partitions or self.default_partitions)]
            self._topics[name] = logs
        if partitions not in (0, len(logs)):
            raise ConfigError(
                f"topic {name!r} has {len(logs)} partitions in the log, the app says "
                f"{partitions}: their number cannot change"
            )
        return len(logs)

    def events(self, topic: str) -> list[tuple[int, bytes | None, bytes | None]]:
        """All that a topic holds: (partition, key, value), partition by partition."""
        return [
            (partition, key, value)
            for partition, events in enumerate(self._topics.get(topic, ()))
            for key, value in zip(events.keys, events.values, strict=True)
        ]

    def trim(self, tp: TP, low: int) -> None:
        """Drop the events below `low`, as retention does."""
        events = self.log_of(tp)
        count = max(0, min(low, events.end) - events.low)
        for column in (events.keys, events.values, events.timestamps, events.headers):
            del column[:count]
        events.low += count

    # What sessions call.

    def claim(
        self, session: "MemorySession"
    ) -> tuple[int, list[int], dict[tuple[str, TP], int]]:
        """Raise the epochs of a slot: the epoch, the partitions, the positions."""
        subscription, group = session.subscription, session.group
        topics = {topic for names in subscription.agents.values() for topic in names}
        for table, partitions in subscription.tables.items():
            self._make_table(table, partitions)
        counts = [self.make_topic(topic) for topic in topics]
        had = {
            partition
            for count in itertools.chain(counts, subscription.tables.values())
            for partition in subscription.partitions(count)
        }
        epoch = 1 + max((e for (g, _), e in self._epochs.items() if g == group), default=0)
        self._epochs |= {(group, partition): epoch for partition in had}
        positions = {}
        for agent, names in subscription.agents.items():
            for topic in names:
                for partition in subscription.partitions(self.make_topic(topic)):
                    tp = TP(topic, partition)
                    events = self.log_of(tp)
                    stored = self._positions.get((agent, tp))
                    if stored is None:
                        reset = subscription.resets.get(topic, "earliest")
                        stored = beginning(reset, agent, tp, events.low, events.end)
                    positions[agent, tp] = max(stored, events.low)
        self._positions |= positions
        self._sessions.add(session)
        return epoch, sorted(had), positions

    def release(self, session: "MemorySession") -> None:
        """The session reads no more."""
        self._sessions.discard(session)

    def log_of(self, tp: TP) -> _Log:
        """The events of a partition.

        Raises:
            BrokerError: The topic has no such partition.
        """
        count = self.make_topic(tp.topic)
        if not 0 <= tp.partition < count:
            raise BrokerError(
                f"topic {tp.topic!r} has the partitions 0 to {count - 1}, not {tp.partition}"
            )
        return self._topics[tp.topic][tp.partition]

    def rows(self, table: str, partition: int) -> list[tuple[bytes, bytes]]:
        """Every row of a partition of a table, by key."""
        stored = self._tables.get(table, [])
        return sorted(stored[partition].items()) if partition < len(stored) else []

    def write(self, checkpoint: Checkpoint, session: "MemorySession | None") -> list[int]:
        """Write a checkpoint whole, or nothing of it; the first offset of each output."""
        if self.failing is not None:
            raise self.failing
        for output in checkpoint.outputs:
            if not len(output.keys) == len(output.values) == len(output.timestamps) > 0:
                raise ValueError(f"the columns of an output to {output.tp} differ in length")
        logs = [self.log_of(output.tp) for output in checkpoint.outputs]
        for change in checkpoint.changes:
            if change.table not in self._tables:
                raise BrokerError(f"the log has no table {change.table!r}: it was not declared")
        for _, tp in checkpoint.positions:
            self.log_of(tp)
        failpoint("commit.before-begin")
        if session is not None:
            self._check_claim(session)
        # Nothing below can fail.
        firsts = []
        for events, output in zip(logs, checkpoint.outputs, strict=True):
            firsts.append(events.end)
            events.keys += output.keys
            events.values += output.values
            events.timestamps += output.timestamps
            events.headers += output.headers or [[] for _ in output.values]
        for change in checkpoint.changes:
            rows = self._tables[change.table][change.partition]
            rows |= {key: value for key, value in change.rows if value is not None}
            for key, value in change.rows:
                if value is None:
                    rows.pop(key, None)
        self._positions |= checkpoint.positions
        appended = {output.tp for output in checkpoint.outputs}
        for reader in self._sessions:
            reader.ring(appended)
        return firsts

    def _check_claim(self, session: "MemorySession") -> None:
        lost = [
            partition
            for partition in session.partitions
            if self._epochs[session.group, partition] != session.generation
        ]
        if lost:
            raise Fenced(
                f"{session.group} lost {len(lost)} of its partitions {session.partitions} to "
                "another process; nothing was written"
            )

    def _make_table(self, name: str, partitions: int) -> None:
        stored = self._tables.setdefault(name, [{} for _ in range(partitions)])
        if len(stored) != partitions:
            raise ConfigError(
                f"table {name!r} has {len(stored)} partitions in the log, the app says "
                f"{partitions}: their number cannot change"
            )


class MemorySession:
    """One slot of a group on a MemoryBroker; `streamd.agentproc.broker.Session`."""

    def __init__(self, broker: MemoryBroker, subscription: Subscription) -> None:
        self.positions: dict[tuple[str, TP], int] = {}
        self.partitions: list[int] = []
        self.recovering: list[int] = []
        self.generation = 0
        self.topic_limits: dict[str, int] = {}
        self.table_limits: dict[str, int] = {}
        self.subscription = subscription
        self.group = f"{subscription.app_id}.{subscription.group}"
        self._broker = broker
        self._next: dict[TP, int] = {}  # partition -> the position to read next
        self._turn_of: list[TP] = []  # who is served first comes first
        self._rung = asyncio.Event()

    async def open(self) -> None:
        failpoint("open.before-claim")
        self.generation, self.partitions, self.positions = self._broker.claim(self)
        failpoint("open.after-claim")
        for (_, tp), position in self.positions.items():
            self._next[tp] = min(position, self._next.get(tp, position))
        self._turn_of = list(self._next)

    async def load(self, table: str, partition: int) -> list[tuple[bytes, bytes]]:
        failpoint("load.before-read")
        rows = self._broker.rows(table, partition)
        failpoint("load.after-read")
        return rows

    async def poll(self, max_events: int) -> list[Batch]:
        while True:
            self._rung.clear()
            if batches := self._read(max_events):
                # The embedded log's poll does not give way either when events are there.
                return batches
            await self._rung.wait()

    def seek(self, tp: TP, position: int) -> None:
        self._next[tp] = position
        self._rung.set()

    async def commit(self, checkpoint: Checkpoint) -> None:
        if not checkpoint:
            return
        failpoint("commit.before-encode")
        await asyncio.sleep(0)
        self._broker.write(checkpoint, self)
        self.positions |= checkpoint.positions
        failpoint("commit.after-commit")

    async def append(self, outputs: list[Output], *, durable: bool = False) -> list[int]:
        await asyncio.sleep(0)
        return self._broker.write(Checkpoint(outputs=outputs, durable=durable), None)

    def partitions_of(self, topic: str) -> int:
        return self._broker.make_topic(topic)

    async def most_bytes(self, topic: str) -> int:
        return sys.maxsize

    def is_sure(self) -> bool:
        return True

    def behind(self) -> dict[str, int]:
        behind = dict.fromkeys(self.subscription.agents, 0)
        for (agent, tp), position in self.positions.items():
            behind[agent] += max(0, self._broker.log_of(tp).end - position)
        return behind

    async def close(self, *, leave: bool = False) -> None:
        self._broker.release(self)

    def ring(self, appended: set[TP]) -> None:
        """Wake a waiting poll if one of these partitions is read here."""
        if not appended.isdisjoint(self._next):
            self._rung.set()

    def _read(self, max_events: int) -> list[Batch]:
        ready = [tp for tp in self._turn_of if self._broker.log_of(tp).end > self._next[tp]]
        batches: list[Batch] = []
        left = max_events
        for index, tp in enumerate(ready):
            batch = self._read_one(tp, max(1, left // (len(ready) - index)))
            batches.append(batch)
            self._next[tp] = batch.end
            left -= len(batch.values)
            if left <= 0:
                place = self._turn_of.index(tp) + 1
                self._turn_of = self._turn_of[place:] + self._turn_of[:place]
                break
        return batches

    def _read_one(self, tp: TP, max_events: int) -> Batch:
        events = self._broker.log_of(tp)
        start = max(self._next[tp], events.low)
        end = min(events.end, start + max_events)
        cut = slice(start - events.low, end - events.low)
        headers = events.headers[cut]
        return Batch(
            tp,
            range(start, end),
            events.keys[cut],
            events.values[cut],
            events.timestamps[cut],
            headers if any(headers) else None,
            end,
        )
