"""Runs the word count as a daemon does, in the foreground, and shows it at work.

The tree is a child process in a process group of its own: signals come here first and are
passed on once each, so that the first Ctrl-C stops it warm and the second cold.
"""

import asyncio
import ctypes
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

from streamd.demo import broker, text
from streamd.demo.instance import ask, read_counts
from streamd.errors import StreamdError, TimedOut, UsageError
from streamd.instance import Folder, instance_name
from streamd.secrets import mask

NAME = "demo"
TABLE = "word_counts"

READY_S = 60.0
STANDSTILL_S = 30.0  # `--once` gives up when nothing was counted for so long
LOOK_EACH_S = 1.0
POLL_EACH_S = 0.1
SHOWN_LOG_LINES = 15

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class Options(Protocol):
    """What the command line was given; see `streamd.cli.options.Given`."""

    name: str | None
    settings: dict[str, str]


def run(
    given: Options,
    *,
    once: bool,
    kafka: bool = False,
    port: int | None = None,
    rate: float = 200.0,
) -> int:
    """Run the demo until a signal ends it, or with `once` until the text is counted.

    Args:
        port: Of the stats page; None: what the settings say.
        rate: Posts to send each second; with `once` it does not matter.

    Returns:
        The exit code: 0 stopped warm, or counted exactly; 1 counted wrongly; else the tree's.

    Raises:
        StreamdError: The tree could not be started, or stood still.
    """
    kept = given.settings.get("datadir")
    if once and kept and Path(kept).exists() and any(Path(kept).iterdir()):
        raise UsageError(
            f"--once counts from nothing, and {kept} is not empty",
            remedy="another --datadir, or none: the demo then uses a temporary one",
        )
    # Short: the sockets of the tree are not here, but people read the path.
    home = Path(tempfile.mkdtemp(prefix="streamd-demo-"))
    try:
        show = _Show(given, home, port=port, posts_per_s=0.0 if once else rate)
        if kafka:
            return asyncio.run(_on_kafka(show, given.settings, once=once))
        return asyncio.run(show.run(once=once))
    finally:
        shutil.rmtree(home)


async def _on_kafka(show: "_Show", options: dict[str, str], *, once: bool) -> int:
    # The tree takes it from the environment, and so does what sends to it from here.
    id = os.environ["DEMO_ID"] = f"{NAME}-{uuid.uuid4().hex[:8]}"
    async with broker.kafka(id, options) as url:
        _say(f"On {mask(url)}, as {id}.")
        return await show.run(once=once, broker_url=url)


class _Show:
    """One run of the demo."""

    def __init__(
        self, given: Options, home: Path, *, port: int | None, posts_per_s: float
    ) -> None:
        settings = {"datadir": str(home / "data"), "log_format": "text", **given.settings}
        settings.setdefault("logfile", str(home / "streamd.log"))
        if port is not None:
            settings["web_port"] = str(port)
        self._settings = settings
        self._name = instance_name("", given.name or NAME)
        self._folder = Folder.of(self._name)
        self._output = home / "output.txt"
        self._posts_per_s = posts_per_s
        self._stop_asked = asyncio.Event()
        self._tree: asyncio.subprocess.Process | None = None

    async def run(self, *, once: bool, broker_url: str = "") -> int:
        """Start the tree, show it, end it; the exit code."""
        if broker_url:
            self._settings["broker"] = broker_url
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            loop.add_signal_handler(number, self._pass_on, number)
        began = time.monotonic()
        self._tree = tree = await self._spawn()
        ended = asyncio.create_task(tree.wait(), name="tree ended")
        showing = asyncio.create_task(
            self._count_once(began) if once else self._show_for_ever(began), name="show"
        )
        stopping = asyncio.create_task(self._stop_asked.wait(), name="stop asked")
        try:
            await asyncio.wait({ended, showing, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done() and not self._stop_asked.is_set():
                raise self._gone(await ended)
            if showing.done():
                code = await showing
                tree.terminate()
                return await ended or code
            _say("Stopping: what runs is finished …")
            code = await ended
            if code == 0:
                _say("Stopped; nothing is left behind.")
            return code
        finally:
            stopping.cancel()
            showing.cancel()
            if not ended.done():
                tree.terminate()
            await asyncio.wait({ended, showing, stopping})

    async def _spawn(self) -> asyncio.subprocess.Process:
        settings = {key: value for key, value in self._settings.items() if key != "workdir"}
        options = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
        with self._output.open("wb") as output:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "streamd", "start", "--foreground"),
                *("-A", "streamd.demo.app", "--name", self._name),
                *options,
                env={**os.environ, "DEMO_POSTS_PER_S": str(self._posts_per_s)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
                preexec_fn=_end_with_parent,
            )

    def _pass_on(self, number: int) -> None:
        self._stop_asked.set()
        if self._tree is not None and self._tree.returncode is None:
            # The tree has no terminal of its own that could hang up.
            self._tree.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def _gone(self, code: int) -> StreamdError:
        lines = self._output.read_text(errors="replace").splitlines()
        log = Path(self._settings["logfile"])
        if log.exists():
            lines += log.read_text(errors="replace").splitlines()
        error = StreamdError(
            f"the demo ended by itself, exit code {code}", seen=lines[-SHOWN_LOG_LINES:]
        )
        error.exit_code = code if code > 0 else 70
        return error

    async def _wait_ready(self, began: float) -> dict[str, Any]:
        """The first snapshot of the running tree."""
        shown: dict[str, str] = {}
        while True:
            told = await self._look()
            for row in told["processes"] if told else ():
                if row["state"] == "RUNNING" and row["name"] not in shown:
                    shown[row["name"]] = row["state"]
                    _say(f"  {row['name']:<18}RUNNING{time.monotonic() - began:>8.1f} s")
            if told and told["state"] == "running":
                return told
            if time.monotonic() - began > READY_S:
                raise TimedOut(
                    f"the demo is not ready after {READY_S:g} s",
                    seen=[told["sentence"]] if told else [],
                )
            await asyncio.sleep(POLL_EACH_S)

    async def _look(self) -> dict[str, Any] | None:
        """The snapshot, or None while nobody answers."""
        try:
            told: dict[str, Any] = await ask(self._folder, "status")
        except StreamdError:
            return None
        return told

    async def _show_for_ever(self, began: float) -> int:
        _say("Counting the words of Python's help, over and over. Ctrl-C ends it.")
        told = await self._wait_ready(began)
        _say(f"\nStats page: {told['web']}/    a word: curl {told['web']}/count/the/\n")
        before: tuple[float, int] | None = None
        while True:
            await asyncio.sleep(LOOK_EACH_S)
            if told := await self._look() or {}:
                now, counted = time.monotonic(), _counted(told)
                rate = (counted - before[1]) / (now - before[0]) if before else 0.0
                before = now, counted
                _say(_progress(counted, rate, told))

    async def _count_once(self, began: float) -> int:
        _say("Counting the words of Python's help, once.")
        await self._wait_ready(began)
        begun = time.monotonic()
        await self._send_text()
        counts = await self._wait_counted()
        took_s = time.monotonic() - begun
        for word, count in counts.most_common(10):
            _say(f"{count:>8,}  {word}")
        return _judge(counts, Counter(text.words()), took_s)

    async def _send_text(self) -> None:
        """Append every post, durably; once, whatever restarts meanwhile."""
        from streamd.demo.app import app, posts_topic  # noqa: PLC0415 - the tree runs it, not we

        # Of these alone the log depends.
        options = {k: v for k, v in self._settings.items() if k in ("datadir", "broker")}
        app.configure(os.environ, None, options)
        async with app.client():
            for post in text.posts():
                await posts_topic.send(value=post)

    async def _wait_counted(self) -> Counter[str]:
        """The counts, once they add up to the text's words or stand still."""
        begun = moved_at = time.monotonic()
        wanted, best = len(text.words()), -1
        while True:
            counts = await self._read_counts()
            total = counts.total() if counts is not None else 0
            told = await self._look()
            if total != best:
                best, moved_at = total, time.monotonic()
                if told:
                    _say(_progress(total, total / (moved_at - begun), told))
            if counts is not None and told and total >= wanted and told["behind"] == 0:
                return counts
            if time.monotonic() - moved_at > STANDSTILL_S:
                if counts is not None:
                    return counts
                raise TimedOut(f"nothing was counted for {STANDSTILL_S:g} s")
            await asyncio.sleep(POLL_EACH_S)

    async def _read_counts(self) -> Counter[str] | None:
        try:
            return await read_counts(self._folder, TABLE)
        except StreamdError:
            # A process is being replaced; its successor is asked in a moment.
            return None


def _judge(counts: Counter[str], right: Counter[str], took_s: float) -> int:
    """Compare key by key; say what came out; the exit code."""
    wrong = sorted(word for word in counts | right if counts[word] != right[word])
    for word in wrong[:20]:
        _say(
            f"wrong: {word!r} was counted {counts[word]} times, it is there {right[word]} times"
        )
    if wrong:
        _say(f"not exact: {len(wrong)} of {len(right):,} words are wrong")
        return 1
    _say(f"exact: {right.total():,} words, {len(right):,} distinct ({took_s:.1f} s)")
    return 0


def _counted(told: dict[str, Any]) -> int:
    return sum(row["events"] for row in told["agents"] if row["label"] == "count_words")


def _progress(counted: int, rate: float, told: dict[str, Any]) -> str:
    text = f"{counted:>12,} words counted {rate:>9,.0f} words/s {told['behind']:>7,} behind"
    return text if told["state"] != "degraded" else f"{text}   {told['sentence']}"


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    """In the child, before it becomes the tree: a demo that is killed takes the tree along."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
