"""What a Kafka holds of an instance's app: topics, and tables by their changelogs.

A changelog is read as whoever knows nothing of markers reads it: the last row of each key. So
what a crash left behind, and nobody repaired, is seen.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from chaos_content import Row
from chaos_tree import Tree
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from streamd.agentproc.broker import TP
from streamd.agentproc.kafka.markers import (
    STAMP_BYTES,
    Marker,
    decode_marker,
    newest,
    unpack_highs,
)
from streamd.agentproc.kafka.packs import offset_of, open_pack, packed_count, position_of
from streamd.agentproc.kafka.sources import sift
from streamd.tables import SCATTERED_MARK

READ_S = 60.0


class KafkaContent:
    """See `chaos_content.Content`."""

    def __init__(self, made: Tree) -> None:
        self._made = made
        self.exactly_once = "exactly_once" in made.environment.values()
        options = {
            "bootstrap.servers": made.broker,
            "group.id": f"{made.app_id}-oracle",
            "enable.partition.eof": True,
            "enable.auto.commit": False,
            "fetch.wait.max.ms": 10,
            "log_level": 3,
        }
        self._consumer = Consumer({**options, "isolation.level": "read_committed"})
        # Its ends are behind transactions that are open: what they hold is waited for.
        self._ends = Consumer({**options, "isolation.level": "read_uncommitted"})

    def close(self) -> None:
        self._consumer.close()
        self._ends.close()

    def behind(self) -> dict[str, int]:
        """Records that an agent has not settled, by agent and topic; only those behind."""
        found: dict[str, int] = {}
        for group, agents in self._reads().items():
            markers = self._newest(f"{self._made.app_id}-{group}-markers")
            for agent, topic in agents.items():
                count = sum(
                    self._unsettled(agent, topic, partition, markers.get(partition))
                    for partition in range(self._partitions(topic))
                )
                if count:
                    found[f"{agent} {topic}"] = count
        return found

    def _reads(self) -> dict[str, dict[str, str]]:
        """Group -> agent -> the topic that it reads."""
        prefix = self._made.prefix
        return {
            "split": {"proj.split": f"{prefix}posts"},
            "count": {"proj.count": f"{self._made.app_id}-proj.count"},
            "bank": {"proj.bank": f"{prefix}transfers", "proj.deposit": f"{prefix}deposits"},
        }

    def _newest(self, topic: str) -> dict[int, Marker]:
        markers: dict[int, list[Marker]] = defaultdict(list)
        for message in self._records(topic):
            if message.value() is not None:
                markers[message.partition()].append(decode_marker(message.value()))
        return {partition: newest(each) for partition, each in markers.items()}

    def _unsettled(self, agent: str, topic: str, partition: int, marker: Marker | None) -> int:
        position = marker.positions.get(agent, {}).get(topic, 0) if marker else 0
        highs = unpack_highs(marker.highs.get(topic, [])) if marker else {}
        count = 0
        for message in self._records(topic, partition, offset_of(position)):
            tp, offset = TP(topic, partition), message.offset()
            kept = [(0, 1)]
            if packed_count(message.headers()):
                columns = open_pack(message.value(), tp, offset)
                kept = [(0, len(columns.values))]
                if columns.runs is not None:
                    kept = sift(highs, columns.runs, [])
            count += sum(
                position_of(offset, index) >= position
                for pair in kept
                for index in range(*pair)
            )
        return count

    def topic(self, name: str) -> list[list[Row]]:
        """Every event of a plain topic that the app names, by partition, in order."""
        return self._rows(self._made.prefix + name)

    def _rows(self, topic: str) -> list[list[Row]]:
        rows: list[list[Row]] = [[] for _ in range(self._partitions(topic))]
        for message in self._records(topic):
            rows[message.partition()].append(
                {
                    "key": (message.key() or b"").decode(),
                    "value": json.loads(message.value() or b"null"),
                    "headers": dict(message.headers() or []),
                }
            )
        return rows

    def table(self, name: str, partitions: int) -> dict[tuple[int, str], Any]:
        """Every row of a table: (partition, key) → value."""
        rows: dict[tuple[int, str], Any] = {}
        for message in self._records(f"{self._made.app_id}-{name}-changes"):
            if (key := message.key()) == SCATTERED_MARK:
                continue
            place = message.partition(), json.loads(key)
            if (value := message.value()) is None:
                rows.pop(place, None)
            else:
                rows[place] = json.loads(value[STAMP_BYTES:])
        return rows

    def dead_letters(self) -> list[Row]:
        """Every dead letter of the app."""
        return [row for rows in self._rows(f"{self._made.app_id}-dead-letters") for row in rows]

    def damage(self) -> list[str]:
        """What is wrong with the broker itself: not ours to say."""
        return []

    def _partitions(self, topic: str) -> int:
        known = self._consumer.list_topics(topic, timeout=READ_S).topics[topic]
        return 0 if known.error else len(known.partitions)

    def _records(
        self, topic: str, partition: int | None = None, offset: int = 0
    ) -> Iterator[Any]:
        """Every record that a topic has now, or a partition of it from `offset` on."""
        each = [partition] if partition is not None else range(self._partitions(topic))
        left: dict[int, int] = {}  # partition -> its end
        places = []
        for number in each:
            place = TopicPartition(topic, number)
            low, high = self._ends.get_watermark_offsets(place, timeout=READ_S)
            place.offset = max(low, offset)
            if place.offset < high:
                left[number] = high
                places.append(place)
        self._consumer.assign(places)
        deadline = time.monotonic() + READ_S
        while left:
            assert time.monotonic() < deadline, f"{topic} is not read after {READ_S:.0f} s"
            for message in self._consumer.consume(1000, 0.02):
                at: Any = message.partition()
                end = (message.offset() or 0) + 1
                if (error := message.error()) is None:
                    if at in left:
                        yield message
                    if end >= left.get(at, 0):
                        left.pop(at, None)
                elif error.code() == KafkaError._PARTITION_EOF:
                    if end > left.get(at, 0):
                        left.pop(at, None)
                elif error.fatal():
                    raise KafkaException(error)
        self._consumer.unassign()
