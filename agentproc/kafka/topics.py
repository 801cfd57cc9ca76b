"""Topics on the cluster: made as they are declared, compared with what is there.

Every call blocks on the network: call it in a thread.
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from confluent_kafka import KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    ConfigResource,
    NewTopic,
    OffsetSpec,
)

from streamd.agentproc.broker import TP
from streamd.errors import BrokerError, ConfigError

log = logging.getLogger(__name__)

ADMIN_S = 30.0
TRY_S = 5.0  # where it is tried again
DAY_MS = 24 * 3600 * 1000
AWAY_CODES = frozenset({
    KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._TIMED_OUT_QUEUE,
    KafkaError._ALL_BROKERS_DOWN, KafkaError._RESOLVE, KafkaError.REQUEST_TIMED_OUT,
    KafkaError.LEADER_NOT_AVAILABLE, KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.COORDINATOR_NOT_AVAILABLE, KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.NOT_CONTROLLER,
})  # fmt: skip
"""Errors that pass by themselves."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A topic as it is declared."""

    name: str
    partitions: int
    replicas: int = 1
    config: dict[str, str] = field(default_factory=dict)
    exact: bool = False  # another number of partitions is an error, not taken as it is


@dataclass(frozen=True, slots=True)
class Found:
    """A topic as it is on the cluster."""

    partitions: int
    id: str


def changelog_config() -> dict[str, str]:
    """Of a topic that holds the rows of a table.

    A row that no marker covers yet must not take the place of one that counts: no compaction
    of what is younger than the longest time that the group has no owner.
    """
    return {
        "cleanup.policy": "compact",
        "min.compaction.lag.ms": str(DAY_MS),
        "max.message.bytes": "1048588",
        "min.cleanable.dirty.ratio": "0.3",
    }


def markers_config() -> dict[str, str]:
    """Of a topic that holds markers: only the last of each incarnation is needed."""
    return {
        "cleanup.policy": "compact",
        "min.compaction.lag.ms": "60000",
        "segment.ms": "3600000",
        "segment.bytes": str(64 * 1024 * 1024),
        "min.cleanable.dirty.ratio": "0.1",
    }


def retention_config(retention_s: float | None) -> dict[str, str]:
    """Of a topic of events that are kept for a time; None: for ever."""
    milliseconds = -1 if retention_s is None else int(retention_s * 1000)
    return {"cleanup.policy": "delete", "retention.ms": str(milliseconds)}


class Away(BrokerError):
    """The cluster cannot be reached now."""


def ensure(
    admin: AdminClient, wanted: Iterable[Wanted], timeout_s: float = ADMIN_S
) -> dict[str, Found]:
    """Make the topics that are not there; what each one is then.

    Raises:
        ConfigError: A topic is there with another number of partitions.
        Away: The cluster cannot be reached.
        BrokerError: It cannot be made or described.
    """
    topics = {topic.name: topic for topic in wanted}
    found = describe(admin, topics, timeout_s)
    missing = [topic for name, topic in topics.items() if name not in found]
    if missing:
        _create(admin, missing)
        found |= _appear(admin, [topic.name for topic in missing])
    for name, topic in topics.items():
        if topic.exact and found[name].partitions != topic.partitions:
            raise ConfigError(
                f"topic {name!r} has {found[name].partitions} partitions on the cluster, the "
                f"app says {topic.partitions}: their number cannot change",
                remedy=f"declare partitions={found[name].partitions}, or give the app a new "
                "`version`",
            )
    return found


def _appear(admin: AdminClient, names: list[str]) -> dict[str, Found]:
    """What was made, once each broker knows of it."""
    deadline = time.monotonic() + ADMIN_S
    while True:
        found = describe(admin, names)
        missing = [name for name in names if name not in found]
        if not missing:
            return found
        if time.monotonic() > deadline:
            raise BrokerError(
                f"topic {missing[0]!r} was made, and the cluster does not show it"
            )
        time.sleep(0.02)


def describe(
    admin: AdminClient, names: Iterable[str], timeout_s: float = ADMIN_S
) -> dict[str, Found]:
    """What each topic is; those that are not there are left out.

    Raises:
        BrokerError: The cluster refuses to say.
    """
    wanted = list(names)
    if not wanted:
        return {}
    found: dict[str, Found] = {}
    futures = admin.describe_topics(TopicCollection(wanted), request_timeout=timeout_s)
    for name, future in futures.items():
        try:
            topic = future.result()
        except KafkaException as error:
            if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                continue
            raise broker_error(f"topic {name!r} cannot be described", error) from error
        found[name] = Found(len(topic.partitions), str(topic.topic_id))
    return found


def _create(admin: AdminClient, missing: list[Wanted]) -> None:
    new = [
        NewTopic(topic.name, topic.partitions, topic.replicas, config=topic.config)
        for topic in missing
    ]
    for name, future in admin.create_topics(new, operation_timeout=ADMIN_S).items():
        try:
            future.result()
            log.info("made topic %s", name)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise broker_error(f"topic {name!r} cannot be made", error) from error


def ends(admin: AdminClient, tps: Iterable[TP]) -> dict[TP, int]:
    """The offset after the last record of each partition; none where the cluster is away."""
    asked = {TopicPartition(*tp): OffsetSpec.latest() for tp in tps}  # type: ignore[no-untyped-call]
    found: dict[TP, int] = {}
    futures = admin.list_offsets(asked, request_timeout=TRY_S) if asked else {}
    for place, future in futures.items():
        try:
            found[TP(place.topic, place.partition)] = future.result().offset
        except KafkaException as error:
            log.debug("the end of %s[%d] is not told: %s", place.topic, place.partition, error)
    return found


def config_of(admin: AdminClient, name: str) -> dict[str, str]:
    """The configuration of a topic as the cluster has it."""
    resource = ConfigResource(ConfigResource.Type.TOPIC, name)
    (future,) = admin.describe_configs([resource], request_timeout=ADMIN_S).values()
    try:
        return {key: entry.value for key, entry in future.result().items()}
    except KafkaException as error:
        raise broker_error(f"the settings of topic {name!r} are refused", error) from error


def broker_error(what: str, error: KafkaException) -> BrokerError:
    """One sentence for what the cluster said."""
    cause = error.args[0]
    kind = Away if cause.code() in AWAY_CODES else BrokerError
    return kind(f"{what}: {cause.str()}")
