"""Writing to Kafka: what a checkpoint makes durable, without gaps.

All calls are made by the one thread of a session that writes; they block. A delivery error
leaves a gap that nothing here can close, so it ends the process before it sends more: what is
in no marker is done again.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition

from streamd.agentproc.broker import Output
from streamd.agentproc.kafka.health import Health
from streamd.agentproc.kafka.obstacles import OBSTRUCTED
from streamd.agentproc.kafka.options import Options
from streamd.agentproc.kafka.packs import count_header, cut
from streamd.agentproc.kafka.sources import Tracer
from streamd.agentproc.kafka.transactions import TURN_S, Transactions
from streamd.errors import BrokerError, BrokerLost, Fenced
from streamd.failpoints import failpoint

log = logging.getLogger(__name__)

STAMP_HEADER = "streamd-stamp"  # of a row that was deleted: it has no value to carry it
SLOW_FLUSH_S = 10.0
TRIES = 5


class Row(NamedTuple):
    """A record of a changelog or of markers."""

    topic: str
    partition: int
    key: bytes
    value: bytes | None
    stamp: bytes = b""  # where there is no value


class Changes(NamedTuple):
    """What a checkpoint changes in one partition of a changelog."""

    topic: str
    partition: int
    stamp: bytes
    rows: list[tuple[bytes, bytes | None]]  # None: deleted


class Offsets(NamedTuple):
    """Source offsets that a transaction commits, for the group that read them."""

    partitions: list[TopicPartition]
    metadata: object  # of the consumer's group


class Writer:
    """One session's producer.

    Args:
        packed: True for the topics that carry packs.
        wait_writable: Blocks until topics are there and may be written to.
        wait_timely: Blocks while topics refuse the timestamps that this host gives.
        mend: See `Transactions`.
    """

    def __init__(
        self,
        options: Options,
        packed: Callable[[str], bool],
        tracer: Tracer,
        health: Health,
        wait_writable: Callable[[set[str]], None] = lambda topics: None,
        wait_timely: Callable[[set[str]], None] = lambda topics: None,
        mend: Callable[[Producer], None] = lambda producer: None,
    ) -> None:
        self.tracer = tracer
        self._packed = packed
        self._health = health
        self._options = options
        self._wait_writable = wait_writable
        self._wait_timely = wait_timely
        self._errors: list[str] = []  # what the producer told of
        self._obstructed: set[str] = set()  # topics that are gone, or not permitted
        self._untimely: set[str] = set()  # topics that refuse what records are stamped with
        self._topics: set[str] = set()  # of the transaction
        self._transactions: Transactions | None = None
        if "transactional.id" in options:
            timeout_s = options["transaction.timeout.ms"] / 1000
            self._transactions = Transactions(
                self._make_producer, mend, timeout_s, health, self._aborted
            )
            self._producer = self._transactions.producer
        else:
            self._producer = self._make_producer()

    @property
    def transactional(self) -> bool:
        """Does it write transactions?"""
        return self._transactions is not None

    def _make_producer(self) -> Producer:
        errors = self._errors = []

        def delivered(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                self._failed(errors, message.topic(), message.partition(), error)

        def problem(error: KafkaError) -> None:
            if error.fatal():
                errors.append(error.str())
            else:
                self._health.on_error(error)

        return Producer({**self._options, "on_delivery": delivered, "error_cb": problem})

    def commit(
        self,
        outputs: Sequence[Output],
        changes: Sequence[Changes],
        markers: Sequence[Row],
        offsets: Offsets | None,
    ) -> None:
        """Make all of it durable: outputs and changes first, then markers, by which it counts.

        Raises:
            Fenced: Another process has taken over; nothing counts.
            BrokerLost: It cannot be known what is durable. Whoever writes transactions may
                recover and write on, with a producer that is made anew; else the process ends.
            BrokerError: Nothing counts; the same may be tried again.
        """
        if self._transactions is not None:
            self._transact(self._transactions, outputs, changes, markers, offsets)
            return
        failpoint("kafka.before-outputs")
        for output in outputs:
            self._send(output)
        failpoint("kafka.after-outputs")
        self._change(changes)
        failpoint("kafka.before-flush")
        self._flush()
        failpoint("kafka.before-markers")
        self._put(markers)
        failpoint("kafka.before-marker-flush")
        self._flush()
        failpoint("kafka.after-markers")

    def put(self, rows: Iterable[Row]) -> None:
        """Make records durable by themselves. Raises as `commit`."""
        if self._transactions is None:
            self._put(rows)
            self._flush()
            return
        again = list(rows)
        for left in reversed(range(TRIES)):
            try:
                return self._transact(self._transactions, (), (), again, None)
            except Fenced:
                raise
            except (BrokerLost, BrokerError):
                # These are repairs and claims: they say the same when they are there twice.
                if not left:
                    raise

    @property
    def is_in_doubt(self) -> bool:
        """May there be a transaction whose end is not known, or not marked everywhere?"""
        return self._transactions is not None and self._transactions.is_in_doubt

    def end_former(self) -> None:
        """Have what is in doubt ended, before anybody reads what counts."""
        if self._transactions is not None:
            self._transactions.end_former()

    def _transact(
        self,
        transactions: Transactions,
        outputs: Sequence[Output],
        changes: Sequence[Changes],
        markers: Sequence[Row],
        offsets: Offsets | None,
    ) -> None:
        self._topics = {output.tp.topic for output in outputs}
        self._topics |= {change.topic for change in changes}
        self._topics |= {row.topic for row in markers}
        failpoint("kafka.before-begin")
        transactions.begin()
        self._producer = transactions.producer
        failpoint("kafka.after-begin")
        self._errors.clear()  # those of a transaction that was aborted
        try:
            for output in outputs:
                self._send(output)
            failpoint("kafka.after-outputs")
            self._change(changes)
            self._put(markers)
        except BrokerLost as error:
            transactions.abort()
            raise BrokerError(str(error)) from None
        failpoint("kafka.before-offsets")
        if offsets is not None and offsets.partitions:
            transactions.send_offsets(offsets.partitions, offsets.metadata)
        failpoint("kafka.before-commit")
        transactions.commit()
        failpoint("kafka.after-commit")

    def _aborted(self, cause: KafkaError) -> None:
        if self._untimely:
            self._wait_timely(self._untimely)
            self._untimely.clear()
            # The same records would be refused again: their events are to be done anew.
            raise BrokerLost(f"a record was not written: {self._errors[0]}")
        if self._obstructed or cause.code() in OBSTRUCTED:
            # Tried again before, it would be refused again.
            self._wait_writable(self._topics)
            self._obstructed.clear()

    # Records.

    def _send(self, output: Output) -> None:
        topic, partition = output.tp
        if self._packed(topic):
            for count, data in cut(output, self.tracer):
                self._produce(topic, partition, None, data, count_header(count), None)
            return
        # Arguments by their places: by name, to read them would cost half as much again.
        produce: Any = self._producer.produce
        headers: Any = output.headers or [None] * len(output.values)
        columns = output.keys, output.values, output.timestamps, headers
        moment, moment_ms = 0.0, 0
        for key, value, timestamp, header in zip(*columns, strict=True):
            if timestamp != moment:
                moment, moment_ms = timestamp, int(timestamp * 1000)
            try:
                produce(topic, value, key, partition, None, None, moment_ms, header)
            except (BufferError, KafkaException):
                self._produce(topic, partition, key, value, header, timestamp)

    def _change(self, changes: Iterable[Changes]) -> None:
        produce = self._producer.produce
        for topic, partition, stamp, rows in changes:
            for key, value in rows:
                if value is None:
                    headers = [(STAMP_HEADER, stamp)]
                    self._produce(topic, partition, key, None, headers, None)
                    continue
                stamped = stamp + value
                try:
                    produce(topic, stamped, key, partition)
                except (BufferError, KafkaException):
                    self._produce(topic, partition, key, stamped, None, None)

    def _put(self, rows: Iterable[Row]) -> None:
        produce = self._producer.produce
        for row in rows:
            topic, partition, key, value, stamp = row
            if value is None and stamp:
                self._produce(topic, partition, key, None, [(STAMP_HEADER, stamp)], None)
                continue
            try:
                produce(topic, value, key, partition)
            except (BufferError, KafkaException):
                self._produce(topic, partition, key, value, None, None)

    def _produce(
        self,
        topic: str,
        partition: int,
        key: bytes | None,
        value: bytes | None,
        headers: list[tuple[str, bytes]] | None,
        timestamp: float | None,
    ) -> None:
        while True:
            try:
                self._producer.produce(
                    topic,
                    value,
                    key,
                    partition,
                    timestamp=0 if timestamp is None else int(timestamp * 1000),
                    headers=cast(Any, headers),
                )
                return
            except BufferError:
                self._producer.poll(TURN_S)
                self._check()
            except KafkaException as error:
                self._failed(self._errors, topic, partition, error.args[0])
                self._check()

    def _flush(self) -> None:
        asked_at = time.monotonic()
        slow = False
        while left := self._producer.flush(TURN_S):
            self._check()
            waited_s = time.monotonic() - asked_at
            if waited_s > SLOW_FLUSH_S:
                text = f"{left} records of a checkpoint are not written for {waited_s:.0f} s"
                self._health.doing("flush", f"waits for brokers: {text}")
                if not slow:
                    slow = True
                    log.warning("%s; brokers or partitions may be away", text)
                    self._health.suspect(text)
        if slow:
            self._health.doing("flush", "")
            log.info("a checkpoint was written after %.0f s", time.monotonic() - asked_at)
        self._check()

    def _check(self) -> None:
        if self._errors:
            if self._obstructed:
                # The successor of this process would fail in the same way until then.
                self._wait_writable(self._obstructed)
            if self._untimely:
                self._wait_timely(self._untimely)
            raise BrokerLost(f"a record was not written: {self._errors[0]}")

    def _failed(
        self, errors: list[str], topic: str | None, partition: int | None, error: KafkaError
    ) -> None:
        errors.append(f"{topic}[{partition}]: {error.str()}")
        if topic is not None and error.code() in OBSTRUCTED:
            self._obstructed.add(topic)
        if topic is not None and error.code() == KafkaError.INVALID_TIMESTAMP:
            self._untimely.add(topic)
