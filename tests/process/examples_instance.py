"""Runs the examples as a user does: the command line, a free port, real HTTP."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import streamd

ROOT = Path(streamd.__file__).parent.parent
EXAMPLES = ROOT / "examples"


def eventually(is_so: Callable[[], Any], within_s: float = 10.0) -> Any:
    """Wait until the condition gives something true, and return that."""
    deadline = time.monotonic() + within_s
    while not (result := is_so()):
        assert time.monotonic() < deadline, f"not so after {within_s} s"
        time.sleep(0.02)
    return result


class Instance:
    """One example: its place, its process once it runs, its pages."""

    def __init__(self, place: Path, app: str) -> None:
        self.place = place
        self.app = app
        self.output = place / "output.txt"
        self.process: subprocess.Popen[bytes] | None = None
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("STREAMD_")},
            "PYTHONPATH": str(ROOT),
            "STREAMD_RUNTIME_DIR": str(place / "run"),
            "STREAMD_DATADIR": str(place / "data"),
            "STREAMD_LOG_FORMAT": "text",
        }

    def command(self, *words: str) -> list[str]:
        """`streamd -A app WORDS`."""
        return [sys.executable, "-m", "streamd", "-A", self.app, *words]

    def run(self, *words: str, code: int | None = 0, timeout_s: float = 30.0) -> str:
        """A command to its end; what it wrote to stdout. Any exit code will do where None."""
        done = subprocess.run(
            self.command(*words), cwd=self.place, env=self.environment,
            capture_output=True, timeout=timeout_s,
        )  # fmt: skip
        assert code in (None, done.returncode), (
            f"{done.returncode}: {done.stdout!r} {done.stderr!r}"
        )
        return done.stdout.decode()

    def start(self, *words: str) -> "Instance":
        """Run `streamd -A app WORDS` on a free port and wait until all of it is ready."""
        self.spawn(self.command(*words, "-p", "0"))
        self.wait_ready()
        return self

    def spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        """Run a command that stays."""
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=self.place, env=self.environment,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        return self.process

    def wait_ready(self) -> None:
        """Wait until the whole instance is ready."""
        assert self.process is not None

        def ready() -> bool:
            assert self.process and self.process.poll() is None, self.text
            return bool(self.address) and self.get("/readyz")[0] == 200

        eventually(ready, 30.0)

    @property
    def text(self) -> str:
        """What the instance wrote."""
        return self.output.read_text(errors="replace")

    @property
    def address(self) -> str:
        """Where its pages are, without a last slash; "" before it says so."""
        for path in self.place.glob("run/*/instance.json"):
            return str(json.loads(path.read_text())["web"]).rstrip("/")
        return ""

    def get(self, path: str, method: str = "GET") -> tuple[int, Any]:
        """Status and JSON, or text, of a page; status 0: nobody answers."""
        request = urllib.request.Request(self.address + path, method=method)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                status, body = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                status, body = error.code, error.read().decode()
        except OSError:
            return 0, ""
        try:
            return status, json.loads(body)
        except ValueError:
            return status, body

    def stop(self, number: int = signal.SIGTERM, within_s: float = 20.0) -> int:
        """Send the signal and wait for the end; the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(within_s)

    def close(self) -> None:
        """End what still runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for lock in self.place.glob("run/*/tree.lock"):
            subprocess.run(
                [sys.executable, "-m", "streamd", "kill", "--name", lock.parent.name],
                env=self.environment, capture_output=True, timeout=30,
            )  # fmt: skip


@contextmanager
def example(app: str) -> Iterator[Instance]:
    """An example that is not started yet, in a place of its own; ended afterwards."""
    place = Path(tempfile.mkdtemp(prefix="ex-"))
    path = EXAMPLES / app
    instance = Instance(place, str(path) if path.exists() else app)
    try:
        yield instance
    finally:
        instance.close()
        shutil.rmtree(place)
