"""Hosts of one app on Kafka: each has folders, processes and a gateway of its own.

They run on one machine. What makes them hosts is that nothing is shared but the cluster: other
data directories, runtime folders and ports.
"""

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from confluent_kafka import Producer

REPOSITORY = Path(__file__).parents[2]
TOKEN = "between-hosts"
START_S = 60
SESSION_S = 6

T = TypeVar("T")


def eventually(is_so: Callable[[], T], within_s: float = 60.0, every_s: float = 0.1) -> T:
    """Wait until the condition gives something true, and return that."""
    deadline = time.monotonic() + within_s
    while not (result := is_so()):
        assert time.monotonic() < deadline, f"not so after {within_s} s"
        time.sleep(every_s)
    return result


class Host:
    """One host: `streamd` run in folders of its own."""

    def __init__(self, place: Path, source: str, options: str = "") -> None:
        self.place = place
        self.options = options.split()
        self.expected: dict[str, int] = {}
        self.topic = ""
        self.environment = {
            **{name: text for name, text in os.environ.items() if "STREAMD_" not in name},
            "PYTHONPATH": str(REPOSITORY),
            "STREAMD_RUNTIME_DIR": str(place / "run"),
            "STREAMD_WEB_TOKEN": TOKEN,
            "STREAMD_BROKER_SESSION_TIMEOUT": str(SESSION_S),
            "STREAMD_WEB_PORT": "0",
        }
        place.mkdir()
        (place / "proj.py").write_text(source)

    def command(self, line: str) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end."""
        return subprocess.run(
            [sys.executable, "-m", "streamd", "-A", "proj", *line.split()],
            cwd=self.place,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def start(self) -> None:
        """Start it and wait until it reads."""
        done = self.command(f"start {' '.join(self.options)}")
        assert done.returncode == 0, done.stdout + done.stderr

    def stop(self) -> None:
        """Stop it for good."""
        self.command("stop")

    def status(self) -> dict[str, Any]:
        """The whole state, at most a second old; {} where nothing runs."""
        with contextlib.suppress(OSError, ValueError):
            with urllib.request.urlopen(f"{self.web}/streamd/stats/", timeout=20) as reply:
                return dict(json.load(reply))
        return {}

    def state(self) -> str:
        """ "running", "degraded" and so on; "" where nothing runs."""
        return str(self.status().get("state", ""))

    def processes(self) -> dict[str, dict[str, Any]]:
        """What runs, by name."""
        return {each["name"]: each for each in self.status().get("processes", [])}

    def pid(self, name: str) -> int:
        """The process of this name, once it has one."""
        return eventually(lambda: int(self.processes().get(name, {}).get("pid") or 0))

    def kill(self, name: str) -> int:
        """Kill the process of this name, once one lives; its pid."""

        def killed() -> int:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid := self.pid(name), signal.SIGKILL)
                return pid
            return 0

        return eventually(killed)

    def partitions(self, group: str) -> list[int]:
        """Those of a group that this host's processes have."""
        return sorted(
            partition
            for each in self.processes().values()
            if each.get("group") == group
            for partition in each["partitions"]
        )

    def crash(self) -> None:
        """End everything at once, as a power cut does."""
        pids = {name: each["pid"] for name, each in self.processes().items() if each["pid"]}
        # The guardian first: it would end the others in its own way.
        for pid in [pids.pop("guardian"), *pids.values()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @property
    def web(self) -> str:
        """The address of its gateway; "" before its first start."""
        with contextlib.suppress(FileNotFoundError):
            record = json.loads((self.place / "run" / "proj" / "instance.json").read_text())
            return str(record["web"])
        return ""

    def get(self, path: str, url: str = "") -> tuple[int, Any]:
        """Status and JSON of a page."""
        try:
            with urllib.request.urlopen(f"{url or self.web}{path}", timeout=20) as reply:
                return int(reply.status), json.load(reply)
        except urllib.error.HTTPError as error:
            return int(error.code), json.load(error)

    def log(self) -> str:
        """What the instance has logged."""
        return "".join(path.read_text() for path in self.place.glob("*-data/streamd.log"))


def start_all(many: Iterable[Host], start: Callable[[Host], None] = Host.start) -> None:
    """Start hosts at the same time; raises what one of them did."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(start, many))


def sooner(**seconds: float) -> str:
    """Lines to begin an app with, in which the product does not wait as long as it does.

    Args:
        seconds: `module_NAME` of `streamd.agentproc.kafka` -> the time in its place.
    """
    lines = []
    for name, value in seconds.items():
        module, _, constant = name.partition("_")
        found = importlib.import_module(f"streamd.agentproc.kafka.{module}")
        assert getattr(found, constant) > value, f"{name} is no longer than {value:g} s"
        lines.append(f"import {found.__name__} as {module}\n{module}.{constant} = {value}\n")
    return "".join(lines)


@contextlib.contextmanager
def hosts(source: str, count: int, options: str = "") -> Iterator[list[Host]]:
    """Hosts that have not been started; all that runs of them is ended at the end.

    A test that fails shows what they logged.
    """
    # Unix sockets have short paths.
    folder = Path(tempfile.mkdtemp(prefix="kh-", dir="/tmp"))
    made = [Host(folder / name, source, options) for name in "abcd"[:count]]
    try:
        yield made
    finally:
        for host in made:
            host.command("kill --tree --yes")
            sys.stdout.write(f"{host.place.name}:\n{host.log()}\n")
        shutil.rmtree(folder, ignore_errors=True)


class Seen(NamedTuple):
    """An event that an agent worked on."""

    at: float  # monotonic
    pid: int
    partition: int
    value: str


class Trace:
    """The file in which agents write what they work on, one line an event."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def events(self, since: float = 0.0) -> list[Seen]:
        """All so far, in order."""
        if not self._path.exists():
            return []
        words = [line.split(" ", 3) for line in self._path.read_text().splitlines()]
        seen = [Seen(float(at), int(pid), int(part), text) for at, pid, part, text in words]
        return [event for event in seen if event.at >= since]

    def owners(self, since: float) -> dict[int, set[int]]:
        """The processes that worked on each partition."""
        owners: dict[int, set[int]] = {}
        for event in self.events(since):
            owners.setdefault(event.partition, set()).add(event.pid)
        return owners


class Feeder:
    """Writes keyed words to a topic, 100 a second, until it is stopped; counts them."""

    def __init__(self, bootstrap: str, topic: str, words: int = 40) -> None:
        self._producer = Producer({
            "bootstrap.servers": bootstrap, "partitioner": "murmur2_random", "linger.ms": 2,
            # Else a word whose acknowledgement is lost with the broker is there twice.
            "enable.idempotence": True, "message.timeout.ms": 0, "log_level": 0,
        })  # fmt: skip
        self._topic = topic
        self._words = [f"w{n}" for n in range(words)]
        self.counts: dict[str, int] = dict.fromkeys(self._words, 0)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Feeder":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """Stop, and wait until the cluster has all of it."""
        self._ending.set()
        self._thread.join(60)
        assert self._producer.flush(60) == 0

    def _run(self) -> None:
        while not self._ending.is_set():
            for word in self._words:
                self._producer.produce(self._topic, f'"{word}"'.encode(), key=word)
                self.counts[word] += 1
                self._producer.poll(0)
                if self._ending.wait(0.01):
                    return


def traced_app(bootstrap: str, id: str, trace: Path, *, processes: int = 2) -> str:
    """The source of an app that counts the words of `{id}-words`, and writes a trace."""
    return f'''
import os
import time

import streamd

app = streamd.App("{id}", broker="kafka://{bootstrap}", topic_partitions=4)
words = app.topic("{id}-words", key_type=str, value_type=str, partitions=4)
counts = app.Table("counts", default=int)
trace = os.open("{trace}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)


@app.agent(words, processes={processes})
async def count(stream):
    async for event in stream.events():
        counts[event.value] += 1
        partition = event.message.partition
        line = f"{{time.monotonic()}} {{os.getpid()}} {{partition}} {{event.value}}\\n"
        os.write(trace, line.encode())


@app.page("/count/{{word}}/")
@app.table_route(table=counts, match_info="word")
async def get_count(web, request, word):
    return web.json({{"count": counts[word]}})
'''
