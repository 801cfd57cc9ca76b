"""The log of an app for whoever is outside its tree, on whichever broker it is.

Kafka's client takes 0.1 s to import, which commands on the embedded log need not wait.
"""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from streamd.agentproc.broker import TP
from streamd.agentproc.broker.client import LogClient, open_log, remote_log
from streamd.agentproc.broker.reset import reset as reset_log
from streamd.app import App
from streamd.config import broker_kind
from streamd.errors import ConfigError
from streamd.instance import Folder
from streamd.link import LinkLost
from streamd.wire import GroupInfo, Hello


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
                    from streamd.agentproc.kafka import outside  # noqa: PLC0415

                    log = cluster = outside.log_of(app, datadir)
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
    from streamd.agentproc.kafka import outside  # noqa: PLC0415

    return outside.reset(app, datadir, hello, groups, dry_run=dry_run)
