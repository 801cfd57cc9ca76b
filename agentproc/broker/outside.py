"""The log of an app for whoever is outside its tree, on whichever broker it is."""

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from streamd.agentproc.broker import TP
from streamd.agentproc.broker.client import LogClient, locked, open_log, remote_log
from streamd.agentproc.broker.reset import reset as reset_log
from streamd.agentproc.kafka.installation import installation
from streamd.app import App
from streamd.config import broker_kind
from streamd.errors import ConfigError
from streamd.instance import Folder
from streamd.link import LinkLost
from streamd.wire import GroupInfo, Hello

if TYPE_CHECKING:
    from streamd.agentproc.kafka.checking import Step
    from streamd.agentproc.kafka.client import KafkaLog
    from streamd.agentproc.kafka.making import Survey

PATIENCE_S = 5.0  # a command is to end within about ten seconds


@contextlib.asynccontextmanager
async def log_of(app: App, folder: Folder, datadir: Path) -> AsyncIterator[LogClient]:
    """The log of an app, through its running instance where there is one.

    Raises:
        ConfigError: Its broker is in one process alone.
        BrokerError: It cannot be used now.
    """
    log: LogClient
    match kind := broker_kind(app.settings.broker):
        case "embedded":
            async with open_log(folder, datadir) as log:
                yield log
        case "kafka":
            async with contextlib.AsyncExitStack() as stack:
                try:
                    log = await stack.enter_async_context(remote_log(folder))
                except LinkLost:
                    log = cluster = _cluster_of(app, datadir)
                    stack.push_async_callback(cluster.close)
                yield log
        case _:
            raise ConfigError(
                f"the broker is {app.settings.broker!r}: {kind} is in one process alone",
                remedy='broker="embedded://"',
            )


def reset(
    app: App, datadir: Path, hello: Hello, groups: list[GroupInfo], *, dry_run: bool
) -> dict[TP, int]:
    """Forget tables and positions of groups of an app that does not run.

    Args:
        groups: Of `hello`.

    Returns:
        The offset that each partition which they read will be read from. On the embedded log
        a dry run tells none.

    Raises:
        Busy: It runs, here or elsewhere.
        BrokerError: It cannot be done.
    """
    if broker_kind(app.settings.broker) != "kafka":
        if dry_run:
            return {}
        tables = [table for group in groups for table in group.tables]
        agents = [agent.name for group in groups for agent in group.agents]
        return reset_log(datadir, tables, agents)
    from streamd.agentproc.broker.kafka import KafkaBroker  # noqa: PLC0415
    from streamd.agentproc.kafka import resetting  # noqa: PLC0415

    partitions = {table.name: table.partitions for table in hello.tables}
    with locked(datadir):
        broker = KafkaBroker(app.settings, hello.topics, installation(datadir), PATIENCE_S)
        return resetting.reset(broker, groups, partitions, dry_run=dry_run)


def topics_on_kafka(app: App, hello: Hello) -> "Survey":
    """How the topics of an app on Kafka are, and what a start would make; makes nothing.

    Raises:
        BrokerError: The cluster is away, or refuses.
    """
    from streamd.agentproc.broker.kafka import KafkaBroker  # noqa: PLC0415
    from streamd.agentproc.kafka.making import survey  # noqa: PLC0415

    broker = KafkaBroker(app.settings, hello.topics, "", PATIENCE_S)
    return survey(broker, hello.groups, hello.tables)


def way_to_kafka(app: App) -> "Iterator[Step]":
    """The steps from here to the cluster, up to the first that fails.

    Raises:
        ConfigError: Credentials or options cannot be used.
    """
    from streamd.agentproc.kafka.checking import steps  # noqa: PLC0415

    return steps(app.settings)


def permissions_on_kafka(app: App, hello: Hello, survey: "Survey") -> "Iterator[Step]":
    """What the app may not do on the cluster that it needs to."""
    from streamd.agentproc.broker.kafka import KafkaBroker  # noqa: PLC0415
    from streamd.agentproc.kafka.checking import needs_of, permissions  # noqa: PLC0415

    broker = KafkaBroker(app.settings, hello.topics, "", PATIENCE_S)
    agents = [agent for group in hello.groups for agent in group.agents]
    needs = needs_of(
        app.settings, survey, {topic for agent in agents for topic in agent.topics}
    )
    groups = [f"{app.settings.id}.{group.name}" for group in hello.groups if group.agents]
    return permissions(broker.admin, needs, survey.missing, groups)


def _cluster_of(app: App, datadir: Path) -> "KafkaLog":
    # Kafka's client takes 0.1 s to import, which commands on the embedded log need not wait.
    from streamd.agentproc.broker.kafka import KafkaBroker  # noqa: PLC0415
    from streamd.agentproc.kafka.client import KafkaLog  # noqa: PLC0415

    datadir.mkdir(mode=0o700, parents=True, exist_ok=True)
    broker = KafkaBroker(app.settings, app.topic_infos(), installation(datadir), PATIENCE_S)
    return KafkaLog(broker, app.hello("", alone=False).groups)
