"""The cluster of an app for whoever is outside its tree: `check`, `reset`, any command.

Kafka's client takes 0.1 s to import, so this is imported only where an app is on Kafka.
"""

from collections.abc import Iterator
from pathlib import Path

from streamd.agentproc.broker import TP
from streamd.agentproc.broker.client import locked
from streamd.agentproc.broker.kafka import KafkaBroker
from streamd.agentproc.kafka import checking, making, resetting
from streamd.agentproc.kafka.client import KafkaLog
from streamd.agentproc.kafka.installation import installation
from streamd.agentproc.kafka.sourcing import meant, there_for
from streamd.app import App
from streamd.wire import GroupInfo, Hello

PATIENCE_S = 5.0  # a command is to end within about ten seconds


def log_of(app: App, datadir: Path) -> KafkaLog:
    """The log of an app, without an instance that would have it already."""
    datadir.mkdir(mode=0o700, parents=True, exist_ok=True)
    broker = KafkaBroker(app.settings, app.topic_infos(), installation(datadir), PATIENCE_S)
    return KafkaLog(broker, app.hello("", alone=False).groups)


def reset(
    app: App, datadir: Path, hello: Hello, groups: list[GroupInfo], *, dry_run: bool
) -> dict[TP, int]:
    """See `streamd.agentproc.broker.outside.reset`."""
    partitions = {table.name: table.partitions for table in hello.tables}
    with locked(datadir):
        broker = KafkaBroker(app.settings, hello.topics, installation(datadir), PATIENCE_S)
        return resetting.reset(broker, groups, partitions, dry_run=dry_run)


def way_there(app: App) -> Iterator[checking.Step]:
    """The steps from here to the cluster, up to the first that fails.

    Raises:
        ConfigError: Credentials or options cannot be used.
    """
    return checking.steps(app.settings)


def topics_of(app: App, hello: Hello) -> making.Survey:
    """How the topics of an app are, and what a start would make; makes nothing.

    Raises:
        BrokerError: The cluster is away, or refuses.
    """
    broker = KafkaBroker(app.settings, hello.topics, "", PATIENCE_S)
    return making.survey(broker, hello.groups, hello.tables)


def permissions_of(app: App, hello: Hello, survey: making.Survey) -> Iterator[checking.Step]:
    """What the app may not do on the cluster that it needs to."""
    broker = KafkaBroker(app.settings, hello.topics, "", PATIENCE_S)
    agents = [agent for group in hello.groups for agent in group.agents]
    said = {topic for agent in agents for topic in agent.topics}
    read = set(meant(broker, said, there_for(broker, said)).topics)
    needs = checking.needs_of(app.settings, survey, read)
    groups = [f"{app.settings.id}.{group.name}" for group in hello.groups if group.agents]
    return checking.permissions(broker.admin, needs, survey.missing, groups)
