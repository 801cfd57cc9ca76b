"""`status`, `ps`, `logs`, `stacks` and `web`: what an instance tells of itself."""

import asyncio
import datetime
import re
import time
import webbrowser
from collections import deque
from collections.abc import Iterator
from typing import Any

import click

from streamd.cli import output, talk, target
from streamd.cli.control import answer_rows, complete_names
from streamd.cli.options import DURATION, LOG_LEVEL, given
from streamd.cli.root import Command
from streamd.errors import NotRunning, StreamdError, UsageError
from streamd.instance import Folder
from streamd.link import LinkLost

KEPT_LINES = 10_000  # what the master keeps
SHOWN_LINES = 50
MOMENT_S = 1e-6  # more than the last line that was shown
RETRY_S = 0.2

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

LAST_LINES = 3  # of what was given up; `streamd logs` has all

LEVEL_COLORS = {"WARNING": "yellow", "WARN": "yellow", "ERROR": "red", "CRITICAL": "red"}


def status() -> int:
    """Show health at a glance; exits 3 when not running.

    Exits 1 when something is wrong, with what and what to try, and while it starts or stops,
    with what it waits for: 0 means that all of it runs.
    """
    folder = target.folder_of(given())
    snapshot = talk.wait(talk.ask(folder, "status"))
    if given().json:
        output.say_json(snapshot)
    else:
        output.say("\n".join(status_lines(snapshot, time.time())))
    return 0 if snapshot["state"] in ("running", "reloading") else 1


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
    if copies := snapshot.get("standby"):
        behind = output.count(sum(copy["behind"] or 0 for copy in copies))
        figures.append(f"standby of {output.plural(len(copies), 'partition')}, {behind} behind")
    yield " · ".join(figures)
    if state in ("starting", "stopping"):
        yield snapshot["sentence"]
    for problem in snapshot.get("problems") or ():
        yield output.colored(f"{problem['process']}: {problem['text']}", "warn")
        for line in (problem.get("lines") or ())[-LAST_LINES:]:
            yield f"    {line}"
        if problem.get("remedy"):
            yield f"Try: {problem['remedy']}"


status_command = Command("status", callback=status, help=status.__doc__)


def ps() -> None:
    """Show the tree of processes with CPU, private memory, restarts and partitions."""
    folder = target.folder_of(given())
    answer = talk.wait(talk.ask(folder, "ps"))
    processes = answer_rows(answer, "processes")
    if given().json:
        output.say_json({"schema": "streamd.ps/1", "processes": processes})
    else:
        rows = process_rows(processes, time.time())
        output.say(output.columns(list(rows), PROCESS_COLUMNS, right=PROCESS_NUMBERS))


PROCESS_COLUMNS = [
    "process", "pid", "state", "up", "cpu%", "private", "rss", "restarts", "partitions",
    "last end",
]  # fmt: skip
PROCESS_NUMBERS = [1, 4, 5, 6, 7]  # the columns that stand on the right


def process_rows(processes: list[dict[str, Any]], now: float) -> Iterator[list[Any]]:
    """A row for each process, drawn as the tree that they are, strays below their parent."""
    above = [process for process in processes if process["kind"] in ("guardian", "master")]
    below = [process for process in processes if process not in above]
    for depth, process in enumerate(above):
        yield process_row("└ " * bool(depth), process, now)
    branches = [("  " * (len(above) - 1), process) for process in below]
    for index, (indent, process) in enumerate(branches):
        last = index == len(branches) - 1
        yield process_row(indent + ("└ " if last else "├ "), process, now)
        yield from _stray_rows(indent + ("  " if last else "│ "), process)
    for process in above:
        yield from _stray_rows("  ", process)


def process_row(branch: str, process: dict[str, Any], now: float) -> list[Any]:
    """The cells of `PROCESS_COLUMNS`; a process that is none has no figures."""
    state = process["state"].lower()
    retry_in_s = process.get("retry_in_s")
    since = process.get("since")
    up = since and output.duration(now - since)
    if retry_in_s:
        up = f"in {output.duration(retry_in_s)}"
    pid = process.get("pid") or None
    # Large figures are read by turns: 0 is one that has not been read.
    private = process.get("private_bytes") or None
    cpu = process.get("cpu_percent")
    return [
        branch + process["name"],
        pid,
        output.colored(state, state),
        up or None,
        None if cpu is None or pid is None else f"{cpu:.1f}",
        output.size(private if pid else None),
        output.size(process.get("rss_bytes") if pid else None),
        process.get("restarts") or 0,
        spans(process.get("partitions") or []) or None,
        process.get("waits_for") or _last_end(process),
    ]


def _last_end(process: dict[str, Any]) -> str | None:
    """How it ended last, where that was in this life of the instance."""
    ended = process.get("restarts") or process["state"] in ("BACKOFF", "FATAL", "STOPPED")
    return process.get("last_exit") if ended else None


def spans(numbers: list[int]) -> str:
    """Numbers in few characters, as a terminal is narrow.

    >>> spans([0, 2]), spans([0, 1, 2, 3, 7]), spans([])
    ('0 2', '0-3 7', '')
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(
        str(first) if first == last else f"{first}{'-' if last - first > 1 else ' '}{last}"
        for first, last in runs
    )


def _stray_rows(branch: str, process: dict[str, Any]) -> Iterator[list[Any]]:
    for stray in process.get("strays") or ():
        name = f"{branch}└ {stray['name']}"
        private, rss = (output.size(stray.get(key)) for key in ("private_bytes", "rss_bytes"))
        yield [name, stray["pid"], "stray", None, None, private, rss, None, None, None]


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
    lines: int | None,
    since: float | None,
    level: str | None,
    grep: str | None,
) -> None:
    """Show or follow log lines.

    Following goes on over a restart of the instance, until Ctrl-C.
    """
    folder = target.folder_of(given())
    try:
        pattern = re.compile(grep) if grep else None
    except re.error as error:
        raise UsageError(f"--grep {grep!r} is no regular expression: {error}") from error
    if lines is None:
        lines = SHOWN_LINES if since is None else KEPT_LINES
    wanted = {
        "names": [*names, *process],
        # Filtered here: all are asked for where the last N that match are wanted.
        "lines": KEPT_LINES if pattern and not follow else lines,
        "follow": follow,
        "level": level,
        "since": since,
    }
    show = _follow_logs if follow else _show_logs
    asyncio.run(show(folder, wanted, pattern, lines))


async def _show_logs(
    folder: Folder, wanted: dict[str, Any], pattern: re.Pattern[str] | None, last: int
) -> None:
    kept: deque[dict[str, Any]] = deque(maxlen=last)
    async for line in talk.follow(folder, "logs", **wanted):
        if pattern is None or pattern.search(line["text"]):
            kept.append(line)
    for line in kept:
        show_line(line)


async def _follow_logs(
    folder: Folder, wanted: dict[str, Any], pattern: re.Pattern[str] | None, last: int
) -> None:
    has_followed = False
    while True:
        try:
            async for line in talk.follow(folder, "logs", **wanted):
                has_followed = True
                wanted |= {"since": line["t"] + MOMENT_S, "lines": KEPT_LINES}
                if pattern is None or pattern.search(line["text"]):
                    show_line(line)
        except LinkLost:
            output.note(
                f"{folder.path.name} has ended; what it says when it runs again follows"
            )
            has_followed = True
        except (NotRunning, UsageError):
            # Not there again, or has not come to the processes that are meant.
            if not has_followed:
                raise
        except StreamdError as error:
            if not has_followed or error.exit_code != 1:
                raise
        await asyncio.sleep(RETRY_S)


def show_line(line: dict[str, Any]) -> None:
    """One line of the log, or of what happened."""
    if given().json:
        output.say_json(line)
        return
    # What a print holds must not move the cursor or set the title.
    text = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", line["text"])
    at = datetime.datetime.fromtimestamp(line["t"]).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    level = line.get("level") or ""
    color = LEVEL_COLORS.get(level.upper())
    parts = [at, f"{level.lower():<7}", line.get("process") or "", text]
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
            metavar="N",
            help="Lines to start with. [default: 50; with --since all that are kept]",
        ),
        click.Option(["--since"], type=MOMENT, help="15m, 2h or an ISO time."),
        click.Option(["--level"], type=LOG_LEVEL, help="Least level to show."),
        click.Option(["--grep"], metavar="REGEX", help="Only lines that match."),
    ],
)


def stacks(names: tuple[str, ...]) -> None:
    """Show what each process does now: stacks of tasks and threads.

    Also of a process that is stuck; local variables are never shown.
    """
    folder = target.folder_of(given())
    answer = talk.wait(talk.ask(folder, "stacks", timeout_s=30, names=list(names)))
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
