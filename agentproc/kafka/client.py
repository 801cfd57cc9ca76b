"""Kafka for whoever has no session: `send`, `consume`, `topics`, the app's commands.

The process `log` of an instance is one of these, and a command without an instance makes its
own. Every call waits in a thread; the loop turns.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaException, TopicPartition

from streamd.agentproc.broker import TP
from streamd.agentproc.broker.kafka import KafkaBroker
from streamd.agentproc.broker.placing import Placing
from streamd.agentproc.kafka import options, topics
from streamd.agentproc.kafka.appending import Appender
from streamd.agentproc.kafka.packs import open_pack, packed_count, stamps_of
from streamd.agentproc.kafka.standings import Standings
from streamd.agentproc.kafka.topics import ADMIN_S, broker_error
from streamd.errors import BrokerError
from streamd.wire import FetchedRecord, GroupInfo, LagRow, LogTopic, OutRecord

T = TypeVar("T")

MOST_CURSORS = 64
THREADS = 16
APPEND_S = 8.0  # a command is to end within about ten seconds
MAX_FETCH_BYTES = 4 * 1024 * 1024


class KafkaLog:
    """See `streamd.agentproc.broker.client.LogClient`."""

    def __init__(self, broker: KafkaBroker, groups: list[GroupInfo]) -> None:
        self.broker = broker
        self._groups = groups
        self._appender = Appender(options.at_once(broker.reach, APPEND_S))
        self._placing = Placing(broker.partitions_of)
        self._cursors: OrderedDict[TP, _Cursor] = OrderedDict()
        self._appending = ThreadPoolExecutor(1, thread_name_prefix="kafka appends")
        self._reading = ThreadPoolExecutor(THREADS, thread_name_prefix="kafka reads")

    async def append(self, records: list[OutRecord]) -> list[tuple[int, int]]:
        """Append; partition and offset of each, once all are durable."""
        return await self._run(self._appending, self._append, records)

    def _append(self, records: list[OutRecord]) -> list[tuple[int, int]]:
        outputs, places = self._placing.outputs(records, time.time())
        offsets = self._appender.append(outputs)
        return [(outputs[which].tp.partition, offsets[which][at]) for which, at in places]

    async def fetch(
        self,
        topic: str,
        partition: int,
        offset: int,
        limit: int,
        wait_s: float,
        index: int = 0,
    ) -> list[FetchedRecord]:
        """Up to about `limit` events from the one at `offset`, `index`; waits for the first."""
        tp = TP(topic, partition)
        return await self._run(self._reading, self._fetch, tp, offset, index, limit, wait_s)

    def _fetch(
        self, tp: TP, offset: int, index: int, limit: int, wait_s: float
    ) -> list[FetchedRecord]:
        # Taken out while it is read with: two requests for one partition have one each.
        cursor = self._cursors.pop(tp, None) or _Cursor(self.broker.reach, tp)
        try:
            return cursor.read(offset, index, limit, wait_s)
        finally:
            self._cursors[tp] = cursor
            while len(self._cursors) > MOST_CURSORS:
                _, old = self._cursors.popitem(last=False)
                old.close()

    async def lag(self) -> list[LagRow]:
        """How far each agent is, by partition."""
        return await self._run(self._reading, self._lag)

    def _lag(self) -> list[LagRow]:
        standings = Standings(self.broker, self._groups)
        try:
            standings.look(ADMIN_S)
            return standings.lag()
        finally:
            standings.close()

    async def topics(self) -> list[LogTopic]:
        """Every topic of the cluster that is not its own, with its ends, by name."""
        return await self._run(self._appending, self._topics)

    def _topics(self) -> list[LogTopic]:
        there = self.broker.patiently(lambda: topics.counts(self.broker.admin))
        wanted = {
            name: count for name, count in sorted(there.items()) if not name.startswith("__")
        }
        tps = [TP(name, p) for name, count in wanted.items() for p in range(count)]
        admin = self.broker.admin
        lows, highs = topics.lows(admin, tps), topics.ends(admin, tps)
        prefix = f"{self.broker.settings.id}-"
        return [
            LogTopic(
                name,
                [(lows.get(TP(name, p), 0), highs.get(TP(name, p), 0)) for p in range(count)],
                0,
                name.startswith(prefix),
            )
            for name, count in wanted.items()
        ]

    async def close(self) -> None:
        """Let go of the connections."""
        for cursor in self._cursors.values():
            cursor.close()
        self._cursors.clear()
        self._appending.shutdown(wait=False)
        self._reading.shutdown(wait=False)

    async def _run(
        self, thread: ThreadPoolExecutor, work: Callable[..., T], *args: object
    ) -> T:
        return await asyncio.get_running_loop().run_in_executor(thread, work, *args)


class _Cursor:
    """A consumer that stands somewhere in one partition."""

    def __init__(self, reach: options.Reach, tp: TP) -> None:
        reader = options.reader(reach, "streamd-outside", enable_partition_eof=False)
        self._consumer = Consumer(reader)
        self._tp = tp
        self._next: int | None = None  # offset

    def read(self, offset: int, index: int, limit: int, wait_s: float) -> list[FetchedRecord]:
        place = TopicPartition(self._tp.topic, self._tp.partition, offset)
        try:
            low, high = self._consumer.get_watermark_offsets(place, timeout=ADMIN_S)
        except KafkaException as error:
            raise broker_error(f"{self._tp} cannot be read", error) from error
        if offset < low:
            offset, index = low, 0
        if offset >= high and wait_s <= 0:
            return []
        if self._next != offset:
            place.offset = offset
            self._consumer.assign([place])
        asked_at = time.monotonic()
        records: list[FetchedRecord] = []
        size, at = 0, offset
        while not records:
            # What is there comes, sooner or later; for what is not there the caller waits.
            patience_s = wait_s if at >= high else max(wait_s, ADMIN_S)
            if (left := asked_at + patience_s - time.monotonic()) <= 0:
                break
            message: Any = self._consumer.poll(min(left, 1.0))
            messages = [message] if message is not None else []
            while messages and len(records) < limit and size < MAX_FETCH_BYTES:
                message = messages.pop()
                if message.error() is not None:
                    if message.error().fatal():
                        raise BrokerError(f"{self._tp}: {message.error().str()}")
                else:
                    size += len(message.value() or b"")
                    start = index if message.offset() == offset else 0
                    records += _events(self._tp, message, start)
                    self._next = at = message.offset() + 1
                messages = self._consumer.consume(1, 0)
        return records

    def close(self) -> None:
        self._consumer.close()


def _events(tp: TP, message: Any, start: int) -> list[FetchedRecord]:
    """What a record holds, from its event `start` on."""
    offset, headers = message.offset(), message.headers() or []
    if not packed_count(headers):
        if start:
            return []
        moment = message.timestamp()[1] / 1000
        return [FetchedRecord(offset, message.key(), message.value(), moment, headers)]
    columns = open_pack(message.value(), tp, offset)
    assert columns.keys is not None
    each = columns.headers or [[] for _ in columns.values]
    rows = zip(columns.keys, columns.values, stamps_of(columns), each, strict=True)
    return [FetchedRecord(offset, *row, index) for index, row in enumerate(rows)][start:]
