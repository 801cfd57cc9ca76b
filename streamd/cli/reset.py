"""`reset`: forget tables, and read their topics again."""

import click

from streamd.agentproc.broker.outside import reset as forget
from streamd.cli import output, target
from streamd.cli.imported import import_app
from streamd.cli.options import display_path, given
from streamd.cli.root import Command
from streamd.config import broker_kind
from streamd.errors import Busy, ConfigError, UsageError
from streamd.secrets import mask
from streamd.wire import GroupInfo, Hello


def reset(names: tuple[str, ...], dry_run: bool, yes: bool) -> int:
    """Delete tables and offsets; they are rebuilt from the log.

    The agents that write these tables read their topics again, from the oldest record that
    the log retains. Refuses while the app runs, on Kafka on any host. Shows what will go and
    asks.
    """
    options = given()
    app, origin = import_app(options)
    folder = target.folder_of(options)
    if who := target.living(folder):
        name = folder.path.name
        raise Busy(
            f"{name} is running (pid {who.pid}); reset needs it stopped",
            remedy=f"streamd stop --name {name}, then this again",
        )
    kind, datadir = broker_kind(app.settings.broker), app.settings.datadir
    if kind == "memory":
        raise ConfigError(
            f"the broker is {app.settings.broker}, which forgets everything when it stops",
            remedy="reset is for embedded:// and kafka://",
        )
    assert datadir is not None
    datadir = datadir.absolute()
    where = display_path(datadir) if kind == "embedded" else mask(app.settings.broker)
    hello = app.hello(origin, alone=False)
    groups = _groups_of(hello, names)
    if not groups or (kind == "embedded" and not datadir.exists()):
        output.note(f"No table is stored in {where}. Nothing done.")
        return 0
    if not options.json:
        output.note(f"{'Would delete' if dry_run else 'This deletes'}, in {where}:")
        for group in groups:
            output.note(f"  tables {', '.join(group.tables)}")
            for agent in group.agents:
                output.note(
                    f"  offsets of {agent.label}, which reads {', '.join(agent.topics)}"
                )
    if not dry_run and not yes:
        output.confirm("Go on?")
    starts = forget(app, datadir, hello, groups, dry_run=dry_run)
    if options.json:
        output.say_json(
            {
                "schema": "streamd.reset/1",
                "tables": [table for group in groups for table in group.tables],
                "agents": [agent.name for group in groups for agent in group.agents],
                "done": not dry_run,
                "from": {str(tp): offset for tp, offset in starts.items()},
            }
        )
    else:
        for tp, offset in starts.items():
            output.say(
                f"{tp} {'would be' if dry_run else 'is'} read again from offset {offset}"
            )
    return 0


def _groups_of(hello: Hello, names: tuple[str, ...]) -> list[GroupInfo]:
    """The groups that write these tables, or all that write any.

    Raises:
        UsageError: There is no such table, or a group writes others as well.
    """
    known = [table.name for table in hello.tables]
    for name in names:
        if name not in known:
            raise UsageError(
                f"no table is named {name!r}", seen=[f"there is {other}" for other in known]
            )
    groups = [group for group in hello.groups if group.tables]
    if not names:
        return groups
    chosen = [group for group in groups if set(group.tables) & set(names)]
    for group in chosen:
        # The agents read all of it again: a table that is kept would count it twice.
        if kept := set(group.tables) - set(names):
            raise UsageError(
                f"group {group.name} also writes {', '.join(sorted(kept))}: "
                "tables of one group are reset together",
                remedy=f"streamd reset {' '.join(group.tables)}",
            )
    return chosen


reset_command = Command(
    "reset",
    callback=reset,
    help=reset.__doc__,
    params=[
        click.Argument(["names"], nargs=-1, metavar="[TABLE]...", help="All when left out."),
        click.Option(["--dry-run"], is_flag=True, help="Only list."),
        click.Option(["-y", "--yes"], is_flag=True, help="Do not ask."),
    ],
)
