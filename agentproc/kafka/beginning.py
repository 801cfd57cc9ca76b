"""Where a group begins in partitions of which no marker tells.

A group that has never run takes over, once, what the consumer group of the app's id has
committed: Faust's. Where that says nothing, it begins as the topic or the setting says.
"""

import logging
from collections.abc import Collection, Mapping

import msgspec
from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from streamd.agentproc.broker import TP
from streamd.agentproc.broker.beginning import beginning
from streamd.agentproc.kafka.markers import Marker
from streamd.agentproc.kafka.packs import position_of
from streamd.agentproc.kafka.topics import TRY_S, Away, broker_error

log = logging.getLogger(__name__)

Positions = dict[str, dict[str, int]]  # agent -> topic -> position
Extents = Mapping[TP, tuple[int, int]]  # partition -> the offsets it reaches from and to


def committed(admin: AdminClient, group: str, tps: list[TP]) -> dict[TP, int]:
    """The offsets that a consumer group has committed; blocks.

    Raises:
        Away: The cluster cannot be reached.
    """
    asked = ConsumerGroupTopicPartitions(group, [TopicPartition(*tp) for tp in tps])
    [future] = admin.list_consumer_group_offsets([asked], request_timeout=TRY_S).values()
    try:
        places = future.result().topic_partitions
    except KafkaException as error:
        what = f"the offsets of consumer group {group!r} are not told"
        if isinstance(told := broker_error(what, error), Away):
            raise told from None
        # Who may not see a group has no offsets there to take over.
        log.info("%s", told)
        return {}
    return {TP(p.topic, p.partition): p.offset for p in places if p.offset >= 0}


def forgetting(before: Marker, anew: Collection[str], gone: Collection[str] = ()) -> Marker:
    """A marker without what it says of topics that are others by now, or are gone (pure).

    Others are read from their beginning, whatever else is said of an agent's first position.
    Nor can a gap be told in them: what was sent to the former one may be lost.
    """
    if not anew and not gone:
        return before
    start = position_of(0)
    return msgspec.structs.replace(
        before,
        positions={
            agent: {
                topic: start if topic in anew else at
                for topic, at in known.items() if topic not in gone
            }
            for agent, known in before.positions.items()
        },
        highs={
            topic: highs for topic, highs in before.highs.items()
            if topic not in anew and topic not in gone
        },
    )  # fmt: skip


def first_positions(
    before: Marker,
    partition: int,
    agents: Mapping[str, list[str]],
    resets: Mapping[str, str],
    extents: Extents,
    handed: Mapping[TP, int],
    matched: Collection[str] = (),
) -> Positions:
    """The positions of all agents: those of the marker, and first ones for the others (pure).

    Args:
        handed: Offsets to take over.
        matched: Topics that a pattern means: what an agent that has run before meets later is
            read from its beginning.

    Raises:
        ConfigError: An agent has none, and must have one.
    """
    # `reset` leaves a marker without any: all is to be done again, wherever it began.
    is_reset = before.resets > 0 and not before.positions
    positions = {agent: dict(known) for agent, known in before.positions.items()}
    for agent, topics in agents.items():
        for topic in topics:
            if topic in positions.setdefault(agent, {}):
                continue
            tp = TP(topic, partition)
            low, end = extents[tp]
            if tp in handed and handed[tp] <= end:
                offset = handed[tp]
            else:
                is_later = topic in matched and agent in before.positions
                reset = resets.get(topic, "earliest")
                if is_reset or is_later:
                    reset = "earliest"
                offset = beginning(reset, agent, tp, low, end)
            positions[agent][topic] = position_of(offset)
    return positions
