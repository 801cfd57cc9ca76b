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
from streamd.errors import BrokerError, BrokerLost, Fenced
from streamd.failpoints import failpoint

log = logging.getLogger(__name__)

STAMP_HEADER = "streamd-stamp"  # of a row that was deleted: it has no value to carry it
SLOW_FLUSH_S = 10.0
TRIES = 5
_TURN_S = 0.2
_TAKEN_OVER = (
    KafkaError._FENCED,
    KafkaError.INVALID_PRODUCER_EPOCH,
    KafkaError.FENCED_INSTANCE_ID,
)
# Another member came or went while a transaction was open; ours may be ours as before.
_REBALANCED = (
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.NOT_COORDINATOR,
)


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
    """

    def __init__(
        self,
        options: Options,
        packed: Callable[[str], bool],
        tracer: Tracer,
        health: Health,
        wait_writable: Callable[[set[str]], None] = lambda topics: None,
    ) -> None:
        self.transactional = "transactional.id" in options
        self.tracer = tracer
        self._packed = packed
        self._health = health
        self._errors: list[str] = []
        self._wait_writable = wait_writable
        self._obstructed: set[str] = set()  # topics that are gone, or not permitted
        self._topics: set[str] = set()  # of the transaction
        self._producer = Producer(
            {**options, "on_delivery": self._delivered, "error_cb": self._problem}
        )
        if self.transactional:
            self._retrying("the producer cannot start", self._producer.init_transactions)

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
            BrokerLost: It cannot be known what is durable; this process must end.
            BrokerError: Nothing counts; the same may be tried again.
        """
        if self.transactional:
            self._transact(outputs, changes, markers, offsets)
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
        if not self.transactional:
            self._put(rows)
            self._flush()
            return
        again = list(rows)
        for left in reversed(range(TRIES)):
            try:
                return self._transact((), (), again, None)
            except (BrokerLost, Fenced):
                raise
            except BrokerError:
                if not left:
                    raise

    # Transactions.

    def _transact(
        self,
        outputs: Sequence[Output],
        changes: Sequence[Changes],
        markers: Sequence[Row],
        offsets: Offsets | None,
    ) -> None:
        producer = self._producer
        self._topics = {output.tp.topic for output in outputs}
        self._topics |= {change.topic for change in changes}
        self._topics |= {row.topic for row in markers}
        failpoint("kafka.before-begin")
        self._retrying("a transaction cannot begin", producer.begin_transaction)
        failpoint("kafka.after-begin")
        for output in outputs:
            self._send(output)
        failpoint("kafka.after-outputs")
        self._change(changes)
        self._put(markers)
        failpoint("kafka.before-offsets")
        if offsets is not None and offsets.partitions:
            self._retrying(
                "a transaction's offsets are refused",
                lambda: producer.send_offsets_to_transaction(
                    offsets.partitions, offsets.metadata
                ),
            )
        failpoint("kafka.before-commit")
        self._retrying("a transaction cannot be committed", producer.commit_transaction)
        failpoint("kafka.after-commit")
        self._check()

    def _retrying(self, what: str, call: Callable[[], object]) -> None:
        while True:
            try:
                call()
                return
            except KafkaException as error:
                cause = error.args[0]
                if cause.retriable() and not cause.fatal():
                    self._health.on_error(cause)
                    # The same call again carries on where the one before was.
                    time.sleep(_TURN_S)
                    continue
                if cause.code() in _TAKEN_OVER:
                    raise Fenced(f"{what}: another process took over ({cause.str()})") from None
                if not cause.fatal() and (
                    cause.txn_requires_abort() or cause.code() in _REBALANCED
                ):
                    try:
                        self._abort()
                    finally:
                        # Tried again before, it would be refused again.
                        if self._obstructed or cause.code() in OBSTRUCTED:
                            self._wait_writable(self._topics)
                            self._obstructed.clear()
                    raise BrokerError(f"{what}: {cause.str()}") from None
                raise BrokerLost(f"{what}: {cause.str()}") from None

    def _abort(self) -> None:
        """Take a transaction back: nothing of it counts.

        Raises:
            BrokerLost: It cannot be known whether it does; the successor's start ends it.
        """
        while True:
            try:
                self._producer.abort_transaction()
                break
            except KafkaException as error:
                cause = error.args[0]
                if cause.fatal() or not cause.retriable():
                    why = f"a transaction cannot be aborted: {cause.str()}"
                    raise BrokerLost(why) from None
                time.sleep(_TURN_S)
        # What was told of its records is told of nothing that counts.
        self._errors.clear()

    # Records.

    def _send(self, output: Output) -> None:
        topic, partition = output.tp
        if self._packed(topic):
            for count, data in cut(output, self.tracer):
                self._produce(topic, partition, None, data, count_header(count), None)
            return
        produce = self._producer.produce
        headers: Any = output.headers or [None] * len(output.values)
        columns = output.keys, output.values, output.timestamps, headers
        moment, moment_ms = 0.0, 0
        for key, value, timestamp, header in zip(*columns, strict=True):
            if timestamp != moment:
                moment, moment_ms = timestamp, int(timestamp * 1000)
            try:
                produce(topic, value, key, partition, timestamp=moment_ms, headers=header)
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
                self._producer.poll(_TURN_S)
                self._check()
            except KafkaException as error:
                self._failed(topic, partition, error.args[0])
                self._check()

    def _flush(self) -> None:
        asked_at = time.monotonic()
        slow = False
        while left := self._producer.flush(_TURN_S):
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
            raise BrokerLost(f"a record was not written: {self._errors[0]}")

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self._failed(message.topic(), message.partition(), error)

    def _failed(self, topic: str | None, partition: int | None, error: KafkaError) -> None:
        self._errors.append(f"{topic}[{partition}]: {error.str()}")
        if topic is not None and error.code() in OBSTRUCTED:
            self._obstructed.add(topic)

    def _problem(self, error: KafkaError) -> None:
        if error.fatal():
            self._errors.append(error.str())
        else:
            self._health.on_error(error)
