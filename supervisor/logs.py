"""The log of the whole tree: every line is kept for a while, shown to who follows, and written.

Every line goes one way: pipe → `Line` → ring, followers, output. Nothing here waits: an output
or a follower that does not take what it is given loses lines, which are counted and told. A
line that a process repeats is counted, too, and shown once.
"""

import asyncio
import contextlib
import functools
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from streamd.errors import ConfigError
from streamd.instance import StartSpec
from streamd.secrets import mask
from streamd.supervisor.logfile import LogFile
from streamd.supervisor.logstream import LogStream

RING_LINES = 10_000
RING_BYTES = 8 * 1024 * 1024
FOLLOWER_LINES = 5_000
FOLLOWER_BYTES = 4 * 1024 * 1024
REPEAT_S = 5.0  # a line that repeats is told at least so often
GAP_S = 0.5  # what comes again later than this is no repetition: a timer that prints

_COLORS = {"WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[1;31m"}
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"

# What a print holds must not move the reader's cursor or set his title.
_VISIBLE = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)
}


class Line(NamedTuple):
    """One entry of the log; `text` may have several lines."""

    t: float  # unix seconds
    process: str
    pid: int
    level: str
    text: str


@functools.lru_cache(maxsize=64)
def level_number(name: str) -> int:
    """The number of a level in any case, by logging's names or the command line's."""
    upper = {"WARN": "WARNING", "CRIT": "CRITICAL"}.get(name.upper(), name.upper())
    return logging.getLevelNamesMapping().get(upper, logging.INFO)


class Follower:
    """Who gets every line from now on; one that is too slow misses some, and is told so."""

    def __init__(self, is_wanted: Callable[[Line], bool]) -> None:
        self._is_wanted = is_wanted
        self._lines: list[Line] = []
        self._size_bytes = 0
        self._missed = 0
        self._arrived = asyncio.Event()

    def put(self, line: Line) -> None:
        """Keep a line for the next `get`, if it is wanted and there is room."""
        if not self._is_wanted(line):
            return
        if len(self._lines) >= FOLLOWER_LINES or self._size_bytes >= FOLLOWER_BYTES:
            self._missed += 1
            return
        self._lines.append(line)
        self._size_bytes += sys.getsizeof(line.text)
        self._arrived.set()

    async def get(self) -> list[Line]:
        """All lines that have come since the last call; waits for the first."""
        await self._arrived.wait()
        self._arrived.clear()
        lines, self._lines, self._size_bytes = self._lines, [], 0
        if self._missed:
            text = f"{self._missed} log lines were left out here: the reader was too slow"
            lines.append(Line(time.time(), "master", os.getpid(), "WARNING", text))
            self._missed = 0
        return lines


class _Repeated:
    """The last line of a process, and how often it has come again."""

    __slots__ = ("count", "first_at", "last_at", "line")

    def __init__(self, line: Line) -> None:
        self.line = line
        self.count = 0
        self.first_at = self.last_at = line.t

    def tell(self) -> Line:
        """What stands for the repetitions; they are counted anew from here."""
        line, count, span_s = self.line, self.count, self.last_at - self.first_at
        self.count, self.first_at = 0, self.last_at
        text = f"last line repeated {count} times in {span_s:.1f} s" if count > 1 else line.text
        return line._replace(t=self.last_at, text=text)


class Logs:
    """Takes lines from everywhere and hands them on."""

    def __init__(
        self, output: LogFile | LogStream, *, style: str, level: str, color: bool = False
    ) -> None:
        """
        Args:
            style: "text" or "json", a line of the output.
            level: What is below is not kept.
        """
        self._output = output
        self._json = style == "json"
        self._color = color
        self._level = level_number(level)
        self._ring: deque[Line] = deque()
        self._ring_bytes = 0
        self._followers: set[Follower] = set()
        self._last: dict[str, _Repeated] = {}  # process -> its last line
        self._second = (0, "")  # the last second that was formatted, and its text

    def put(self, line: Line) -> None:
        """Take one line."""
        self.put_all((line,))

    def put_all(self, lines: Sequence[Line]) -> None:
        """Take lines, in order."""
        self._emit(self._without_repeats(lines))

    def _without_repeats(self, lines: Iterable[Line]) -> Iterator[Line]:
        for line in lines:
            if level_number(line.level) < self._level:
                continue
            last = self._last.get(line.process)
            if last is not None:
                if (
                    last.line.text == line.text
                    and last.line.level == line.level
                    and line.t - last.last_at < GAP_S
                ):
                    last.count += 1
                    last.last_at = line.t
                    continue
                if last.count:
                    yield last.tell()
            self._last[line.process] = _Repeated(line)
            yield line

    def tell_repeats(self, now: float, *, all: bool = False) -> None:
        """Tell of lines that have been repeated for a while; to be called now and then.

        Args:
            now: Unix seconds.
            all: Also of those that have just begun.
        """
        self._emit(
            last.tell()
            for last in self._last.values()
            if last.count and (all or not 0 <= now - last.first_at < REPEAT_S)
        )

    def end_run(self, process: str) -> None:
        """The run of a process has ended: what the next one says is no repetition."""
        last = self._last.pop(process, None)
        if last is not None and last.count:
            self._emit((last.tell(),))

    def _emit(self, lines: Iterable[Line]) -> None:
        texts = []
        for line in lines:
            self._ring.append(line)
            self._ring_bytes += sys.getsizeof(line.text)
            while len(self._ring) > RING_LINES or self._ring_bytes > RING_BYTES:
                self._ring_bytes -= sys.getsizeof(self._ring.popleft().text)
            for follower in self._followers:
                follower.put(line)
            texts.append(self._format(line))
        if texts:
            self._output.write("".join(texts).encode(errors="replace"), len(texts))

    def select(
        self, is_wanted: Callable[[Line], bool], *, lines: int, since: float
    ) -> list[Line]:
        """The last `lines` kept lines that are wanted, from a moment on."""
        chosen: list[Line] = []
        for line in reversed(self._ring):
            if len(chosen) >= lines:
                break
            if line.t >= since and is_wanted(line):
                chosen.append(line)
        return chosen[::-1]

    def processes(self) -> list[str]:
        """The processes that kept lines are of."""
        return sorted({line.process for line in self._ring})

    @contextlib.contextmanager
    def followed(self, is_wanted: Callable[[Line], bool]) -> Iterator[Follower]:
        """Who gets every line from now on that is wanted."""
        follower = Follower(is_wanted)
        self._followers.add(follower)
        try:
            yield follower
        finally:
            self._followers.discard(follower)

    @property
    def problem(self) -> str | None:
        """Why lines are not written, while they are not."""
        return self._output.problem

    def reopen(self) -> None:
        """Open the log file anew, after it was moved away.

        Raises:
            OSError: It cannot be opened; the one that was open is written on.
        """
        self._output.reopen()

    def move_to(self, output: LogFile | LogStream) -> None:
        """Write to another output from now on, without colours; the old one is flushed."""
        self._output.flush(1.0)
        self._output = output
        self._color = False
        self._second = (0, "")

    def flush(self, timeout_s: float) -> None:
        """Write what is pending; blocks for at most `timeout_s`."""
        self.tell_repeats(time.time(), all=True)
        self._output.flush(timeout_s)

    def _format(self, line: Line) -> str:
        if self._json:
            return msgspec.json.encode(line._asdict()).decode() + "\n"
        second = int(line.t)
        if second != self._second[0]:
            # People at a terminal know what day it is.
            form = "%H:%M:%S" if self._output.is_terminal else "%Y-%m-%d %H:%M:%S"
            self._second = (second, time.strftime(form, time.localtime(second)))
        at, level, text = self._second[1], f"{line.level:<7}", line.text
        if not text.isprintable():
            text = text.translate(_VISIBLE).replace("\n", "\n    ")
        if self._color:
            at = f"{_DIM}{at}{_PLAIN}"
            if color := _COLORS.get(line.level):
                level = f"{color}{level}{_PLAIN}"
        return f"{at} {level} {line.process}  {text}\n"


class LogsHandler(logging.Handler):
    """Sends the master's own records straight into the log."""

    def __init__(self, logs: Logs) -> None:
        super().__init__()
        self._logs = logs
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = mask(self.format(record))
        except Exception:
            self.handleError(record)
            return
        self._logs.put(Line(record.created, "master", os.getpid(), record.levelname, text))


def open_output(spec: StartSpec, path: str | None) -> LogFile | LogStream:
    """The log file at `path`, or whatever else has that name; None: standard error.

    Raises:
        ConfigError: It cannot be written.
    """
    if path is None:
        return LogStream(2)
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            try:
                return LogStream(fd)
            finally:
                os.close(fd)
        return LogFile(
            path,
            max_size_bytes=spec.log_max_size_bytes,
            max_age_s=spec.log_max_age_s,
            keep=spec.log_keep,
        )
    except OSError as error:
        raise ConfigError(
            f"the log file {path} cannot be written: {error.strerror}",
            remedy="choose another with --logfile",
        ) from error


def open_logs(spec: StartSpec) -> Logs:
    """The log of the tree, and the master's own records in it.

    Raises:
        ConfigError: The log file cannot be written.
    """
    output = open_output(spec, spec.logfile)
    style = spec.log_format
    if style == "auto":
        # Who has no terminal in the foreground is read by a collector; a file is for people.
        style = "json" if spec.foreground and not output.is_terminal else "text"
        if spec.logfile is not None:
            style = "text"
    logs = Logs(output, style=style, level=spec.loglevel, color=spec.color)
    root = logging.getLogger()
    root.handlers[:] = [LogsHandler(logs)]
    root.setLevel(level_number(spec.loglevel))
    logging.captureWarnings(True)
    return logs


def as_data(line: Line) -> dict[str, Any]:
    """A line as the `logs` verb gives it."""
    return line._asdict()
