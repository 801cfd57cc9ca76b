"""Marking what an outage left without a mark: transactions that are over and still look open.

A coordinator that comes back before the other partitions have leaders takes these for deleted,
and ends a transaction without marking it there (Kafka 4.3: "Couldn't find leader endpoint for
partitions … these partitions are likely deleted already"). Nobody reads past the beginning of
such a transaction, and the next one of the same producer in the same partition decides of both:
what was aborted would count, what was committed might not.

So a producer, before its first transaction, asks what was decided of those before it, and where
one still looks open it makes one of its own that ends in the same way, with a record that means
nothing. The cluster marks them together, for they are of one producer. Nothing that is alive is
ended: whoever had the id before is fenced, and what it did was over when `init_transactions`
returned.
"""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from confluent_kafka import (
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from streamd.agentproc.broker import TP
from streamd.agentproc.kafka import decisions, options, topics

log = logging.getLogger(__name__)

MOST_RECORDS = 20_000  # of the coordinator's log, from its end
CHUNK_RECORDS = 1000
AGAIN_S = 0.2  # what is alive has gone on by then
MARKED_S = 5.0
READ_S = 10.0
GONE_S = 1.0  # until a topic that is not known is taken for deleted
MOMENT_S = 0.02
_NOT_TOLD = (
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION,
)


class Nothing(NamedTuple):
    """A record that means nothing where it is read."""

    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]


KEY = b"streamd-nothing"


class Mending:
    """Of one transactional id. Everything here blocks.

    Args:
        nothing: What means nothing in a topic; None: any record there would be seen.
    """

    def __init__(
        self,
        reach: options.Reach,
        admin: AdminClient,
        transactional_id: str,
        nothing: Callable[[str], Nothing | None],
    ) -> None:
        self._reach = reach
        self._admin = admin
        self._id = transactional_id
        self._nothing = nothing

    def mend(self, producer: Producer) -> None:
        """Mark what has no mark, with a producer that has just got the id.

        Raises:
            KafkaException: It could not be done, or seen whether it is to be done.
        """
        try:
            decided = self._decided()
        except ValueError as error:
            log.warning("what became of the transactions of %s is not known: %s",
                        self._id, error)  # fmt: skip
            return
        except KafkaException as error:
            if error.args[0].code() not in _NOT_TOLD:
                raise
            log.info("what became of the transactions of %s is not told: %s",
                     self._id, error.args[0].str())  # fmt: skip
            return
        if not (seen := self._open(decided)):
            return
        time.sleep(AGAIN_S)
        hanging = {tp: offset for tp, offset in self._open(seen).items() if offset == seen[tp]}
        self._end(producer, [tp for tp in hanging if not decided[tp]], commits=False)
        self._end(producer, [tp for tp in hanging if decided[tp]], commits=True)
        self._tell(hanging, decided)

    def _decided(self) -> dict[TP, bool]:
        """Of each partition that a transaction touched: was the last one committed?"""
        asked = TopicCollection([decisions.TOPIC])
        [future] = self._admin.describe_topics(asked, request_timeout=topics.TRY_S).values()
        number = decisions.place_of(self._id, topics.found_of(future.result()).partitions)
        values = self._values(TP(decisions.TOPIC, number), decisions.key_of(self._id))
        return {
            TP(*place): commits for place, commits in decisions.decided(values).items()
            if not place[0].startswith("__")
        }  # fmt: skip

    def _values(self, tp: TP, key: bytes) -> list[bytes | None]:
        found: list[bytes | None] = []
        consumer = Consumer(options.reader(self._reach, "streamd-mending"))
        try:
            place = TopicPartition(*tp)
            low, high = consumer.get_watermark_offsets(place, timeout=READ_S)
            place.offset = at = max(low, high - MOST_RECORDS)
            if at >= high:
                return found
            consumer.assign([place])
            deadline = time.monotonic() + READ_S
            while at < high:
                if time.monotonic() > deadline:
                    raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
                first: Any = consumer.poll(0.1)
                if first is None:
                    continue
                for message in (first, *consumer.consume(CHUNK_RECORDS, 0)):
                    if (error := message.error()) is None:
                        at = message.offset() + 1
                        if message.key() == key:
                            found.append(message.value())
                    elif error.code() == KafkaError._PARTITION_EOF:
                        at = max(at, message.offset())
                    elif error.fatal() or error.code() in _NOT_TOLD:
                        raise KafkaException(error)
        finally:
            consumer.close()
        return found

    def _open(self, tps: Iterable[TP]) -> dict[TP, int]:
        """Where the first transaction begins that is open in each of these, or looks so."""
        asked = list(tps)
        stable = self._ends(asked, IsolationLevel.READ_COMMITTED)
        ends = self._ends(list(stable), IsolationLevel.READ_UNCOMMITTED)
        return {tp: at for tp, at in stable.items() if at < ends.get(tp, 0)}

    def _ends(self, tps: list[TP], level: IsolationLevel) -> dict[TP, int]:
        """Of those partitions that are there and may be read."""
        found: dict[TP, int] = {}
        left = [TopicPartition(*tp) for tp in tps]
        asked_at = time.monotonic()
        while left:
            latest: Any = OffsetSpec.latest()  # type: ignore[no-untyped-call]
            specs = dict.fromkeys(left, latest)
            refused: list[TopicPartition] = []
            for place, future in self._admin.list_offsets(
                specs, isolation_level=level, request_timeout=topics.TRY_S
            ).items():
                try:
                    found[TP(place.topic, place.partition)] = future.result().offset
                except KafkaException as error:
                    is_gone = error.args[0].code() in _NOT_TOLD
                    if time.monotonic() - asked_at < (GONE_S if is_gone else READ_S):
                        # A broker that has just come back does not know all at once.
                        refused.append(place)
                    elif not is_gone:
                        raise
            if left := refused:
                time.sleep(MOMENT_S)
        return found

    def _end(self, producer: Producer, tps: list[TP], *, commits: bool) -> None:
        records = {tp: self._nothing(tp.topic) for tp in tps}
        if not commits:
            # It will not be read; a compacted topic takes none without a key.
            records = dict.fromkeys(tps, Nothing(KEY, None, []))
        if not any(records.values()):
            return
        producer.begin_transaction()
        for (topic, partition), record in records.items():
            if record is not None:
                headers: Any = record.headers
                producer.produce(topic, record.value, record.key, partition, headers=headers)
        # What is still unsent when it is aborted would leave no mark.
        producer.flush(READ_S)
        if commits:
            producer.commit_transaction(READ_S)
        else:
            producer.abort_transaction(READ_S)

    def _tell(self, hanging: dict[TP, int], decided: dict[TP, bool]) -> None:
        """Log what was ended; what is left was another producer's, and is alive perhaps."""
        left = dict(hanging)
        deadline = time.monotonic() + MARKED_S
        while left and time.monotonic() < deadline:
            time.sleep(MOMENT_S)
            still = self._open(left)
            for tp in [tp for tp, offset in left.items() if still.get(tp) != offset]:
                log.warning(
                    "%s: ended a transaction that hung there from offset %d on; it was %s",
                    tp, left.pop(tp), "committed" if decided[tp] else "aborted",
                )  # fmt: skip
