"""An app in a folder of its own, and the command line run on it."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

REPOSITORY = Path(__file__).parents[2]

T = TypeVar("T")

WORDS = """
import streamd

app = streamd.App("ID", broker="BROKER", topic_partitions=2, web_enabled=False)
posts = app.topic("ID-posts", value_type=str)
counts = app.Table("counts", default=int)

@app.agent(posts)
async def split(posts):
    async for post in posts:
        for word in post.split():
            await count.send(key=word, value=word)

@app.agent(value_type=str)
async def count(words):
    async for word in words:
        counts[word] += 1
"""


def eventually(is_so: Callable[[], T], within_s: float = 60.0) -> T:
    """Wait until the condition gives something true, and return that."""
    deadline = time.monotonic() + within_s
    while not (result := is_so()):
        assert time.monotonic() < deadline, f"not so after {within_s} s"
        time.sleep(0.05)
    return result


class Site:
    """A folder with an app's module, `proj`."""

    def __init__(self, place: Path, source: str, id: str, broker: str) -> None:
        self.place = place
        self.id = id
        self.write(source, broker)
        self.environment = {
            **{name: text for name, text in os.environ.items() if "STREAMD_" not in name},
            "PYTHONPATH": str(REPOSITORY),
            "STREAMD_RUNTIME_DIR": str(place / "run"),
            "STREAMD_BROKER_SESSION_TIMEOUT": "6",
        }

    def write(self, source: str, broker: str) -> None:
        """Put another app in the place."""
        text = source.replace("ID", self.id).replace("BROKER", f"kafka://{broker}")
        (self.place / "proj.py").write_text(text)

    def run(
        self, line: str | Sequence[str], input: str = ""
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end."""
        words = line.split() if isinstance(line, str) else list(line)
        return subprocess.run(
            [sys.executable, "-m", "streamd", "-A", "proj", *words],
            cwd=self.place,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            input=input,
        )

    def do(self, line: str | Sequence[str], input: str = "") -> str:
        """Run a command that must succeed; what it printed."""
        done = self.run(line, input)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, line: str) -> Any:
        """Run a command with --json; what it said."""
        return json.loads(self.do(f"{line} --json"))

    def count_of(self, word: str) -> int:
        """What the table `counts` has; 0 where nobody can say."""
        done = self.run(f"table counts {word} --json")
        return int(json.loads(done.stdout)["value"] or 0) if done.stdout else 0

    def status(self) -> Any:
        """The whole state, which may be degraded."""
        return json.loads(self.run("status --json").stdout)

    def waits_for(self) -> str:
        """What its processes wait for; "" where there is nothing."""
        problems = self.status()["problems"]
        return "; ".join(each["text"] for each in problems if each["code"] == "waits")

    def end(self) -> None:
        """End what runs; a test that failed shows what was logged."""
        self.run("kill --tree --all --yes")
        for path in sorted(self.place.glob("*-data/streamd.log")):
            sys.stdout.write(path.read_text())


@contextlib.contextmanager
def site(source: str, id: str, broker: str) -> Iterator[Site]:
    """A place for an app, ended and deleted afterwards."""
    place = Path(tempfile.mkdtemp(prefix="k-", dir="/tmp"))
    here = Site(place, source, id, broker)
    try:
        yield here
    finally:
        here.end()
        shutil.rmtree(place)
