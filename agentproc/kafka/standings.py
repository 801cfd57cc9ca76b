"""Where the groups of an app stand: their newest markers, followed as they are written.

For whoever is no member: it tells how far behind they are, and what nobody needs any more.
Everything here blocks, and is called by one thread at a time.
"""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from confluent_kafka import Consumer, KafkaError, TopicPartition

from streamd.agentproc.broker import TP
from streamd.agentproc.broker.kafka import KafkaBroker
from streamd.agentproc.kafka import declaring, options, topics
from streamd.agentproc.kafka.markers import Marker, Newest, decode_marker
from streamd.agentproc.kafka.packs import offset_of
from streamd.agentproc.kafka.sourcing import meant, there_for
from streamd.errors import BrokerError
from streamd.wire import GroupInfo, LagRow

CHUNK_RECORDS = 10_000
POLL_S = 0.1


class Standings:
    """The markers of these groups.

    Args:
        fetch_s: How long one request for more may wait: the longer, the less an idle cluster
            is asked, and the later an end is seen that is the mark of a transaction.
    """

    def __init__(
        self, broker: KafkaBroker, groups: Iterable[GroupInfo], fetch_s: float = 0.01
    ) -> None:
        self._broker = broker
        self.groups = [group for group in groups if group.agents or group.tables]
        self._topics = {
            declaring.markers_topic(broker.settings.id, group.name): group.name
            for group in self.groups
        }
        self._newest: dict[tuple[str, int], Newest] = {}  # group, partition
        self._next: dict[TP, int] = {}  # markers' partitions that are read -> offset
        self._ids: dict[str, str] = {}  # topic -> id
        name, wait_ms = f"{broker.settings.id}.standings", int(fetch_s * 1000)
        self._consumer = Consumer(options.reader(broker.reach, name, fetch_wait_max_ms=wait_ms))

    def close(self) -> None:
        """Let go of the connection."""
        self._consumer.close()

    def marker(self, group: str, partition: int) -> Marker | None:
        """What counts of a partition as of the last look; None: nothing was ever done."""
        found = self._newest.get((group, partition))
        return found.marker if found is not None else None

    def places(self) -> list[tuple[str, TP]]:
        """Group, and partition of its markers, of all that were there at the last look."""
        return [(self._topics[tp.topic], tp) for tp in self._next]

    def look(self, within_s: float) -> bool:
        """Read what was written since; False if the end was not reached in time.

        Raises:
            Away: The cluster is away for longer than the broker's patience.
        """
        self._find_topics()
        if not self._next:
            return True
        ends = topics.ends(self._broker.admin, self._next)
        deadline = time.monotonic() + within_s
        left = {tp for tp in self._next if self._next[tp] < ends.get(tp, 0)}
        while left and time.monotonic() < deadline:
            for message in self._messages():
                tp = TP(message.topic(), message.partition())
                if (error := message.error()) is not None:
                    # The end, also where the last offsets hold no record.
                    if error.code() == KafkaError._PARTITION_EOF:
                        self._next[tp] = max(self._next[tp], message.offset())
                    continue
                self._next[tp] = message.offset() + 1
                self._note(tp, message.value())
            left = {tp for tp in left if self._next[tp] < ends[tp]}
        return not left and len(ends) == len(self._next)

    def _messages(self) -> Iterator[Any]:
        first: Any = self._consumer.poll(POLL_S)
        if first is not None:
            yield first
            yield from self._consumer.consume(CHUNK_RECORDS - 1, 0)

    def _note(self, tp: TP, value: bytes | None) -> None:
        if value is None:
            return
        place = self._topics[tp.topic], tp.partition
        try:
            self._newest.setdefault(place, Newest()).add(decode_marker(value))
        except msgspec.DecodeError as error:
            raise BrokerError(
                f"{tp} holds a record that is no marker: {error}",
                remedy=f"find who writes to {tp.topic!r}; only streamd does",
            ) from None

    def _find_topics(self) -> None:
        """Begin with topics that are there by now; begin anew with one that was made anew."""
        admin = self._broker.admin
        found = self._broker.patiently(
            lambda: topics.describe(admin, self._topics, topics.TRY_S)
        )
        ids = {name: topic.id for name, topic in found.items()}
        if ids == self._ids:
            return
        for name in {name for name in self._topics if ids.get(name) != self._ids.get(name)}:
            self._next = {tp: at for tp, at in self._next.items() if tp.topic != name}
            group = self._topics[name]
            self._newest = {key: each for key, each in self._newest.items() if key[0] != group}
            if name in found:
                self._next |= {TP(name, p): 0 for p in range(found[name].partitions)}
        self._ids = ids
        self._consumer.assign(
            [
                TopicPartition(*tp, at or options.BEGINNING)
                for tp, at in self._next.items()
            ]
        )  # fmt: skip

    # How far behind they are.

    def lag(self) -> list[LagRow]:
        """Where each agent is in each partition, as of the last look; ends are asked for."""
        broker = self._broker
        said = {topic for group in self.groups for topic in declaring.topics_of(group)}
        there = there_for(broker, said)
        names = meant(broker, said, there).topics
        found = broker.patiently(lambda: topics.describe(broker.admin, names, topics.TRY_S))
        # A topic that is not there yet is empty.
        counts = {name: found.get(name, broker.wanted(name)).partitions for name in names}
        tps = [TP(name, p) for name in names for p in range(counts[name])]
        ends = topics.ends(broker.admin, [tp for tp in tps if tp.topic in found])
        rows: list[LagRow] = []
        unread: list[LagRow] = []
        for group in self.groups:
            for agent in group.agents:
                reads = set(meant(broker, agent.topics, there).topics)
                for tp in (tp for tp in tps if tp.topic in reads):
                    end = ends.get(tp, 0)
                    at = self.position(group.name, agent.name, tp)
                    behind = 0 if at is None else max(0, end - at)
                    row = LagRow(agent.name, tp.topic, tp.partition, at, end, behind)
                    rows.append(row)
                    if at is None:
                        unread.append(row)
        lows = topics.lows(
            broker.admin, {TP(row.topic, row.partition) for row in unread if row.end}
        )
        for row in unread:
            row.behind = row.end - min(row.end, lows.get(TP(row.topic, row.partition), 0))
        return rows

    def position(self, group: str, agent: str, tp: TP) -> int | None:
        """The offset of the record that an agent reads next; None: it has read nothing."""
        marker = self.marker(group, tp.partition)
        stored = marker.positions.get(agent, {}).get(tp.topic) if marker is not None else None
        return None if stored is None else offset_of(stored)
