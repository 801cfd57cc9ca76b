"""Topics on the cluster: made as they are declared, compared with what is there.

Every call blocks on the network: call it in a thread.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
    copies: int = 1
    config: dict[str, str] = field(default_factory=dict)
    exact: bool = False  # another number of partitions is an error, not taken as it is
    said: frozenset[str] | None = None  # what must hold of `config`, and "copies"; None: all

    @property
    def shape(self) -> str:
        """What it would be, for people."""
        parts = [f"partitions {self.partitions}", f"copies {self.copies}"]
        return ", ".join([*parts, *(f"{key} {value}" for key, value in self.config.items())])


@dataclass(frozen=True, slots=True)
class Found:
    """A topic as it is on the cluster."""

    partitions: int
    id: str
    copies: int = 1


BY_CLUSTER = {"message.timestamp.type": "LogAppendTime"}
"""Records are as old as the cluster says: it refuses none for a host's clock that is wrong."""


def changelog_config() -> dict[str, str]:
    """Of a topic that holds the rows of a table.

    A row that no marker covers yet must not take the place of one that counts: no compaction
    of what is younger than the longest time that the group has no owner.
    """
    return {
        **BY_CLUSTER,
        "cleanup.policy": "compact",
        "min.compaction.lag.ms": str(DAY_MS),
        "max.message.bytes": "1048588",
        "min.cleanable.dirty.ratio": "0.3",
    }


def markers_config() -> dict[str, str]:
    """Of a topic that holds markers: only the last of each incarnation is needed."""
    return {
        **BY_CLUSTER,
        "cleanup.policy": "compact",
        "min.compaction.lag.ms": "60000",
        "segment.ms": "3600000",
        "segment.bytes": str(64 * 1024 * 1024),
        "min.cleanable.dirty.ratio": "0.1",
    }


def retention_config(
    retention_s: float | None, *, compacting: bool = False, deleting: bool | None = None
) -> dict[str, str]:
    """Of a topic of events.

    Args:
        retention_s: How long they are kept; None: for ever.
        compacting: Of each key, the last one is kept.
        deleting: Old ones are deleted; None: unless it is compacting.
    """
    milliseconds = -1 if retention_s is None else int(retention_s * 1000)
    deletes = not compacting if deleting is None else deleting
    policies = ["compact"] * compacting + ["delete"] * (deletes or not compacting)
    return {"cleanup.policy": ",".join(policies), "retention.ms": str(milliseconds)}


class Away(BrokerError):
    """The cluster cannot be reached now."""


def ensure(
    admin: AdminClient,
    wanted: Iterable[Wanted],
    timeout_s: float = ADMIN_S,
    *,
    seen: Iterable[str] = (),
    make: bool = True,
) -> dict[str, Found]:
    """Make the topics that are not there; what each one is then.

    Args:
        seen: Further topics to look at, which are not made: saves asking for them later.
        make: False: what is not there is an error.

    Raises:
        ConfigError: A topic is there with another number of partitions, or not to be made.
        Away: The cluster cannot be reached.
        BrokerError: It cannot be made or described.
    """
    topics = {topic.name: topic for topic in wanted}
    found = describe(admin, [*topics, *(set(seen) - topics.keys())], timeout_s)
    missing = [topic for name, topic in topics.items() if name not in found]
    if missing and not make:
        raise not_to_be_made(missing)
    if missing:
        _create(admin, missing)
        found |= _appear(admin, [topic.name for topic in missing])
    check_counts(topics.values(), found)
    return found


def check_counts(wanted: Iterable[Wanted], found: Mapping[str, Found]) -> None:
    """See that topics have as many partitions as they must.

    Raises:
        ConfigError: One has not.
    """
    for topic in wanted:
        there = found.get(topic.name)
        if topic.exact and there is not None and there.partitions != topic.partitions:
            raise ConfigError(
                f"topic {topic.name!r} has {there.partitions} partitions on the cluster, the "
                f"app says {topic.partitions}: they must be the same, and cannot change",
                remedy=f"declare partitions={there.partitions}, or give the app a new "
                "`version`",
            )


def not_to_be_made(missing: Sequence[Wanted]) -> ConfigError:
    """Topics are not there, and `topic_allow_declare` is off."""
    topic = missing[0]
    return ConfigError(
        f"topic {topic.name!r} is not on the cluster, and topic_allow_declare is off",
        seen=[f"{each.name} would have {each.shape}" for each in missing],
        remedy=f"kafka-topics.sh --create --topic {topic.name} --partitions "
        f"{topic.partitions} …, or topic_allow_declare=True",
    )


def differences(topic: Wanted, found: Found, config: Mapping[str, str]) -> list[str]:
    """How a topic is on the cluster, where that is not as it is declared (pure)."""
    different = []
    if found.partitions != topic.partitions:
        different.append(f"partitions is {found.partitions}, declared is {topic.partitions}")
    if found.copies != topic.copies and (topic.said is None or "copies" in topic.said):
        different.append(f"copies is {found.copies}, declared is {topic.copies}")
    for key, value in topic.config.items():
        there = config.get(key, "")
        if topic.said is not None and key not in topic.said:
            continue
        if set(there.split(",")) != set(value.split(",")):
            different.append(f"{key} is {there or 'not set'}, declared is {value}")
    return different


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
        found[name] = found_of(topic)
    return found


def found_of(topic: Any) -> Found:
    """What the cluster's description of a topic says (pure)."""
    copies = max((len(each.replicas) for each in topic.partitions), default=1)
    return Found(len(topic.partitions), str(topic.topic_id), copies)


def _create(admin: AdminClient, missing: list[Wanted]) -> None:
    new = [
        NewTopic(topic.name, topic.partitions, topic.copies, config=topic.config)
        for topic in missing
    ]
    for name, future in admin.create_topics(new, operation_timeout=ADMIN_S).items():
        try:
            future.result()
            log.info("made topic %s", name)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise broker_error(f"topic {name!r} cannot be made", error) from error


def counts(admin: AdminClient) -> dict[str, int]:
    """Every topic of the cluster, and how many partitions it has.

    Raises:
        Away: The cluster cannot be reached.
    """
    try:
        there = admin.list_topics(timeout=TRY_S).topics
    except KafkaException as error:
        raise broker_error("the topics cannot be listed", error) from error
    return {name: len(topic.partitions) for name, topic in there.items() if not topic.error}


def ends(admin: AdminClient, tps: Iterable[TP]) -> dict[TP, int]:
    """The offset after the last record of each partition; none where the cluster is away."""
    return offsets(admin, dict.fromkeys(tps, OffsetSpec.latest()))  # type: ignore[no-untyped-call]


def lows(admin: AdminClient, tps: Iterable[TP]) -> dict[TP, int]:
    """The offset of the first record that each partition still has."""
    return offsets(admin, dict.fromkeys(tps, OffsetSpec.earliest()))  # type: ignore[no-untyped-call]


def offsets(admin: AdminClient, specs: Mapping[TP, Any]) -> dict[TP, int]:
    """The offset that each partition's OffsetSpec means; none where the cluster is away."""
    asked = {TopicPartition(*tp): spec for tp, spec in specs.items()}
    found: dict[TP, int] = {}
    futures = admin.list_offsets(asked, request_timeout=TRY_S) if asked else {}
    for place, future in futures.items():
        try:
            found[TP(place.topic, place.partition)] = future.result().offset
        except KafkaException as error:
            log.debug("offsets of %s[%d] are not told: %s", place.topic, place.partition, error)
    return found


def configs_of(
    admin: AdminClient, names: Iterable[str], timeout_s: float = ADMIN_S
) -> dict[str, dict[str, str]]:
    """The configuration of topics as the cluster has it.

    Raises:
        Away: The cluster cannot be reached.
        BrokerError: It refuses to say.
    """
    resources = [ConfigResource(ConfigResource.Type.TOPIC, name) for name in names]
    if not resources:
        return {}
    found = {}
    for resource, future in admin.describe_configs(
        resources, request_timeout=timeout_s
    ).items():
        try:
            entries = future.result()
        except KafkaException as error:
            what = f"the settings of topic {resource.name!r} are refused"
            raise broker_error(what, error) from error
        found[resource.name] = {key: str(entry.value) for key, entry in entries.items()}
    return found


def broker_error(what: str, error: KafkaException) -> BrokerError:
    """One sentence for what the cluster said."""
    cause = error.args[0]
    kind = Away if cause.code() in AWAY_CODES else BrokerError
    return kind(f"{what}: {cause.str()}")
