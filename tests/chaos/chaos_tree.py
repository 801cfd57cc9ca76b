"""An instance under load and under attack, on the embedded log or on Kafka."""

import asyncio
import contextlib
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import streamd
from streamd.errors import StreamdError
from streamd.failpoints import fired_path
from streamd.instance import Folder, process_state
from streamd.link import connect
from streamd.supervisor import tree
from streamd.wire import Append, Appended, Command, Document, OutRecord

ROOT = Path(streamd.__file__).parent.parent
APP = Path(__file__).with_name("chaos_app.py")
WORDS = [f"w{number}" for number in range(60)]


def eventually(is_so: Callable[[], Any], what: str, within_s: float = 15.0) -> Any:
    """Wait until the condition gives something true, and return that."""
    deadline = time.monotonic() + within_s
    while not (result := is_so()):
        assert time.monotonic() < deadline, f"{what}: not so after {within_s} s"
        time.sleep(0.01)
    return result


class Tree:
    """One instance, started and stopped by its command line.

    Args:
        broker: A Kafka's `host:port`; "" for the embedded log.
        settings: Environment variables that win over what the app says.
        twin: Another host's instance of the same app.
        app: The module that is run as `proj`.
    """

    def __init__(
        self,
        place: Path,
        broker: str = "",
        settings: Mapping[str, str] | None = None,
        twin: "Tree | None" = None,
        app: Path = APP,
    ) -> None:
        token = uuid.uuid4().hex[:8] if broker else ""
        self.place = place
        self.broker = broker
        # What a Kafka holds of it has names of its own: others are there as well.
        self.app_id: str = twin.app_id if twin else f"proj{token}"
        self.prefix: str = twin.prefix if twin else f"{token}-" if token else ""
        self.datadir = place / "data"
        self.logfile = place / "log.txt"
        self.folder = Folder(place / "run" / "proj")
        self.trees: list[str] = []  # every value of STREAMD_TREE that there was
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "STREAMD_RUNTIME_DIR": str(place / "run"),
            "CHAOS_ID": self.app_id,
            "CHAOS_PREFIX": self.prefix,
            **({"STREAMD_BROKER": f"kafka://{broker}"} if broker else {}),
            **(settings or {}),
        }
        (place / "proj.py").write_text(app.read_text())
        self._worker: subprocess.Popen[bytes] | None = None

    def command(self, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run `streamd WORDS`."""
        return subprocess.run(
            [sys.executable, "-m", "streamd", "-A", "proj", *words],
            cwd=self.place, env=self.environment | environment, capture_output=True,
            text=True, timeout=90, check=False,
        )  # fmt: skip

    def start(self, mode: str = "start", **environment: str) -> int:
        """Start with a process for each group, or as `worker`; the exit code of the start."""
        options = ("-p", "0", "--datadir", str(self.datadir), "-f", str(self.logfile))
        if mode == "start":
            done = self.command("start", *options, **environment)
            code, said = done.returncode, done.stdout + done.stderr
        else:
            before = self.folder.read_record()
            with (self.place / "worker.txt").open("ab") as out:
                self._worker = subprocess.Popen(
                    [sys.executable, "-m", "streamd", "-A", "proj", "worker", *options],
                    cwd=self.place, env=self.environment | environment,
                    stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                )  # fmt: skip
            eventually(lambda: self.folder.read_record() not in (None, before), "worker starts")
            eventually(lambda: self.state() == "running", "worker runs", 30.0)
            code, said = 0, ""
        record = self.folder.read_record()
        if record is not None and record.tree not in self.trees:
            self.trees.append(record.tree)
        assert not code or environment, f"start: exit code {code}\n{said}"
        return code

    def stop(self, *words: str) -> None:
        """Stop; nothing may be left."""
        done = self.command("stop", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        self.assert_nothing_left()

    def ask(self, verb: str, timeout_s: float = 5.0, **args: Any) -> Any:
        """What the master answers at last; None when there is none."""

        async def go() -> Any:
            link = await connect(self.folder.control_path, "master")
            try:
                answer = await link.request(Command(verb, args), timeout_s)
            finally:
                link.close()
            return answer.data if isinstance(answer, Document) else None

        try:
            return asyncio.run(go())
        except StreamdError:
            return None

    def state(self) -> str:
        """The state of the instance, "" when there is none."""
        return str((self.ask("status") or {}).get("state", ""))

    def processes(self) -> dict[str, int]:
        """Name → pid of what is alive."""
        status = self.ask("status") or {"processes": []}
        return {each["name"]: each["pid"] for each in status["processes"] if each["pid"]}

    def kill_one_agent(self) -> None:
        """Kill one agent process."""
        pids = self.processes()
        kill(next(pid for name, pid in pids.items() if "#" in name))

    def census(self) -> list[tree.Found]:
        """Every process of any tree that was started here."""
        markers = [b"STREAMD_TREE=" + marker.encode() for marker in self.trees]
        found = []
        for each in tree.everything():
            with contextlib.suppress(OSError):
                content = Path(f"/proc/{each.pid}/environ").read_bytes()
                if any(marker in content for marker in markers) and each.state not in "ZX":
                    found.append(each)
        return found

    def zombies(self) -> list[tree.Found]:
        """Ended children of the tree's processes that nobody has reaped."""
        parents = {each.pid for each in self.census()}
        return [e for e in tree.everything() if e.state == "Z" and e.ppid in parents]

    def assert_nothing_left(self, within_s: float = 3.0) -> None:
        """No process has the tree's marker, and its lock is free."""
        self.reap()
        eventually(lambda: not self.census(), "nothing is left of the tree", within_s)
        if self._worker is not None:
            self._worker.wait(3.0)
            self._worker = None
        # A process that is just ending may hold the lock a moment longer than its memory.
        eventually(lambda: tree.is_free(self.folder.lock_path), "the lock is free", within_s)

    def reap(self) -> None:
        """Wait for what was adopted: this process is a subreaper, see `subreaper`."""
        if self._worker is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._worker.wait(0.0)
        for pid in tree.children():
            if tree_state(pid) == "Z" and (self._worker is None or pid != self._worker.pid):
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)

    def fired(self, name: str) -> bool:
        """True once a failpoint has acted."""
        files = (Path(fired_path(marker, name)).name for marker in self.trees)
        return any((self.place / "run" / file).exists() for file in files)

    def kill_all(self) -> None:
        """End whatever is left; for the end of a test that failed."""
        if self.folder.lock_path.exists():
            for marker in self.trees:
                record = self.folder.read_record()
                tree.kill_tree(marker, record, self.folder.lock_path, deadline_s=3.0)
        if self._worker is not None:
            self._worker.wait(3.0)
        self.reap()


def tree_state(pid: int) -> str:
    """The state of a process, "" when it is gone."""
    try:
        return process_state(pid)
    except ProcessLookupError:
        return ""


@contextmanager
def instance(
    broker: str = "", settings: Mapping[str, str] | None = None, app: Path = APP
) -> Iterator[Tree]:
    """An instance that is not started; ended and removed afterwards. Arguments as of `Tree`."""
    libc = ctypes.CDLL(None)
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans of killed trees come here
    with tempfile.TemporaryDirectory(prefix="sc-") as folder:
        made = Tree(Path(folder), broker, settings, app=app)
        try:
            yield made
        except BaseException:
            keep_log(made)
            raise
        finally:
            made.kill_all()
            libc.prctl(36, 0, 0, 0, 0)


def keep_log(made: Tree) -> None:
    """Print the end of the log of a test that failed, and keep its data where asked to."""
    if made.logfile.exists():
        lines = made.logfile.read_text(errors="replace").splitlines()
        sys.stdout.write("\n".join([*lines[-200:], ""]))
    if kept := os.environ.get("CHAOS_KEEP"):
        subprocess.run(["cp", "-r", str(made.place), kept], check=False)


# Load.


class Load:
    """Sends posts, transfers and deposits through the log's socket until told to stop.

    A batch whose acknowledgement did not come is not sent again: it is in the log once or not
    at all, and the oracle takes what the log has.
    """

    def __init__(self, made: Tree, seed: int, pause_s: float = 0.02) -> None:
        self.acked: set[tuple[str, int]] = set()  # (topic, number)
        self.batches = 0
        self._made = made
        self._chance = random.Random(seed)
        self._pause_s = pause_s
        self._number = 0
        self._hows: list[str] = []  # what is to go wrong with the next transfers
        self._ending = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            asyncio.run(self._send())
        except BaseException as error:
            self._error = error

    async def _send(self) -> None:
        while not self._ending.is_set():
            try:
                link = await connect(self._made.folder.log_path, "log")
            except StreamdError:
                await asyncio.sleep(0.02)
                continue
            try:
                while not self._ending.is_set():
                    batch = self.batch()
                    answer = await link.request(Append(batch), 30.0)
                    assert isinstance(answer, Appended)
                    self.acked |= {number_of(record) for record in batch}
                    self.batches += 1
                    await asyncio.sleep(self._pause_s)
            except StreamdError:
                continue
            finally:
                link.close()

    def spoil(self, how: str) -> None:
        """Let one of the next transfers go wrong in this way."""
        self._hows.append(how)

    def batch(self) -> list[OutRecord]:
        """Some records of each kind; each has a number of its own."""
        chance, records = self._chance, []
        for _ in range(6):
            post = " ".join(chance.choices(WORDS, k=6))
            records.append(self._record("posts", json.dumps(post)))
        for _ in range(6):
            partition = chance.randrange(2)
            source, target = (f"{partition}-{n}" for n in chance.sample(range(8), 2))
            how = chance.choices(["", "once", "always"], [400, 3, 1])[0]
            if not how and self._hows:
                how = self._hows.pop()
            value = {
                "number": self._number, "source": source, "target": target,
                "amount": chance.randrange(1, 60), "how": how,
            }  # fmt: skip
            records.append(self._record("transfers", json.dumps(value), partition))
        for _ in range(4):
            key = f"d{chance.randrange(20)}"
            record = self._record("deposits", str(chance.randrange(9)))
            record.key = key.encode()
            records.append(record)
        return records

    def _record(self, topic: str, value: str, partition: int = -1) -> OutRecord:
        self._number += 1
        headers = [("number", b"%d" % (self._number - 1))]
        topic = self._made.prefix + topic
        return OutRecord(topic, None, value.encode(), partition, headers=headers)


def number_of(record: OutRecord) -> tuple[str, int]:
    """Topic, without the prefix, and number of a record that `Load` made."""
    return record.topic.rpartition("-")[2], int(dict(record.headers)["number"])


def complaints(made: Tree) -> list[str]:
    """Lines of the log that tell of what nobody here did."""
    lines = made.logfile.read_text(errors="replace").splitlines()
    found = [line for line in lines if "is FATAL" in line or " hangs:" in line]
    found = [line for line in found if "it was stopped by a signal" not in line]
    for index, line in enumerate(lines):
        if "Traceback (most recent call last)" in line:
            ends = (each for each in lines[index + 1 :] if not each.startswith("      "))
            if "Planned" not in (end := next(ends, "")):
                found.append(f"{lines[index - 1]} … {end}")
    return found


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Signal a process; False when it was gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
