"""What an app declares, held against what is on the cluster, and made. Blocks."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from streamd.agentproc.broker.kafka import KafkaBroker
from streamd.agentproc.kafka import declaring, topics
from streamd.agentproc.kafka.sourcing import meant, there_for
from streamd.agentproc.kafka.topics import Found, Wanted
from streamd.errors import ConfigError, StreamdError
from streamd.patterns import is_pattern
from streamd.wire import GroupInfo, TableInfo


@dataclass(slots=True)
class Survey:
    """What was found."""

    found: dict[str, Found]
    missing: list[Wanted] = field(default_factory=list)
    different: dict[str, list[str]] = field(default_factory=dict)  # topic -> how
    refused: list[StreamdError] = field(default_factory=list)  # why groups cannot run


def survey(
    broker: KafkaBroker, groups: Iterable[GroupInfo], tables: Iterable[TableInfo]
) -> Survey:
    """Look at all topics that an app declares, its groups' and tables' too; make nothing.

    Raises:
        BrokerError: The cluster is away for longer than the broker's patience, or refuses.
    """
    groups = list({group.name: group for group in groups}.values())
    partitions = {table.name: table.partitions for table in tables}
    made = [name for name in broker.declared if not is_pattern(name)]
    wanted = [broker.wanted(name) for name in made]
    names = {*made, *declaring.names_of(broker.settings.id, groups)}
    said = {topic for group in groups for topic in declaring.topics_of(group)}
    names |= set(meant(broker, said, there_for(broker, said)).topics)
    found = broker.patiently(lambda: topics.describe(broker.admin, names, topics.TRY_S))
    result = Survey(found)
    for group in groups:
        counts = {
            topic: found[topic].partitions
            if topic in found
            else broker.wanted(topic).partitions
            for topic in declaring.topics_of(group)
        }
        of_tables = {table: partitions.get(table, 1) for table in group.tables}
        try:
            wanted += declaring.kept_by(broker.settings, group.name, of_tables, counts)
        except ConfigError as error:
            result.refused.append(error)
    there = [topic for topic in wanted if topic.name in found]
    configs = broker.patiently(
        lambda: topics.configs_of(broker.admin, [t.name for t in there], topics.TRY_S)
    )
    result.missing = [topic for topic in wanted if topic.name not in found]
    for topic in there:
        if how := topics.differences(topic, found[topic.name], configs[topic.name]):
            result.different[topic.name] = how
        try:
            topics.check_counts([topic], found)
        except ConfigError as error:
            result.refused.append(error)
    if result.missing and not broker.settings.topic_allow_declare:
        result.refused.append(topics.not_to_be_made(result.missing))
    return result


def make(
    broker: KafkaBroker, groups: Iterable[GroupInfo], tables: Iterable[TableInfo]
) -> Survey:
    """Make what is missing; what was found before.

    Raises:
        ConfigError: What is there does not fit the app, or may not be made.
        BrokerError: The cluster is away for longer than the broker's patience, or refuses.
    """
    result = survey(broker, groups, tables)
    if result.refused:
        raise result.refused[0]
    broker.ensure(result.missing)
    return result
