"""A project folder with a runtime folder of its own, and the command line run in it."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from streamd.instance import Folder

REPOSITORY = Path(__file__).parents[2]


class Place:
    """A project folder and a runtime folder of its own, and `streamd` run there."""

    def __init__(self, folder: Path, runtime: Path) -> None:
        self.folder = folder
        self.runtime = runtime
        clean = {name: text for name, text in os.environ.items() if "STREAMD_" not in name}
        self.environment = {
            **clean,
            "PYTHONPATH": str(REPOSITORY),
            "STREAMD_RUNTIME_DIR": str(runtime),
        }

    def command(self, line: str | Sequence[str]) -> list[str]:
        words = line.split() if isinstance(line, str) else list(line)
        return [sys.executable, "-m", "streamd", *words]

    def run(
        self, line: str | Sequence[str], input: str = ""
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.command(line),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=30,
            input=input,
        )

    def spawn(self, line: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self.command(line),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def folder_of(self, name: str) -> Folder:
        return Folder(self.runtime / name)

    def is_free(self, name: str) -> bool:
        lock = self.folder_of(name).try_lock()
        if lock is not None:
            os.close(lock)
        return lock is not None

    def runs(self) -> bool:
        """True once the only instance is ready."""
        return '"state": "running"' in self.run("status --json").stdout

    def end_all(self) -> None:
        self.run("kill --tree --all --yes")


@contextlib.contextmanager
def place(source: str) -> Iterator[Place]:
    runtime = Path(tempfile.mkdtemp(prefix="cli-", dir="/tmp"))
    folder = runtime / "site"
    folder.mkdir()
    (folder / "proj.py").write_text(source)
    here = Place(folder, runtime / "run")
    try:
        yield here
    finally:
        here.end_all()
        shutil.rmtree(runtime)


def eventually(condition: Callable[[], object], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)
