"""A streamd instance of the bench: started, asked and stopped by its command line."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Instance:
    """One app in a folder of its own."""

    def __init__(self, folder: Path, app: str, source: str) -> None:
        self.folder = folder
        self.app = app
        (folder / f"{app}.py").write_text(source)
        self.environment = {
            **os.environ,
            "STREAMD_RUNTIME_DIR": str(folder / "run"),
            "STREAMD_APP": app,
            "STREAMD_WEB_PORT": "0",
        }

    def command(self, *words: str, check: bool = True) -> str:
        """Run `streamd WORDS` and return what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "streamd", *words],
            cwd=self.folder, env=self.environment, capture_output=True, text=True,
        )  # fmt: skip
        if check and done.returncode:
            raise SystemExit(f"streamd {' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def status(self) -> dict[str, Any]:
        """The snapshot."""
        return json.loads(self.command("--json", "status"))  # type: ignore[no-any-return]

    def pids(self) -> dict[str, int]:
        """Process name → pid."""
        return {p["name"]: p["pid"] for p in self.status()["processes"] if p["pid"]}

    def cpu_s(self) -> dict[str, float]:
        """Seconds of CPU that each process has had."""
        return {name: cpu_of(pid) for name, pid in self.pids().items()}

    def wait(self, what: str, true: Callable[[dict[str, Any]], bool], within_s: float) -> float:
        """Wait until the snapshot is as wanted; the moment (monotonic)."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if true(self.status()):
                return time.monotonic()
            time.sleep(0.02)
        raise SystemExit(f"{what}: not within {within_s:g} s")


def cpu_of(pid: int) -> float:
    """User and system seconds of one process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def private_bytes(pid: int) -> int:
    """Memory that only this process has."""
    return _mapped_bytes(pid, "Private_")


def shared_out_bytes(pid: int) -> int:
    """Its private memory, and of each shared page its part: a tenth, where ten share it."""
    return _mapped_bytes(pid, "Pss:")


def _mapped_bytes(pid: int, kind: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(kind))


@contextmanager
def instance(app: str, source: str) -> Iterator[Instance]:
    """An instance that is not started yet; stopped and removed in the end."""
    with tempfile.TemporaryDirectory(prefix="sb-") as folder:
        made = Instance(Path(folder), app, source)
        try:
            yield made
        finally:
            made.command("stop", check=False)
