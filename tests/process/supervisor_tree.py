"""Starts real trees for the tests of the supervisor, and looks at what is left of them."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

import streamd
from streamd.instance import Folder, StartSpec, new_tree
from streamd.link import connect
from streamd.supervisor import tree
from streamd.wire import Command, Document

GUARDIAN = Path(streamd.__file__).parent / "supervisor" / "guardian.py"
ROOT = Path(streamd.__file__).parent.parent

IDLE = """
import streamd
app = streamd.App("proj")
"""


def many(count: int) -> str:
    """The source of an app with one group of `count` idle processes, and `app#0`."""
    return f"""
import streamd
app = streamd.App("proj")
jobs = app.topic("jobs", value_type=str, partitions={count})

@app.agent(jobs, processes={count})
async def work(stream):
    async for job in stream:
        print("works on", job)

@app.task
async def idle():
    pass
"""


def eventually(is_so: Callable[[], Any], within_s: float = 5.0) -> Any:
    """Wait until the condition gives something true, and return that."""
    deadline = time.monotonic() + within_s
    while not (result := is_so()):
        assert time.monotonic() < deadline, f"not so after {within_s} s"
        time.sleep(0.01)
    return result


def allowed_s(limit_s: float) -> float:
    """A limit that an idle machine keeps, as a test may take it: five times.

    And more where there is more to do than there are processors: others' work is no failure.
    """
    return limit_s * 5 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class Tree:
    """One instance: its guardian, its folders, its log."""

    def __init__(self, place: Path, source: str) -> None:
        self.place = place
        self.folder = Folder(place / "run" / "proj")
        self.marker = new_tree()
        self.logfile = place / "log.txt"
        self.told: list[dict[str, Any]] = []  # what came over the ready pipe
        self.guardian: subprocess.Popen[bytes] | None = None
        self._ready = -1
        self._buffer = b""
        (place / "proj.py").write_text(textwrap.dedent(source))

    def start(
        self,
        environment: dict[str, str] | None = None,
        terminal: str | None = None,
        within: Sequence[str] = (),
        **changes: Any,
    ) -> None:
        """Spawn the guardian, with a controlling terminal if one is named.

        `within` is a command that runs what is appended to it. Settings are given as
        `option_NAME`, fields of the spec by their names.
        """
        self.told, self._buffer = [], b""
        if self._ready >= 0:
            os.close(self._ready)
        self.folder.make()
        lock = eventually(self.folder.try_lock)
        options = {"web_port": "0", "web_enabled": "false", "datadir": str(self.place / "data")}
        for name in [name for name in changes if name.startswith("option_")]:
            options[name.removeprefix("option_")] = changes.pop(name)
        spec = StartSpec(
            app="proj",
            name="proj",
            mode="start",
            foreground=True,
            options=options,
            config_file=None,
            workdir=str(self.place),
            folder=str(self.folder.path),
            tree=self.marker,
            logfile=str(self.logfile),
            loglevel="info",
            log_format="text",
            color=False,
        )
        spec = msgspec.structs.replace(spec, **changes)
        spec_fd = os.memfd_create("spec", 0)
        os.write(spec_fd, msgspec.json.encode(spec))
        self._ready, ready_end = os.pipe()
        os.set_blocking(self._ready, False)
        with (self.place / "guardian.txt").open("ab") as errors, all_signals_blocked():
            self.guardian = subprocess.Popen(
                [
                    *within,
                    sys.executable,
                    "-I",
                    "-S",
                    str(GUARDIAN),
                    *map(str, (spec_fd, lock, ready_end)),
                ],
                pass_fds=(spec_fd, lock, ready_end),
                cwd=self.place,
                env={
                    "PATH": os.environ["PATH"],
                    "PYTHONPATH": str(ROOT),
                    "STREAMD_TREE": self.marker,
                    "STREAMD_RUNTIME_DIR": str(self.place / "run"),
                    **(environment or {}),
                },
                start_new_session=True,
                preexec_fn=(lambda: take_terminal(terminal)) if terminal else None,
                stderr=errors,
            )
        for fd in (spec_fd, lock, ready_end):
            os.close(fd)

    def wait_ready(self, within_s: float = 20.0) -> dict[str, Any]:
        """Wait for the last word about the start: ready, or an error."""
        return eventually(self._last_word, within_s)  # type: ignore[no-any-return]

    def _last_word(self) -> dict[str, Any] | None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._ready, 65536):
                self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        self.told += [json.loads(line) for line in lines]
        last = self.told[-1] if self.told else {}
        return last if "ready" in last or "error" in last else None

    def run(self, **changes: Any) -> "Tree":
        """Start and wait until it is ready."""
        self.start(**changes)
        word = self.wait_ready()
        assert "ready" in word, f"{word}\n{self.log}"
        return self

    @property
    def last(self) -> dict[str, Any]:
        """The last word about the start."""
        return self.told[-1]

    def ask(self, verb: str, **args: Any) -> Any:
        """The first answer to a command."""
        return next(self.answers(verb, **args))

    def ask_all(self, verb: str, **args: Any) -> list[Any]:
        """All answers to a command."""
        return list(self.answers(verb, **args))

    def answers(self, verb: str, **args: Any) -> Iterator[Any]:
        """All answers to a command."""

        async def collect() -> list[Any]:
            link = await connect(self.folder.control_path, "master")
            try:
                async with asyncio.timeout(10.0):
                    stream = link.stream(Command(verb, args))
                    return [
                        answer.data async for answer in stream if isinstance(answer, Document)
                    ]
            finally:
                link.close()

        return iter(asyncio.run(collect()))

    def process(self, name: str) -> dict[str, Any]:
        """The row of a process in the status."""
        rows = self.ask("status")["processes"]
        return next(row for row in rows if row["name"] == name)

    def pid(self, name: str) -> int:
        """The pid of a process that runs."""
        return int(eventually(lambda: self.process(name)["pid"]))

    def wait_other(self, name: str, before: int, within_s: float = 5.0) -> int:
        """The pid of the process that runs in place of `before`."""

        def other() -> int | None:
            row = self.process(name)
            return row["pid"] if row["state"] == "RUNNING" and row["pid"] != before else None

        return int(eventually(other, within_s))

    @property
    def log(self) -> str:
        """What the log file holds."""
        return self.logfile.read_text(errors="replace") if self.logfile.exists() else ""

    def signal(self, number: int) -> None:
        """Send a signal to the guardian."""
        assert self.guardian is not None
        self.guardian.send_signal(number)

    def wait_exit(self, within_s: float = 10.0) -> int:
        """The guardian's exit code."""
        assert self.guardian is not None
        return self.guardian.wait(within_s)

    def survivors(self) -> list[str]:
        """Processes of the tree that are alive."""
        found = tree.find_tree(self.marker, self.folder.read_record(), self.folder.lock_path)
        return [str(each) for each in found]

    def survivors_of_record(self) -> list[str]:
        """Processes of the tree that the runtime folder tells of, whoever started it."""
        record = self.folder.read_record()
        if record is None:
            return []
        return [
            str(each) for each in tree.find_tree(record.tree, record, self.folder.lock_path)
        ]

    def wait_nothing_left(self, within_s: float) -> None:
        """Wait until no process is left and the lock is free."""
        eventually(lambda: not self.survivors(), within_s)
        assert tree.is_free(self.folder.lock_path)

    def close(self) -> None:
        """End whatever is left."""
        if self.guardian is not None:
            report = tree.kill_tree(
                self.marker, self.folder.read_record(), self.folder.lock_path
            )
            with contextlib.suppress(ProcessLookupError):
                self.guardian.send_signal(signal.SIGCONT)
            self.guardian.wait(10)
            assert report.is_complete, [str(found) for found in report.survivors]
        if self._ready >= 0:
            os.close(self._ready)


@contextlib.contextmanager
def all_signals_blocked() -> Iterator[None]:
    """Block all signals, for what is started meanwhile, as the command line does it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def take_terminal(path: str) -> None:
    """Make a terminal the controlling one of this session, which has none."""
    os.close(os.open(path, os.O_RDWR))


@contextlib.contextmanager
def tree_of(source: str = IDLE) -> Iterator[Tree]:
    """A tree of the app with this source, not started; nothing is left of it afterwards."""
    # Short: a Unix socket's path has 107 bytes.
    place = Path(tempfile.mkdtemp(prefix="sv", dir="/tmp"))
    house = Tree(place, source)
    try:
        yield house
    finally:
        house.close()
        shutil.rmtree(place, ignore_errors=True)
