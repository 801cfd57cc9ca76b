"""`events` and `history`: what happened to an instance, told by it or by what it has left."""

import asyncio
import datetime
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import click

from streamd.cli import output, talk, target
from streamd.cli.control import answer_rows, complete_names
from streamd.cli.look import LEVEL_COLORS, MOMENT
from streamd.cli.options import given
from streamd.cli.root import Command
from streamd.errors import NotRunning, UsageError
from streamd.instance import Folder, Identity, folders
from streamd.supervisor.registry import Kind, read_history

KINDS = get_args(Kind)
LOOK_S = 0.5
REGISTRY = "registry.db"


def events(
    names: tuple[str, ...],
    follow: bool,
    lines: int,
    since: float | None,
    kind: tuple[str, ...],
) -> None:
    """Show what happened: starts, restarts with the reason, hangs, scales, reloads.

    The last ones of this instance and of those before it. `streamd history` shows them where
    nothing runs.
    """
    folder = _instance()
    asyncio.run(_show_events(folder, _chooser(names, kind), lines, since, follow=follow))


def _instance() -> Folder:
    try:
        return target.folder_of(given())
    except NotRunning as error:
        error.remedy = "streamd history, for what happened before"
        raise


async def _show_events(
    folder: Folder,
    is_wanted: Callable[[dict[str, Any]], bool],
    lines: int,
    since: float | None,
    *,
    follow: bool,
) -> None:
    try:
        answer = await talk.ask(folder, "events", since=since or 0.0)
    except NotRunning as error:
        error.remedy = f"streamd history --name {folder.path.name}"
        raise
    rows = answer_rows(answer, "events")
    for event in list(filter(is_wanted, rows))[-lines:] if lines else ():
        show_event(event)
    last = max((event["n"] for event in rows), default=0)
    while follow:
        await asyncio.sleep(LOOK_S)
        try:
            answer = await talk.ask(folder, "events", since=since or 0.0, after=last)
        except NotRunning:
            # Who follows wants to see the next start too.
            continue
        for event in answer_rows(answer, "events"):
            last = event["n"]
            if is_wanted(event):
                show_event(event)


def history(
    names: tuple[str, ...], lines: int, since: float | None, kind: tuple[str, ...]
) -> None:
    """Show how processes started and ended and what happened, also where nothing runs.

    It is read from the data directory: that of the instance that ran last, or that -D names.
    """
    path = _registry_path()
    found = read_history(path)
    is_wanted = _chooser(names, kind)
    happened = [
        event for event in found.events if is_wanted(event) and event["t"] >= (since or 0.0)
    ]
    shown = happened[-lines:] if lines else []
    processes = [
        _past(name, found.starts.get(name, {}), found.exits.get(name, {}))
        for name in sorted(found.starts.keys() | found.exits.keys())
        if is_named(name, names)
    ]
    if given().json:
        document = {"schema": "streamd.history/1", "registry": str(path)}
        output.say_json({**document, "processes": processes, "events": shown})
        return
    if processes:
        columns = ["process", "last start", "pid", "restarts", "last end", "how"]
        output.say(output.columns(_past_rows(processes), columns, right=[2, 3]))
        output.say()
    for event in shown:
        show_event(event)
    if not shown:
        output.note(f"{path} tells of nothing that was asked for.")


def _past(name: str, start: dict[str, Any], end: dict[str, Any]) -> dict[str, Any]:
    """What is known of a process; of its last run where that has ended."""
    if start and start["t"] > end.get("t", 0.0):
        who = Identity(start["pid"], start["start_ticks"], start["boot_id"])
        # Nobody saw it end who could have written that down.
        how = "runs" if who.is_alive() else "was killed with its master"
        end = {"how": how, "t": None}
    return {
        "name": name,
        "started_at": start.get("t"),
        "pid": start.get("pid"),
        "restarts": start.get("restarts", 0),
        "ended_at": end.get("t"),
        "how": end.get("how"),
    }


def _past_rows(processes: Iterable[dict[str, Any]]) -> Iterator[list[Any]]:
    for process in processes:
        started, ended = process["started_at"], process["ended_at"]
        yield [
            process["name"],
            started and moment(started),
            process["pid"],
            process["restarts"],
            ended and moment(ended),
            process["how"],
        ]


def _registry_path() -> Path:
    """The registry that is meant: of -D, else of the instance that is named, or the only one.

    Raises:
        NotRunning: Nothing has run here.
        UsageError: Several instances could be meant.
    """
    options = given()
    if datadir := options.settings.get("datadir"):
        return Path(datadir).absolute() / REGISTRY
    if target.named_instance(options) or target.named_app(options):
        candidates = [target.folder_of(options)]
    else:
        candidates = target.running() or folders()
    records = [record for folder in candidates if (record := folder.read_record()) is not None]
    datadirs = {record.datadir: record.name for record in records if record.datadir}
    if len(datadirs) == 1:
        return Path(next(iter(datadirs))) / REGISTRY
    if datadirs:
        raise UsageError(
            f"{len(datadirs)} instances have run here; which one is meant?",
            seen=[f"{name} in {datadir}" for datadir, name in datadirs.items()],
            remedy=f"add --name {min(datadirs.values())}",
        )
    raise NotRunning(
        "nothing has run here whose data directory is known",
        remedy="name the data directory with -D",
    )


def show_event(event: dict[str, Any]) -> None:
    """One event; the further lines of its text stand below it."""
    if given().json:
        output.say_json(event)
        return
    first, *more = event["text"].splitlines() or [""]
    text = f"{moment(event['t'])}  {event['kind'] or '-':<7}  {first}"
    color = LEVEL_COLORS.get(event["level"].upper())
    output.say(click.style("\n    ".join([text, *more]), fg=color))


def moment(t: float) -> str:
    """Unix seconds as local time to the second."""
    return datetime.datetime.fromtimestamp(t).strftime("%Y-%m-%d %H:%M:%S")


def is_named(process: str, names: tuple[str, ...]) -> bool:
    """True for a process that `names` has, by its own name or its group's, or for no names."""
    return not names or process in names or process.partition("#")[0] in names


def _chooser(
    names: tuple[str, ...], kinds: tuple[str, ...]
) -> Callable[[dict[str, Any]], bool]:
    def is_wanted(event: dict[str, Any]) -> bool:
        return is_named(event["process"], names) and (not kinds or event["kind"] in kinds)

    return is_wanted


_PARAMS: list[click.Parameter] = [
    click.Argument(
        ["names"],
        nargs=-1,
        metavar="[NAME]...",
        help="Processes; all when left out.",
        shell_complete=complete_names,
    ),
    click.Option(
        ["-n", "--lines"],
        type=click.IntRange(0),
        default=50,
        show_default=True,
        metavar="N",
        help="The last N of them.",
    ),
    click.Option(["--since"], type=MOMENT, help="15m, 2h or an ISO time."),
    click.Option(
        ["--kind"],
        type=click.Choice(KINDS),
        multiple=True,
        metavar="KIND",
        help=f"Only {', '.join(KINDS[:-1])} or {KINDS[-1]}; may be repeated.",
    ),
]

events_command = Command(
    "events",
    callback=events,
    help=events.__doc__,
    params=[
        *_PARAMS,
        click.Option(["-f", "--follow"], is_flag=True, help="Go on as they come."),
    ],
)
history_command = Command(
    "history", callback=history, help=history.__doc__, params=list(_PARAMS)
)
