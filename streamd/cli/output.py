"""How the command line writes: data to stdout, all else to stderr.

Columns are aligned by spaces, never boxed; `-` stands for nothing. Colour only on a terminal
and never alone carries a meaning.
"""

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

import click

from streamd.errors import StreamdError, UsageError
from streamd.secrets import mask

STATE_COLORS = {
    "running": "green",
    "ready": "green",
    "ok": "green",
    "starting": "cyan",
    "recovering": "cyan",
    "reloading": "cyan",
    "stopping": "cyan",
    "backoff": "yellow",
    "degraded": "yellow",
    "warn": "yellow",
    "fatal": "red",
    "fail": "red",
}


def say(text: str = "") -> None:
    """Write a line of data to stdout."""
    click.echo(text)


def note(text: str) -> None:
    """Write a line for people to stderr, unless --quiet."""
    context = click.get_current_context(silent=True)
    if context is None or not getattr(context.find_root().obj, "quiet", False):
        click.echo(text, err=True)


def say_json(data: Any) -> None:
    """Write one JSON document, or one line of a stream of them."""
    click.echo(json.dumps(data, ensure_ascii=False, default=str))


def colored(text: str, state: str) -> str:
    """`text` in the colour of a state's name; click drops colours where none are wanted."""
    color = STATE_COLORS.get(state.lower())
    return click.style(text, fg=color) if color else text


def columns(
    rows: Iterable[Sequence[object]], headers: Sequence[str] = (), *, right: Sequence[int] = ()
) -> str:
    """Rows as aligned text; `right` holds the indexes of right-aligned columns.

    >>> columns([["a", 1], ["bcd", None]], ["name", "n"], right=[1])
    'name  n\\na     1\\nbcd   -'
    """
    table = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    if headers:
        table.insert(0, list(headers))
    widths = [max(map(_width, column), default=0) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            " " * (width - _width(cell)) + cell
            if index in right
            else cell + " " * (width - _width(cell))
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )


def _width(text: str) -> int:
    return len(click.unstyle(text))


def duration(seconds: float) -> str:
    """A time span in its two largest units.

    >>> duration(0.42), duration(12), duration(75), duration(11520), duration(200000)
    ('0.4 s', '12 s', '1 m 15 s', '3 h 12 m', '2 d 7 h')
    """
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    whole = int(seconds)
    for unit_s, unit, part_s, part in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if whole >= unit_s:
            return f"{whole // unit_s} {unit} {whole % unit_s // part_s} {part}"
    return f"{whole} s"


def size(size_bytes: float | None) -> str:
    """Bytes for a column.

    >>> size(512), size(61 * 1024**2), size(1536 * 1024**2), size(None)
    ('512B', '61M', '1.5G', '-')
    """
    if size_bytes is None:
        return "-"
    for unit in ("B", "K", "M", "G", "T"):
        if size_bytes < 1024 or unit == "T":
            shown = (
                f"{size_bytes:.1f}" if unit in "GT" and size_bytes < 10 else f"{size_bytes:.0f}"
            )
            return f"{shown}{unit}"
        size_bytes /= 1024
    raise AssertionError("unreachable")


def count(number: float) -> str:
    """A number with thin groups: 41 203.

    >>> count(41203), count(0), count(0.5)
    ('41 203', '0', '0.5')
    """
    if number and abs(number) < 10 and number != int(number):
        return f"{number:.1f}"
    return f"{round(number):,}".replace(",", " ")


def plural(number: int, noun: str) -> str:
    """
    >>> plural(1, "process"), plural(2, "process"), plural(0, "agent"), plural(2, "retry")
    ('1 process', '2 processes', '0 agents', '2 retries')
    """
    if number == 1:
        return f"1 {noun}"
    if noun.endswith("y"):
        return f"{count(number)} {noun[:-1]}ies"
    return f"{count(number)} {noun}{'es' if noun.endswith('s') else 's'}"


def confirm(question: str) -> None:
    """Go on only if a person says yes.

    Raises:
        UsageError: Nobody is there to ask.
        click.Abort: The answer is no.
    """
    if not sys.stdin.isatty():
        raise UsageError("this asks first, and there is no terminal", remedy="add --yes")
    click.confirm(question, abort=True, err=True)


def say_error(error: StreamdError, *, color: bool | None = None, debug: bool = False) -> None:
    """Write the three-line form to stderr: what happened, what was seen, what to try."""
    lines = []
    if debug:
        lines.append(mask("".join(traceback.format_exception(error)).rstrip("\n")))
    elif shown := getattr(error, "user_traceback", ""):
        lines.append(shown.rstrip("\n"))
    lines.append(f"{click.style('Error:', fg='red', bold=True)} {error}")
    lines += [f"  {line}" for line in error.seen]
    if error.remedy:
        lines.append(f"{click.style('Try:', bold=True)} {error.remedy}")
    click.echo("\n".join(lines), err=True, color=color)


def say_bug(error: BaseException, *, debug: bool = False) -> None:
    """Write a crash file and tell its path."""
    text = mask("".join(traceback.format_exception(error)))
    fd, path = tempfile.mkstemp(prefix="streamd-crash-", suffix=".txt")
    with os.fdopen(fd, "w") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}\n")
        file.write(f"python {sys.version}\n")
        file.write(f"command {mask(repr(sys.argv))}\n\n{text}")
    if debug:
        click.echo(text, err=True, nl=False)
    say_error(
        StreamdError(
            f"this is a bug in streamd: {type(error).__name__}: {error}",
            seen=[f"the whole is in {path}"],
            remedy="report it with that file",
        )
    )
