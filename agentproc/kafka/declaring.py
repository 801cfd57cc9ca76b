"""Which topics an app has on a cluster, and how they are declared (pure).

Topics of events have the names that the app gives them. Each group has a topic of markers
beside them, and each table a changelog, both with as many partitions as the group's topics.
"""

from collections.abc import Iterable, Mapping

from streamd.agentproc.kafka.topics import (
    BY_CLUSTER,
    Wanted,
    changelog_config,
    markers_config,
    retention_config,
)
from streamd.config import Settings
from streamd.errors import ConfigError
from streamd.wire import GroupInfo, TopicInfo


def markers_topic(app_id: str, group: str) -> str:
    """Where a group's markers are."""
    return f"{app_id}-{group}-markers"


def changelog_topic(app_id: str, table: str) -> str:
    """Where the rows of a table are."""
    return f"{app_id}-{table}-changes"


def group_id(app_id: str, group: str) -> str:
    """The name of a group on the cluster."""
    return f"{app_id}.{group}"


def event_topic(settings: Settings, name: str, info: TopicInfo | None) -> Wanted:
    """A topic of events.

    Args:
        info: As the app declares it; None: the app does not name it, e.g. one of replies.
    """
    copies = settings.topic_replication_factor
    if info is None:
        count = 1 if name.startswith(f"{settings.id}-reply-") else settings.topic_partitions
        config = {**retention_config(settings.topic_retention), **BY_CLUSTER}
        return Wanted(name, count, copies, config)
    # What an agent has not read must stay, however old: see `trimming`.
    kept_s = None if info.owned else info.retention_s or settings.topic_retention
    return Wanted(
        name,
        info.partitions,
        info.replicas or copies,
        {**retention_config(kept_s, compacting=info.compacting, deleting=info.deleting),
         # A pack has its events' own timestamps inside.
         **(BY_CLUSTER if info.owned and info.packed else {}),
         **info.config},
        exact=True,
        said=_said(info),
    )  # fmt: skip


def _said(info: TopicInfo) -> frozenset[str]:
    """What of a topic is the app's own word, not what it gets where it is made."""
    said = set(info.config)
    if info.owned or info.retention_s is not None:
        said.add("retention.ms")
    if info.owned or info.compacting or info.deleting is not None:
        said.add("cleanup.policy")
    if info.replicas:
        said.add("copies")
    return frozenset(said)


def topics_of(group: GroupInfo) -> list[str]:
    """The topics that a group reads."""
    return sorted({topic for agent in group.agents for topic in agent.topics})


def kept_by(
    settings: Settings, group: str, tables: Mapping[str, int], counts: Mapping[str, int]
) -> list[Wanted]:
    """Where a group keeps what it has: its markers, and its tables' changelogs.

    Args:
        tables: The group's; name -> partitions, which hold where it reads no topic.
        counts: Partitions of the topics that it reads, as they are.

    Raises:
        ConfigError: The topics have different numbers of partitions.
    """
    count = common_count(group, counts) or max(tables.values(), default=1)
    copies = settings.topic_replication_factor
    kept = [
        Wanted(changelog_topic(settings.id, table), count, copies, changelog_config(), True)
        for table in tables
    ]
    if counts or tables:
        name = markers_topic(settings.id, group)
        kept.append(Wanted(name, count, copies, markers_config(), True))
    return kept


def common_count(group: str, counts: Mapping[str, int]) -> int:
    """How many partitions each of a group's topics has; 0: it reads none.

    Raises:
        ConfigError: They differ.
    """
    if len(set(counts.values())) > 1:
        raise ConfigError(
            f"group {group!r} reads topics of different partition counts: "
            + ", ".join(f"{topic} has {count}" for topic, count in counts.items()),
            remedy="give them the same number, or read them in groups of their own with group=",
        )
    return next(iter(counts.values()), 0)


def names_of(app_id: str, groups: Iterable[GroupInfo]) -> list[str]:
    """The topics of markers and rows of these groups."""
    names = []
    for group in groups:
        names += [changelog_topic(app_id, table) for table in group.tables]
        if group.agents or group.tables:
            names.append(markers_topic(app_id, group.name))
    return names
