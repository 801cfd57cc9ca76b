"""`status`, `ps`, `logs`, `events`, `stacks` and `web`: what an instance tells of itself."""

import asyncio
import datetime
import re
import time
import webbrowser
from collections import deque
from collections.abc import Iterator
from typing import Any

import click

from streamd.cli import output, target
from streamd.cli.control import answer_rows, complete_names
from streamd.cli.options import DURATION, LOG_LEVEL, given
from streamd.cli.root import Command
from streamd.errors import StreamdError, UsageError

KEPT_LINES = 10_000  # what the master keeps

LEVEL_COLORS = {"WARNING": "yellow", "WARN": "yellow", "ERROR": "red", "CRITICAL": "red"}


def status() -> int:
    """Show health at a glance; exits 3 when not running.

    Exits 1 when something is wrong, with what and what to try.
    """
    folder = target.folder_of(given())
    snapshot = target.wait(target.ask(folder, "status"))
    if given().json:
        output.say_json(snapshot)
    else:
        output.say("\n".join(status_lines(snapshot, time.time())))
    return 1 if snapshot["state"] == "degraded" else 0


def status_lines(snapshot: dict[str, Any], now: float) -> Iterator[str]:
    """The snapshot in two lines, and two more for each problem."""
    state = snapshot["state"]
    first = [
        click.style(snapshot["name"], bold=True),
        output.colored(state, state),
        output.duration(now - snapshot["since"]),
        f"pid {snapshot['pid']}",
        snapshot.get("web") or "",
    ]
    yield "  ".join(filter(None, first))
    processes = [process for process in snapshot["processes"] if process["kind"] != "guardian"]
    well = sum(process["state"].lower() == "running" for process in processes)
    figures = [
        f"{well} of {output.plural(len(processes), 'process')} running",
        f"{output.count(snapshot.get('rate') or 0)} events/s",
        f"{output.count(snapshot.get('behind') or 0)} behind",
        output.plural(snapshot.get("errors") or 0, "error"),
    ]
    if dead := snapshot.get("dead_letters"):
        figures.append(output.plural(dead, "dead letter"))
    if restarts := sum(process.get("restarts") or 0 for process in processes):
        figures.append(output.plural(restarts, "restart"))
    yield " · ".join(figures)
    for problem in snapshot.get("problems") or ():
        yield output.colored(f"{problem['process']}: {problem['text']}", "warn")
        if problem.get("remedy"):
            yield f"Try: {problem['remedy']}"


status_command = Command("status", callback=status, help=status.__doc__)


def ps() -> None:
    """Show the processes with CPU, memory and restarts."""
    folder = target.folder_of(given())
    answer = target.wait(target.ask(folder, "ps"))
    processes = answer_rows(answer, "processes")
    if given().json:
        output.say_json({"schema": "streamd.ps/1", "processes": processes})
    else:
        output.say(
            output.columns(
                list(process_rows(processes, time.time())),
                ["process", "pid", "state", "up", "cpu%", "rss", "restarts", "partitions"],
                right=[1, 4, 5, 6],
            )
        )


def process_rows(processes: list[dict[str, Any]], now: float) -> Iterator[list[Any]]:
    """A row for each process, drawn as the tree that they are, strays below their parent."""
    heads = [process for process in processes if process["kind"] in ("guardian", "master")]
    rest = [process for process in processes if process not in heads]
    for process in heads:
        yield _process_row("", process, now)
        yield from _stray_rows("", process)
    for index, process in enumerate(rest):
        last = index == len(rest) - 1
        yield _process_row("└ " if last else "├ ", process, now)
        yield from _stray_rows("  " if last else "│ ", process)


def _process_row(branch: str, process: dict[str, Any], now: float) -> list[Any]:
    state = process["state"].lower()
    retry_in_s = process.get("retry_in_s")
    since = process.get("since")
    up = f"in {retry_in_s:.0f} s" if retry_in_s else since and output.duration(now - since)
    partitions = process.get("partitions") or []
    cpu = process.get("cpu_percent")
    return [
        branch + process["name"],
        process.get("pid") or None,
        output.colored(state, state),
        up or None,
        None if cpu is None else f"{cpu:.1f}",
        output.size(process.get("rss_bytes")),
        process.get("restarts") or 0,
        " ".join(map(str, partitions)) or None,
    ]


def _stray_rows(branch: str, process: dict[str, Any]) -> Iterator[list[Any]]:
    for stray in process.get("strays") or ():
        described = stray if isinstance(stray, dict) else {"pid": stray}
        name = described.get("name") or "?"
        rss = output.size(described.get("rss_bytes"))
        yield [f"{branch}└ {name}", described["pid"], "stray", None, None, rss, None, None]


ps_command = Command("ps", callback=ps, help=ps.__doc__)


class Moment(click.ParamType[float]):
    """`15m` ago, `2h` ago, or an ISO time; gives unix seconds."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float | int):
            return float(value)
        if re.fullmatch(r"\d+(\.\d+)?\s*(ms|s|m|h|d)", str(value).strip()):
            return time.time() - DURATION.convert(value, param, ctx)
        try:
            return datetime.datetime.fromisoformat(str(value)).timestamp()
        except ValueError:
            self.fail(f"{value!r} is no time: write 15m, 2h or 2026-11-21T08:30", param, ctx)


MOMENT = Moment()


def logs(
    names: tuple[str, ...],
    process: tuple[str, ...],
    follow: bool,
    lines: int,
    since: float | None,
    level: str | None,
    grep: str | None,
) -> None:
    """Show or follow log lines."""
    folder = target.folder_of(given())
    try:
        pattern = re.compile(grep) if grep else None
    except re.error as error:
        raise UsageError(f"--grep {grep!r} is no regular expression: {error}") from error
    wanted = {
        "names": [*names, *process],
        # Filtered here: all are asked for where the last N that match are wanted.
        "lines": KEPT_LINES if pattern and not follow else lines,
        "follow": follow,
        "level": level,
        "since": since,
    }
    asyncio.run(_show_logs(folder, wanted, pattern, None if follow else lines))


async def _show_logs(
    folder: Any, wanted: dict[str, Any], pattern: re.Pattern[str] | None, last: int | None
) -> None:
    kept: deque[dict[str, Any]] = deque(maxlen=last)
    async for line in target.follow(folder, "logs", **wanted):
        if pattern is not None and not pattern.search(line["text"]):
            continue
        if last is None:
            show_line(line)
        else:
            kept.append(line)
    for line in kept:
        show_line(line)


def show_line(line: dict[str, Any]) -> None:
    """One line of the log, or of what happened."""
    if given().json:
        output.say_json(line)
        return
    at = datetime.datetime.fromtimestamp(line["t"]).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    level = line.get("level") or ""
    color = LEVEL_COLORS.get(level.upper())
    parts = [at, f"{level.lower():<7}", line.get("process") or "", line["text"]]
    output.say(click.style(" ".join(filter(None, parts)), fg=color))


logs_command = Command(
    "logs",
    callback=logs,
    help=logs.__doc__,
    params=[
        click.Argument(
            ["names"],
            nargs=-1,
            metavar="[NAME]...",
            help="Processes; all when left out.",
            shell_complete=complete_names,
        ),
        click.Option(
            ["-p", "--process"],
            multiple=True,
            metavar="NAME",
            help="The same as NAME; may be repeated.",
            shell_complete=complete_names,
        ),
        click.Option(["-f", "--follow"], is_flag=True, help="Go on as lines come."),
        click.Option(
            ["-n", "--lines"],
            type=click.IntRange(0),
            default=50,
            show_default=True,
            metavar="N",
            help="Lines to start with.",
        ),
        click.Option(["--since"], type=MOMENT, help="15m, 2h or an ISO time."),
        click.Option(["--level"], type=LOG_LEVEL, help="Least level to show."),
        click.Option(["--grep"], metavar="REGEX", help="Only lines that match."),
    ],
)


def events(follow: bool, since: float) -> None:
    """Show what happened: starts, exits, restarts, actions."""
    folder = target.folder_of(given())
    asyncio.run(_show_events(folder, since, follow))


async def _show_events(folder: Any, since: float, follow: bool) -> None:
    last = since
    while True:
        answer = await target.ask(folder, "events", since=last)
        for event in answer_rows(answer, "events"):
            if event["t"] > last or last == since:
                show_line(event)
            last = max(last, event["t"])
        if not follow:
            return
        await asyncio.sleep(0.5)


events_command = Command(
    "events",
    callback=events,
    help=events.__doc__,
    params=[
        click.Option(["-f", "--follow"], is_flag=True, help="Go on as they come."),
        click.Option(
            ["--since"],
            type=MOMENT,
            default="1h",
            show_default=True,
            help="15m, 2h or an ISO time.",
        ),
    ],
)


def stacks(names: tuple[str, ...]) -> None:
    """Show what each process does now: stacks of tasks and threads.

    Also of a process that is stuck; local variables are never shown.
    """
    folder = target.folder_of(given())
    answer = target.wait(target.ask(folder, "stacks", timeout_s=30, names=list(names)))
    if given().json:
        output.say_json({"schema": "streamd.stacks/1", "stacks": answer})
    elif isinstance(answer, dict):
        for name, text in answer.items():
            output.say(f"{click.style(name, bold=True)}\n{str(text).rstrip()}\n")
    else:
        output.say(str(answer).rstrip())


stacks_command = Command(
    "stacks",
    callback=stacks,
    help=stacks.__doc__,
    params=[
        click.Argument(
            ["names"],
            nargs=-1,
            metavar="[NAME]...",
            help="Processes; all when left out.",
            shell_complete=complete_names,
        )
    ],
)


def web(open: bool) -> None:
    """Print the address of the stats page."""
    folder = target.folder_of(given())
    record = folder.read_record()
    if record is None or not record.master.is_alive():
        raise target.not_running(folder)
    if not record.app_id:
        raise StreamdError(
            f"{record.name} is starting (pid {record.master.pid}) and has no address yet",
            remedy="the same in a moment",
        )
    if not record.web:
        raise StreamdError(
            f"{record.name} serves no pages: it runs without web",
            remedy=f"streamd status --name {record.name}",
        )
    if given().json:
        output.say_json({"schema": "streamd.web/1", "web": record.web})
    else:
        output.say(record.web)
    if open:
        webbrowser.open(record.web)


web_command = Command(
    "web",
    callback=web,
    help=web.__doc__,
    params=[click.Option(["--open"], is_flag=True, help="Open it in a browser.")],
)
