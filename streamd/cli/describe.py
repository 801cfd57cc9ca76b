"""`agents topics tables models cron config`: what an app is.

Told by the running instance, else by importing the app here.
"""

import datetime
from typing import Any

import click

from streamd.cli import output, talk
from streamd.cli.imported import figures_of, hello_of
from streamd.cli.options import given
from streamd.cli.root import Command
from streamd.config import Settings
from streamd.cron import Cron, zone_of
from streamd.errors import UsageError
from streamd.wire import Hello, TimerInfo, TopicInfo


def one_or_all(
    rows: list[dict[str, Any]], name: str | None, what: str, names: tuple[str, ...] = ("name",)
) -> list[dict[str, Any]]:
    """The row that is meant, or all.

    Raises:
        UsageError: None is named so.
    """
    if name is None:
        return rows
    found = [row for row in rows if name in [row[key] for key in names]]
    if not found:
        raise UsageError(
            f"no {what} is named {name!r}",
            seen=list(dict.fromkeys(f"there is {row[names[0]]}" for row in rows))[:20],
        )
    return found


def show(
    schema: str, rows: list[dict[str, Any]], shown: list[str], right: tuple[str, ...] = ()
) -> None:
    """Rows as columns, or all their fields as one JSON document."""
    if given().json:
        output.say_json({"schema": f"streamd.{schema}/1", schema: rows})
        return
    cells = [[_cell(row[key]) for key in shown] for row in rows]
    indexes = [shown.index(key) for key in right]
    output.say(output.columns(cells, shown, right=indexes) if rows else f"no {schema}")


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return " ".join(map(str, value)) or None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return output.count(value)
    return value or None


def _argument() -> click.Argument:
    return click.Argument(["name"], required=False, help="One of them.")


def agents(name: str | None) -> None:
    """List agents: topics, group, rate."""
    hello, _ = talk.wait(hello_of(given()))
    figures = _rows_by_name("agents")
    rows = [
        {
            "name": agent.name,
            "label": agent.label,
            "group": group.name,
            "processes": group.processes,
            "topics": agent.topics,
            "concurrency": agent.concurrency,
            "on_error": agent.on_error,
            "rate": figures.get(agent.name, {}).get("rate"),
            "behind": figures.get(agent.name, {}).get("behind"),
            "help": agent.help,
        }
        for group in hello.groups
        for agent in group.agents
    ]
    show(
        "agents",
        one_or_all(rows, name, "agent", ("name", "label")),
        ["name", "group", "processes", "topics", "rate", "behind", "help"],
        right=("processes", "rate", "behind"),
    )


def _rows_by_name(key: str) -> dict[str, dict[str, Any]]:
    snapshot = talk.wait(figures_of(given()))
    rows: Any = snapshot.get(key) or []
    return {row["name"]: row for row in rows}


agents_command = Command("agents", callback=agents, help=agents.__doc__, params=[_argument()])


def topics(name: str | None) -> None:
    """List topics: partitions, types, retention."""
    hello, _ = talk.wait(hello_of(given()))
    rows = [
        {
            "name": topic.name,
            "partitions": topic.partitions,
            "owned": topic.owned,
            "retention_s": kept_s,
            "retention": _kept(topic, kept_s),
            "key": topic.key_type,
            "value": topic.value_type,
        }
        for topic in hello.topics
        for kept_s in [_kept_s(topic, hello)]
    ]
    show(
        "topics",
        one_or_all(rows, name, "topic"),
        ["name", "partitions", "key", "value", "retention", "owned"],
        right=("partitions",),
    )


def _kept_s(topic: TopicInfo, hello: Hello) -> float | None:
    """How long its records are kept, in seconds; None: for ever, or until they were read."""
    if topic.owned or topic.retention_s is not None:
        return topic.retention_s
    usual_s: float | None = hello.settings["topic_retention"]
    return usual_s


def _kept(topic: TopicInfo, kept_s: float | None) -> str:
    if kept_s is None:
        return "until read" if topic.owned else "forever"
    return output.duration(kept_s)


topics_command = Command("topics", callback=topics, help=topics.__doc__, params=[_argument()])


def tables(name: str | None) -> None:
    """List tables: group, keys, partitions."""
    hello, _ = talk.wait(hello_of(given()))
    snapshot: Any = talk.wait(figures_of(given()))
    figures = {row["name"]: row for row in snapshot.get("tables", ())}
    behind: dict[str, list[int | None]] = {table.name: [] for table in hello.tables}
    for copy in snapshot.get("standby", ()):
        behind[copy["table"]].append(copy["behind"])
    rows = [
        {
            "name": table.name,
            "group": table.group,
            "keys": figures.get(table.name, {}).get("keys"),
            "partitions": table.partitions,
            "standby": len(behind[table.name]),
            "behind": sum(count or 0 for count in behind[table.name]),
            "key": table.key_type,
            "value": table.value_type,
            "help": table.help,
        }
        for table in hello.tables
    ]
    shown = ["name", "group", "keys", "partitions", "key", "value", "help"]
    right = ["keys", "partitions"]
    if any(behind.values()):
        shown[4:4] = ["standby", "behind"]
        right += ["standby", "behind"]
    show("tables", one_or_all(rows, name, "table"), shown, tuple(right))


tables_command = Command("tables", callback=tables, help=tables.__doc__, params=[_argument()])


def models(name: str | None) -> None:
    """List record types and their fields."""
    hello, _ = talk.wait(hello_of(given()))
    rows: list[dict[str, Any]] = [
        {
            "name": model.name,
            "fields": [
                {"name": field, "type": type, "default": default}
                for field, type, default in model.fields
            ],
            "help": model.help,
        }
        for model in hello.models
    ]
    rows = one_or_all(rows, name, "model")
    if given().json:
        show("models", rows, [])
        return
    lines = [
        [
            row["name"] if index == 0 else "",
            field["name"],
            field["type"],
            "required" if field["default"] is None else field["default"],
        ]
        for row in rows
        for index, field in enumerate(row["fields"])
    ]
    output.say(
        output.columns(lines, ["model", "field", "type", "default"]) if lines else "no models"
    )


models_command = Command("models", callback=models, help=models.__doc__, params=[_argument()])


def cron(next: int) -> None:
    """List tasks, timers and crontabs with their next runs."""
    hello, _ = talk.wait(hello_of(given()))
    now = datetime.datetime.now(datetime.UTC)
    rows = [
        {
            "name": timer.name,
            "kind": timer.kind,
            "group": timer.group,
            "schedule": timer.schedule,
            "zone": timer.zone,
            "on_leader": timer.on_leader,
            "next": [run.isoformat() for run in next_runs(timer, now, next)],
        }
        for timer in hello.timers
    ]
    if given().json:
        output.say_json({"schema": "streamd.cron/1", "cron": rows})
        return
    lines = [
        [row["name"], row["kind"], row["group"], row["schedule"], row["zone"] or None,
         _runs_text(next_runs(timer, now, next), now)]
        for row, timer in zip(rows, hello.timers, strict=True)
    ]  # fmt: skip
    headers = ["name", "kind", "group", "schedule", "zone", "next"]
    output.say(output.columns(lines, headers) if lines else "no tasks, timers or crontabs")


def next_runs(timer: TimerInfo, now: datetime.datetime, number: int) -> list[datetime.datetime]:
    """The next runs of a cron job; those of timers hang on when their process started."""
    runs: list[datetime.datetime] = []
    if timer.kind != "crontab":
        return runs
    job = Cron(timer.schedule, timer.zone)
    after: datetime.datetime | None = now
    while after is not None and len(runs) < number:
        after = job.next(after)
        if after is not None:
            runs.append(after.astimezone(zone_of(timer.zone)))
    return runs


def _runs_text(runs: list[datetime.datetime], now: datetime.datetime) -> str | None:
    if not runs:
        return None
    first, *others = runs
    wait = output.duration((first - now).total_seconds())
    return ", ".join(
        [f"in {wait} ({first:%Y-%m-%d %H:%M %Z})", *(f"{run:%Y-%m-%d %H:%M}" for run in others)]
    )


cron_command = Command(
    "cron",
    callback=cron,
    help=cron.__doc__,
    params=[
        click.Option(
            ["--next"],
            type=click.IntRange(1, 100),
            default=3,
            show_default=True,
            metavar="N",
            help="Runs to show for each.",
        )
    ],
)


def config(name: str | None, changed: bool) -> None:
    """Show every setting, its value, and where it came from."""
    hello, told = talk.wait(hello_of(given()))
    rows = [
        {
            "name": setting.name,
            "value": setting.value,
            "origin": setting.origin,
            "help": Settings.table[setting.name].help if setting.name in Settings.table else "",
        }
        for setting in hello.settings_shown
        if not changed or setting.origin != "default"
    ]
    if told:
        output.note("as the running instance has them:")
    show("config", one_or_all(rows, name, "setting"), ["name", "value", "origin"])


config_command = Command(
    "config",
    callback=config,
    help=config.__doc__,
    params=[
        _argument(),
        click.Option(["--changed"], is_flag=True, help="Only what differs from the default."),
    ],
)
