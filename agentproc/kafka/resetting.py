"""Forgetting what groups have done on Kafka, so that they work through their topics again.

One marker for each partition does it: of a new incarnation, without positions, and with starts
that let no row of before count. Whoever takes the partition over next deletes those rows, as
it repairs those of any owner that died. The marker's `resets` is raised: what the group sends
anew is no replay for who reads it. Blocks.
"""

import time
from collections.abc import Iterable, Sequence

from confluent_kafka import KafkaException

from streamd.agentproc.broker import TP, Output
from streamd.agentproc.broker.kafka import KafkaBroker
from streamd.agentproc.kafka import declaring, options, topics
from streamd.agentproc.kafka.appending import Appender
from streamd.agentproc.kafka.markers import (
    NOBODY,
    Marker,
    encode_marker,
    marker_key,
)
from streamd.agentproc.kafka.sourcing import meant, there_for
from streamd.agentproc.kafka.standings import Standings
from streamd.errors import BrokerError, Busy
from streamd.wire import GroupInfo

LOOK_S = 20.0


def reset(
    broker: KafkaBroker,
    groups: Sequence[GroupInfo],
    tables: dict[str, int],
    *,
    dry_run: bool,
) -> dict[TP, int]:
    """Forget tables and positions of groups that run nowhere.

    Args:
        tables: Name -> partitions.
        dry_run: Forget nothing.

    Returns:
        The offset that each partition which they read will be read from: the oldest that is
        there.

    Raises:
        Busy: A process of them is a member, on some host. What was done before it was seen
            stands.
        BrokerError: The cluster is away, or refuses.
    """
    broker.patiently(lambda: _refuse_members(broker, groups))
    said = {topic for group in groups for topic in declaring.topics_of(group)}
    names = meant(broker, said, there_for(broker, said)).topics
    found = broker.patiently(lambda: topics.describe(broker.admin, names, topics.TRY_S))
    tps = [
        TP(name, p) for name in names if name in found for p in range(found[name].partitions)
    ]
    lows = topics.lows(broker.admin, tps)
    if dry_run:
        return lows
    for group in groups:
        counts = {
            name: found.get(name, broker.wanted(name)).partitions
            for name in declaring.topics_of(group)
        }
        of_group = {table: tables[table] for table in group.tables}
        broker.ensure(declaring.kept_by(broker.settings, group.name, of_group, counts))
    _write(broker, _void(broker, groups))
    _refuse_members(broker, groups)
    _forget_offsets(broker, groups)
    return lows


def _void(broker: KafkaBroker, groups: Iterable[GroupInfo]) -> list[tuple[TP, Marker]]:
    """The marker for each partition after which nothing of before counts."""
    standings = Standings(broker, groups)
    try:
        if not standings.look(LOOK_S):
            raise BrokerError(
                "the groups' markers cannot be read to their end: a transaction of a process "
                "that was killed is open",
                remedy="this again after broker_session_timeout (10 s)",
            )
        voids = []
        for group, tp in standings.places():
            before = standings.marker(group, tp.partition) or Marker(NOBODY, 0, {}, {}, {})
            void = Marker(
                before.incarnation.successor(), 0, {}, {}, {},
                resets=before.resets + 1, moment=time.time(),
                over=before.incarnation, over_number=before.number,
            )  # fmt: skip
            voids.append((tp, void))
        return voids
    finally:
        standings.close()


def _write(broker: KafkaBroker, voids: list[tuple[TP, Marker]]) -> None:
    Appender(options.at_once(broker.reach)).append(
        [
            Output(tp, [marker_key(void.incarnation)], [encode_marker(void)], [void.moment])
            for tp, void in voids
        ]
    )


def _refuse_members(broker: KafkaBroker, groups: Iterable[GroupInfo]) -> None:
    ids = [declaring.group_id(broker.settings.id, group.name) for group in groups]
    for id, future in broker.admin.describe_consumer_groups(
        ids, request_timeout=topics.TRY_S
    ).items():
        try:
            members = future.result().members
        except KafkaException as error:
            raise topics.broker_error(f"group {id!r} cannot be described", error) from error
        if members:
            raise Busy(
                f"group {id!r} runs on the cluster; reset needs it stopped on every host",
                seen=[f"{m.group_instance_id or m.member_id} on {m.host}" for m in members],
                remedy="stop them; who was killed is a member until broker_session_timeout "
                "(10 s) is over",
            )


def _forget_offsets(broker: KafkaBroker, groups: Iterable[GroupInfo]) -> None:
    """For the cluster's own tools; nothing of ours depends on these offsets."""
    ids = [declaring.group_id(broker.settings.id, group.name) for group in groups]
    for future in broker.admin.delete_consumer_groups(
        ids, request_timeout=topics.TRY_S
    ).values():
        try:
            future.result()
        except KafkaException:
            # Most often: there is no such group.
            continue
