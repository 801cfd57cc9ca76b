"""`lag`: how far behind each agent is."""

import asyncio

import click
import msgspec

from streamd.agentproc.broker.outside import log_of
from streamd.cli import output, target
from streamd.cli.describe import one_or_all
from streamd.cli.imported import import_app
from streamd.cli.options import given
from streamd.cli.root import Command
from streamd.wire import LagRow


def lag(name: str | None) -> None:
    """Show how far behind each agent is, by topic and partition.

    From what is committed, also where nothing runs. On Kafka these are records: one may hold
    many events, and the mark at the end of a transaction counts as one.
    """
    app, origin = import_app(given(), as_running=True)
    groups = app.hello(origin, alone=False).groups
    group_of = {agent.name: group.name for group in groups for agent in group.agents}
    label_of = {agent.name: agent.label for group in groups for agent in group.agents}
    folder, datadir = target.folder_of(given()), app.settings.datadir
    assert datadir is not None

    async def ask() -> list[LagRow]:
        async with log_of(app, folder, datadir.absolute()) as log:
            return await log.lag()

    rows = [
        {"group": group_of[row.agent], "label": label_of[row.agent], **msgspec.to_builtins(
            {field: getattr(row, field) for field in LagRow.__struct_fields__}
        )}
        for row in asyncio.run(ask())
        if row.agent in group_of
    ]  # fmt: skip
    rows = one_or_all(rows, name, "agent, group or topic", ("agent", "label", "group", "topic"))
    if given().json:
        total = sum(row["behind"] for row in rows)
        output.say_json({"schema": "streamd.lag/1", "behind": total, "lag": rows})
        return
    shown = ["group", "label", "topic", "partition", "position", "end", "behind"]
    cells = [[row[key] for key in shown] for row in rows]
    headers = ["group", "agent", *shown[2:]]
    output.say(output.columns(cells, headers, right=[3, 4, 5, 6]) if rows else "no agents")


lag_command = Command(
    "lag",
    callback=lag,
    help=lag.__doc__,
    params=[click.Argument(["name"], required=False, help="An agent, a group or a topic.")],
)
