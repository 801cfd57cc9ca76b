"""The supervisors that are measured: streamd and what people use, each with its children.

Each is started in the foreground in a folder of its own and found again in /proc. The others
get the lightest child that they can have: `sleep`, which is up as soon as it exists, and
gunicorn a worker of a one-line app. Only streamd tells when a child is ready, so its figures
are up to that moment and theirs up to the existence of the process.
"""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from streamd.instance import Folder

POLL_S = 0.002

APP = """
import asyncio, os, time
import streamd

app = streamd.App("bench", hang_limit=600)
sink = app.topic("sink")


def make(number):
    async def agent(stream):
        if number < {stuck}:
            await asyncio.sleep(1.0)
            time.sleep(600)
        async for _ in stream:
            await sink.send(value=number)

    agent.__name__ = f"agent{{number}}"
    return app.agent()(agent)


agents = [make(number) for number in range({count})]


@app.command()
async def work(self):
    for event in range(int(os.environ["EVENTS"])):
        for agent in agents:
            await agent.send(value=event)
"""

SUPERVISOR = """
[supervisord]
nodaemon=true
logfile=NONE
logfile_maxbytes=0
pidfile={folder}/supervisord.pid

[program:child]
command=/bin/sleep 100000
numprocs={count}
process_name=child_%(process_num)03d
autorestart=true
stdout_logfile=NONE
stderr_logfile=NONE
"""

CIRCUS = """
[circus]
check_delay = 1
endpoint = ipc://{folder}/endpoint
pubsub_endpoint = ipc://{folder}/pubsub

[watcher:child]
cmd = /bin/sleep
args = 100000
numprocesses = {count}
"""

GUNICORN = """
def app(environ, start_response):
    start_response("200 OK", [])
    return [b""]
"""

RUNNING = re.compile(rb"agent\d+#0 \(pid (\d+)\) is RUNNING")
STACKS = re.compile(rb"== (agent\d+#0) \(pid \d+\)")


def children_of(pid: int) -> set[int]:
    """The children of a process, of all its threads; zombies too."""
    found: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found.update(map(int, path.read_text().split()))
        except OSError:
            continue
    return found


def sleepers_below(pid: int) -> set[int]:
    """The processes named sleep below a process."""
    found: set[int] = set()
    below = children_of(pid)
    while below:
        child = below.pop()
        below |= children_of(child)
        try:
            if Path(f"/proc/{child}/comm").read_text() == "sleep\n":
                found.add(child)
        except OSError:
            continue
    return found


def is_alive(pid: int) -> bool:
    """True if the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@dataclass(frozen=True)
class Kind:
    """How one of the others is set up."""

    name: str
    files: dict[str, str]  # with {folder} and {count}
    command: list[str]  # the same
    find: Callable[[int], set[int]] = children_of
    restarts: bool = True

    @property
    def version(self) -> str:
        """As it is installed here."""
        return importlib.metadata.version(self.name)


def tool(name: str) -> str:
    """A command that is installed beside this Python."""
    return str(Path(sys.executable).parent / name)


OTHERS = (
    Kind(
        "supervisor",
        {"supervisord.conf": SUPERVISOR},
        [tool("supervisord"), "-c", "{folder}/supervisord.conf"],
    ),
    Kind("circus", {"circus.ini": CIRCUS}, [tool("circusd"), "{folder}/circus.ini"]),
    Kind(
        "gunicorn",
        {"wsgi.py": GUNICORN},
        [
            tool("gunicorn"), "-w", "{count}", "-b", "unix:{folder}/sock",
            "--no-control-socket", "--log-level", "error", "wsgi:app",
        ],
    ),
    Kind(
        "honcho",
        {"Procfile": "child: sleep 100000\n"},
        [tool("honcho"), "start", "-c", "child={count}"],
        sleepers_below,
        restarts=False,
    ),
)  # fmt: skip


class Other:
    """One of the others, with its children."""

    def __init__(self, kind: Kind, folder: Path, count: int) -> None:
        self.kind = kind
        self.name = f"{kind.name} {kind.version}"
        self.restarts = kind.restarts
        self.count = count
        self.master = 0
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        for name, text in kind.files.items():
            text = text.replace("{folder}", str(folder)).replace("{count}", str(count))
            (folder / name).write_text(text)

    def start(self) -> None:
        """Start it; the children are not there yet."""
        words = [
            word.format(folder=self._folder, count=self.count) for word in self.kind.command
        ]
        # Without the path of this clone, whose folder `supervisor` is another.
        environment = {
            name: value for name, value in os.environ.items() if name != "PYTHONPATH"
        }
        with (self._folder / "output.txt").open("wb") as output:
            self._process = subprocess.Popen(
                words, cwd=self._folder, stdout=output, stderr=output, start_new_session=True,
                env=environment,
            )  # fmt: skip
        self.master = self._process.pid

    def wait_ready(self, within_s: float = 60.0) -> None:
        """Wait until all children exist."""
        self._wait(lambda: len(self.children()) >= self.count, within_s)

    def children(self) -> set[int]:
        """The pids of its children."""
        return self.kind.find(self.master)

    def wait_replaced(self, before: set[int], killed: int, within_s: float = 60.0) -> None:
        """Wait until there are so many children that were not there before."""
        self._wait(lambda: len(self.children() - before) >= killed, within_s)

    def stop(self) -> None:
        """TERM, until it has ended."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(60)

    def kill(self, children: set[int]) -> None:
        """End it and what it left behind."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        for pid in children:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def _wait(self, is_so: Callable[[], bool], within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while not is_so():
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.name}: not within {within_s:g} s")
            time.sleep(POLL_S)


class Streamd:
    """An instance with so many agents, each in its process, and without the stats page."""

    name = "streamd"
    restarts = True

    def __init__(self, folder: Path, count: int, *, stuck: int = 0) -> None:
        self.count = count
        self.master = 0
        self._folder = folder
        self._log = folder / "log.txt"
        self._at = 0  # how far the log was read
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "bench.py").write_text(APP.format(count=count, stuck=stuck))

    def start(self) -> None:
        """Start it; the agents are not there yet."""
        self._log.unlink(missing_ok=True)
        self._at = 0
        with (self._folder / "output.txt").open("wb") as output:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "streamd", "-A", "bench", "start", "--foreground",
                    "--without-web", "--logfile", str(self._log),
                ],
                cwd=self._folder, stdout=output, stderr=output, start_new_session=True,
                env=self._environment(),
            )  # fmt: skip

    def wait_ready(self, within_s: float = 60.0) -> None:
        """Wait until all agents are ready."""
        self._wait_lines(RUNNING, self.count, within_s)
        record = Folder(self._folder / "run" / "bench").read_record()
        assert record is not None
        self.master = record.master.pid

    def children(self) -> set[int]:
        """The pids of the agent processes."""
        by_pid: dict[bytes, int] = {}
        for name, pid in re.findall(rb"(agent\d+#0) \(pid (\d+)\) is RUNNING", self._read(0)):
            by_pid[name] = int(pid)
        return set(by_pid.values())

    def wait_replaced(self, before: set[int], killed: int, within_s: float = 60.0) -> None:
        """Wait until so many have become ready since the last wait."""
        self._wait_lines(RUNNING, killed, within_s)

    def work(self, events: int, within_s: float = 60.0) -> None:
        """Send so many events to each agent, and wait until they are settled."""
        self._command("work", EVENTS=str(events))
        deadline = time.monotonic() + within_s
        while json.loads(self._command("--json", "status"))["events"] < events * self.count:
            if time.monotonic() > deadline:
                raise SystemExit(f"streamd: not all events within {within_s:g} s")
            time.sleep(0.1)

    def wait_stacks(self, within_s: float = 60.0) -> None:
        """Wait until the stacks of all agents stand in the log."""
        self._wait_lines(STACKS, self.count, within_s)

    def stop(self) -> None:
        """TERM, until it has ended."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(60)

    def kill(self, children: set[int]) -> None:
        """End it by the master's death, and wait until nothing is left."""
        if self._process is None:
            return
        if self._process.poll() is None:
            # Its third means: kill.
            for _ in range(3):
                self._process.send_signal(signal.SIGINT)
        self._process.wait(60)

    def signal(self, number: int) -> None:
        """Send a signal to the instance."""
        assert self._process is not None
        self._process.send_signal(number)

    def _command(self, *words: str, **environment: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "streamd", "-A", "bench", *words],
            cwd=self._folder, stdout=subprocess.PIPE, check=True, text=True,
            env={**self._environment(), **environment},
        ).stdout  # fmt: skip

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "STREAMD_RUNTIME_DIR": str(self._folder / "run")}

    def _read(self, at: int) -> bytes:
        try:
            with self._log.open("rb") as file:
                file.seek(at)
                return file.read()
        except FileNotFoundError:
            return b""

    def _wait_lines(self, wanted: re.Pattern[bytes], count: int, within_s: float) -> None:
        """Wait for so many of these in what was logged since the last wait."""
        deadline = time.monotonic() + within_s
        found: set[bytes] = set()
        while len(found) < count:
            whole, _, _ = self._read(self._at).rpartition(b"\n")
            if whole:
                self._at += len(whole) + 1
                found.update(wanted.findall(whole))
            elif time.monotonic() > deadline:
                raise SystemExit(f"streamd: {len(found)} of {count} within {within_s:g} s")
            else:
                time.sleep(POLL_S)
