"""Sessions of one group on a real broker, opened and left as processes open and leave them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from confluent_kafka import Consumer, KafkaError, TopicPartition
from kafka_clients import unique

from streamd.agentproc.broker import (
    TP,
    Batch,
    Checkpoint,
    Holder,
    Output,
    Segment,
    Subscription,
)
from streamd.agentproc.broker.kafka import KafkaBroker
from streamd.agentproc.kafka import options
from streamd.agentproc.kafka.appending import CONNECT_S
from streamd.agentproc.kafka.health import Health
from streamd.agentproc.kafka.producing import Row, Writer
from streamd.agentproc.kafka.recovery import Home, Recovery, Taken
from streamd.agentproc.kafka.session import KafkaSession
from streamd.agentproc.kafka.sources import Tracer
from streamd.config import resolve
from streamd.wire import TopicInfo

WITHIN_S = 60.0
GUARANTEES = ("at_least_once", "exactly_once")


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine; bounded in time."""

    async def main() -> None:
        async with asyncio.timeout(2 * WITHIN_S):
            await body()

    asyncio.run(main())


class Place:
    """An app of its own: `words` is its packed topic, with `partitions`; `out` is plain."""

    def __init__(
        self,
        bootstrap: str,
        guarantee: str = "at_least_once",
        partitions: int = 1,
        app_id: str = "",
        session_s: float = 2.0,
    ) -> None:
        self.bootstrap = bootstrap
        self.app_id = app_id or unique("app")
        self.words = f"{self.app_id}-count"
        self.out = f"{self.app_id}-out"
        self.partitions = partitions
        keywords = {
            "id": self.app_id, "broker": f"kafka://{bootstrap}",
            "processing_guarantee": guarantee, "broker_session_timeout": session_s,
            "grace": 5.0, "topic_partitions": partitions,
        }  # fmt: skip
        self.settings = resolve(keywords, {}, None, {})
        self.subscription = Subscription(
            self.app_id, "g", 0, 1, {"count": [self.words]}, {"counts": partitions}
        )
        self.changelog = f"{self.app_id}-counts-changes"
        self.markers = f"{self.app_id}-g-markers"

    def broker(self, installation: str = "one", *, packed: bool = True) -> KafkaBroker:
        """A process's way to the cluster."""
        topics = [
            TopicInfo(self.words, self.partitions, True, None, "", "", packed=packed),
            TopicInfo(self.out, self.partitions, False, None, "", ""),
        ]
        return KafkaBroker(self.settings, topics, installation)

    @asynccontextmanager
    async def reader(
        self,
        installation: str = "one",
        *,
        packed: bool = True,
        holder: Holder | None = None,
        subscription: Subscription | None = None,
    ) -> AsyncIterator[KafkaSession]:
        """An open session of the group; it is left as a process that ends leaves it."""
        broker = self.broker(installation, packed=packed)
        session = broker.session(subscription or self.subscription, holder)
        try:
            await session.open()
            yield session
        finally:
            await broker.close()

    def sender(self) -> "Sender":
        """A process of another group, which sends to `words`."""
        return Sender(self)

    def recovery(self) -> Recovery:
        """Takes partitions over without the group, as after a stop that was too long."""
        reach = options.connection(self.settings)
        writer = self.writer(Tracer())
        home = Home(
            [self.words], self.markers, {"counts": self.changelog},
            self.settings.processing_guarantee == "exactly_once", frozenset([self.words]),
        )  # fmt: skip
        return Recovery(
            options.reader(reach, unique("reader")), home, writer.put,
            Health({"bootstrap.servers": self.bootstrap}), lambda text: None,
        )  # fmt: skip

    def take(self, partition: int = 0) -> Taken:
        """Take one partition over; blocks."""
        recovery = self.recovery()
        try:
            return recovery.take([partition])[partition]
        finally:
            recovery.close()

    def write(self, rows: list[Row]) -> None:
        """Write rows as any process may."""
        self.writer(Tracer()).put(rows)

    def writer(self, tracer: Tracer) -> Writer:
        """A process's writer without transactions; it is connected."""
        reach = options.connection(self.settings)
        writer = Writer(
            options.producer(reach, transactional_id=None),
            lambda topic: topic == self.words, tracer,
            Health({"bootstrap.servers": self.bootstrap}),
        )  # fmt: skip
        # Told to send before, it waits for half a second.
        writer._producer.poll(CONNECT_S)
        return writer

    def records(self, topic: str, partition: int = 0) -> list[Any]:
        """Every record of a partition that read_committed shows."""
        consumer = Consumer(
            {
                "bootstrap.servers": self.bootstrap, "group.id": unique("look"),
                "enable.partition.eof": True, "isolation.level": "read_committed",
                "fetch.wait.max.ms": 10,
            }
        )  # fmt: skip
        place = TopicPartition(topic, partition)
        place.offset, high = consumer.get_watermark_offsets(place, timeout=WITHIN_S)
        consumer.assign([place])
        found: list[Any] = []
        deadline = time.monotonic() + WITHIN_S
        while time.monotonic() < deadline:
            message: Any = consumer.poll(0.5)
            if message is None:
                continue
            if message.error() is None:
                found.append(message)
            elif message.error().code() == KafkaError._PARTITION_EOF:
                if message.offset() >= high:
                    break
        consumer.close()
        return found

    def last_rows(self) -> dict[bytes, bytes]:
        """The changelog of partition 0 by itself: the last value of each key."""
        rows: dict[bytes, bytes] = {}
        for message in self.records(self.changelog):
            if message.value() is None:
                rows.pop(message.key(), None)
            else:
                rows[message.key()] = message.value()[12:]
        return rows


class Sender:
    """Sends records to a partition, each for one event of `posts`; two tries are replays."""

    SOURCE = TP("posts", 0)

    def __init__(self, place: Place) -> None:
        self._place = place
        tracer = Tracer()
        tracer.topics = {TP("posts", 0): "one"}
        self._writer = place.writer(tracer)

    def send(self, events: list[int], partition: int = 0) -> None:
        """One record for each number, which is its event's position; made durable. Blocks.

        A value is `event.n`, the n-th of its event.
        """
        values: list[bytes | None] = []
        for index, event in enumerate(events):
            values.append(b"%d.%d" % (event, events[:index].count(event)))
        tp = TP(self._place.words, partition)
        output = Output(
            tp, [None] * len(values), values, [1.0] * len(values),
            sources=[Segment(len(values), "split", self.SOURCE, events)],
        )  # fmt: skip
        self._writer.commit([output], [], [], None)


async def read(session: KafkaSession, count: int) -> list[Batch]:
    """Batches with `count` events at least."""
    batches: list[Batch] = []
    async with asyncio.timeout(WITHIN_S):
        while sum(len(batch.values) for batch in batches) < count:
            batches += await session.poll(100)
    return batches


async def read_nothing(session: KafkaSession, for_s: float = 0.7) -> None:
    """See that no event comes."""
    try:
        async with asyncio.timeout(for_s):
            batches = await session.poll(100)
    except TimeoutError:
        return
    raise AssertionError(f"these came: {[batch.values for batch in batches]}")


def values_of(batches: list[Batch]) -> list[bytes | None]:
    """The values, in order."""
    return [value for batch in batches for value in batch.values]


def positions_of(batches: list[Batch]) -> list[int]:
    """Where to read on after each event."""
    found: list[int] = []
    for batch in batches:
        found += [*list(batch.positions)[1:], batch.end]
    return found


def settled(place: Place, position: int, partition: int = 0) -> Checkpoint:
    """A checkpoint that says how far the group is."""
    return Checkpoint(positions={("count", TP(place.words, partition)): position})
