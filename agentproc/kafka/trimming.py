"""What a cluster may forget of the topics that an app owns.

They have no retention by time: what an agent has not done must stay, however old it is. What
is below the durable positions of all their readers is read by nobody again, and deleted. A
topic with a retention of its own keeps what is younger, too. Blocks.
"""

import logging
import time
from collections.abc import Iterable

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]

from streamd.agentproc.broker import TP
from streamd.agentproc.broker.kafka import KafkaBroker
from streamd.agentproc.kafka import topics
from streamd.agentproc.kafka.standings import Standings
from streamd.wire import TopicInfo

log = logging.getLogger(__name__)


class Trimmer:
    """Deletes what all readers of an app's own topics have done."""

    def __init__(
        self, broker: KafkaBroker, declared: Iterable[TopicInfo], standings: Standings
    ) -> None:
        self._admin = broker.admin
        self._owned = {topic.name: topic for topic in declared if topic.owned}
        self._standings = standings
        self._trimmed: dict[TP, int] = {}  # offset below which nothing is left

    def trim(self) -> int:
        """Delete up to the markers of the last look; how many partitions lost something."""
        limits = self._limits()
        young = self._young(limits)
        asked = [
            TopicPartition(*tp, min(limit, young.get(tp, limit)))
            for tp, limit in limits.items()
            if min(limit, young.get(tp, limit)) > self._trimmed.get(tp, 0)
        ]
        if not asked:
            return 0
        count = 0
        for place, future in self._admin.delete_records(asked).items():
            tp = TP(place.topic, place.partition)
            try:
                self._trimmed[tp] = future.result(topics.ADMIN_S).low_watermark
                count += 1
            except KafkaException as error:
                log.warning(
                    "%s keeps records that nobody needs any more: %s", tp, error.args[0].str()
                )
                # Not again and again: the next try is when its readers are further.
                self._trimmed[tp] = place.offset
        return count

    def _limits(self) -> dict[TP, int]:
        """The lowest position of any reader of each partition that all of them have read."""
        positions: dict[TP, list[int | None]] = {}
        for group in self._standings.groups:
            for agent in group.agents:
                for name in agent.topics:
                    if name not in self._owned:
                        continue
                    for partition in range(self._owned[name].partitions):
                        tp = TP(name, partition)
                        at = self._standings.position(group.name, agent.name, tp)
                        positions.setdefault(tp, []).append(at)
        return {
            tp: min(at for at in all if at is not None)
            for tp, all in positions.items()
            if None not in all
        }

    def _young(self, tps: Iterable[TP]) -> dict[TP, int]:
        """Where what is younger than its topic's retention begins; none where nothing is."""
        now = time.time()
        specs = {
            tp: OffsetSpec.for_timestamp(int((now - kept_s) * 1000))
            for tp in tps
            if (kept_s := self._owned[tp.topic].retention_s) is not None
        }
        found = topics.offsets(self._admin, specs) if specs else {}
        return {tp: at for tp, at in found.items() if at >= 0}
