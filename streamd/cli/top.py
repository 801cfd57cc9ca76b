"""`top`: the processes and agents of an instance, drawn anew each second or two.

On a terminal it has the whole screen, keeps the keys to itself, and gives both back however it
ends. Each picture is written in one piece over the one before it, so nothing flickers. Where
nobody watches (a pipe, a file, no keyboard) it is one picture.
"""

import asyncio
import os
import re
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from typing import Any

import click

from streamd.cli import output, talk, target
from streamd.cli.look import PROCESS_COLUMNS, PROCESS_NUMBERS, process_row, status_lines
from streamd.cli.options import DURATION, color_wanted, given
from streamd.cli.root import Command
from streamd.instance import Folder

ORDERS = {"c": "cpu", "m": "memory", "r": "restarts", "n": "name"}
KEYS = "q quit · sort: c cpu, m memory, r restarts, n name"
SILENT_S = 3.0  # no answer for so long is worth a word

ENTER = "\x1b[?1049h\x1b[?25l"  # another screen, no cursor
LEAVE = "\x1b[?25h\x1b[?1049l"
BEGIN = "\x1b[?2026h\x1b[H"  # shown when whole, where the terminal can
END = "\x1b[J\x1b[?2026l"

_ESCAPE = re.compile(r"(\x1b\[[0-9;]*m)")


def top(sort: str, interval: float, once: bool) -> None:
    """Watch the processes and agents, those that use most first.

    Keys: q quits; c, m, r and n sort by CPU, private memory, restarts and name. Piped, it is
    one picture.
    """
    folder = target.folder_of(given())
    watched = sys.stdin.isatty() and sys.stdout.isatty() and not given().json
    if watched and not once:
        asyncio.run(Screen(folder, sort, interval).run())
        return
    snapshot = talk.wait(talk.ask(folder, "status"))
    processes = ordered(snapshot["processes"], sort)
    if given().json:
        output.say_json({**snapshot, "schema": "streamd.top/1", "processes": processes})
    else:
        output.say("\n".join(picture(snapshot, sort, time.time())))


def ordered(processes: list[dict[str, Any]], sort: str) -> list[dict[str, Any]]:
    """The processes, those that use most first; by name: as the data flows."""
    if sort == "name":
        return processes
    field = {"cpu": "cpu_percent", "memory": "private_bytes", "restarts": "restarts"}[sort]
    return sorted(processes, key=lambda process: -(process.get(field) or 0))


def picture(snapshot: dict[str, Any], sort: str, now: float) -> Iterator[str]:
    """The lines of one picture, as long and as many as they are."""
    yield from status_lines(snapshot, now)
    yield ""
    rows = [process_row("", process, now) for process in ordered(snapshot["processes"], sort)]
    yield from output.columns(rows, PROCESS_COLUMNS, right=PROCESS_NUMBERS).splitlines()
    if agents := snapshot.get("agents"):
        yield ""
        sizes = {group["name"]: group["processes"] for group in snapshot.get("groups") or ()}
        rows = [
            [
                agent["label"],
                sizes.get(agent["group"]),
                output.count(agent["rate"]),
                output.count(agent["behind"]),
                output.count(agent["events"]),
            ]
            for agent in sorted(agents, key=lambda agent: -agent["behind"])
        ]
        columns = ["agent", "processes", "events/s", "behind", "events"]
        yield from output.columns(rows, columns, right=[1, 2, 3, 4]).splitlines()


def fit(lines: list[str], width: int, height: int) -> list[str]:
    """So much of the lines as a terminal of this size shows, one less high for the keys.

    >>> fit(["abcdef", "b", "c", "d"], 4, 3)
    ['abcd', '… 3 lines more']
    """
    room = max(1, height - 1)
    if len(lines) > room:
        lines = [*lines[: room - 1], f"… {len(lines) - room + 1} lines more"]
        return [cut(line, width) for line in lines[:-1]] + lines[-1:]
    return [cut(line, width) for line in lines]


def cut(line: str, width: int) -> str:
    """The first `width` characters that are seen, with all colours.

    >>> cut("abc", 2), cut(click.style("abc", fg="red"), 2)
    ('ab', '\\x1b[31mab\\x1b[0m')
    """
    parts = []
    for part in _ESCAPE.split(line):
        if not part.startswith("\x1b"):
            part = part[:width]
            width -= len(part)
        parts.append(part)
    return "".join(parts)


class Screen:
    """The terminal while `top` has it."""

    def __init__(self, folder: Folder, sort: str, interval_s: float) -> None:
        self._folder = folder
        self._sort = sort
        self._interval_s = interval_s
        self._snapshot: dict[str, Any] | None = None
        self._answered_at = time.monotonic()
        self._changed = asyncio.Event()  # draw now
        self._quits = False
        self._before = termios.tcgetattr(sys.stdin)
        self._colors = color_wanted(given().color) is not False

    async def run(self) -> None:
        """Draw until a person quits.

        Raises:
            StreamdError: The instance does not answer any more.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._quit)
        loop.add_signal_handler(signal.SIGWINCH, self._changed.set)
        loop.add_signal_handler(signal.SIGTSTP, self._suspend)
        self._enter()
        asking = loop.create_task(self._ask(), name="ask")
        try:
            loop.add_reader(sys.stdin.fileno(), self._take_keys)
            while not self._quits and not asking.done():
                self._draw()
                try:
                    async with asyncio.timeout(self._interval_s):
                        await self._changed.wait()
                except TimeoutError:
                    continue
                self._changed.clear()
        finally:
            loop.remove_reader(sys.stdin.fileno())
            asking.cancel()
            self._leave()
        if asking.done() and not asking.cancelled():
            await asking

    async def _ask(self) -> None:
        while True:
            self._snapshot = await talk.ask(self._folder, "status")
            self._answered_at = time.monotonic()
            self._changed.set()
            await asyncio.sleep(self._interval_s)

    def _draw(self) -> None:
        width, height = shutil.get_terminal_size()
        lines = [f"{self._folder.path.name}: waits for the first answer"]
        if self._snapshot is not None:
            lines = list(picture(self._snapshot, self._sort, time.time()))
        silent_s = time.monotonic() - self._answered_at
        if silent_s > SILENT_S + self._interval_s:
            text = f"no answer for {silent_s:.0f} s: what stands here is as old"
            lines.insert(0, click.style(text, fg="red"))
        lines = fit(lines, width, height)
        lines += [""] * (height - 1 - len(lines))
        lines.append(click.style(cut(f"by {self._sort} · {KEYS}", width), dim=True))
        text = "\x1b[K\n".join(lines) + "\x1b[K"
        if not self._colors:
            text = _ESCAPE.sub("", text)
        write(BEGIN + text + END)

    def _take_keys(self) -> None:
        for key in os.read(sys.stdin.fileno(), 64).decode(errors="replace"):
            if key in "qQ\x04":
                self._quit()
            self._sort = ORDERS.get(key.lower(), self._sort)
        self._changed.set()

    def _quit(self) -> None:
        self._quits = True
        self._changed.set()

    def _suspend(self) -> None:
        self._leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._enter()
        self._changed.set()

    def _enter(self) -> None:
        tty.setcbreak(sys.stdin)
        write(ENTER)

    def _leave(self) -> None:
        write(LEAVE)
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)


def write(text: str) -> None:
    """Write to the terminal in one piece."""
    sys.stdout.write(text)
    sys.stdout.flush()


top_command = Command(
    "top",
    callback=top,
    help=top.__doc__,
    params=[
        click.Option(
            ["-s", "--sort"],
            type=click.Choice(list(ORDERS.values())),
            default="cpu",
            show_default=True,
            help="What to sort by.",
        ),
        click.Option(
            ["-i", "--interval"],
            type=DURATION,
            default="2s",
            show_default=True,
            help="How often to look.",
        ),
        click.Option(["--once"], is_flag=True, help="One picture, then end."),
    ],
)
