"""`start` on a real machine: many at once, what a crash left, a daemon, process 1."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from supervisor_tree import IDLE, ROOT, eventually

from streamd.cli.target import Holder
from streamd.instance import Folder, Identity, boot_id
from streamd.link import connect
from streamd.wire import Command, Document

# Twenty processes that are ready to start the same instance, and do so at once.
TOGETHER = """
import os, sys, time
import streamd.cli, streamd.cli.launch
go = time.monotonic() + 0.3
pids = {}
for number in range(STARTS):
    pid = os.fork()
    if pid == 0:
        out = os.open(f"out-{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1); os.dup2(out, 2)
        sys.argv = ["streamd", *sys.argv[1:]]
        time.sleep(max(0, go - time.monotonic()))
        try:
            streamd.cli.main()
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code or 0)
        os._exit(99)
    pids[pid] = number
codes = {}
while pids:
    pid, status = os.wait()
    codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
print(*[codes[number] for number in range(STARTS)])
"""

STARTS = 20
ROUNDS = 5


class Place:
    """A folder with an app, and the environment of its command line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "STREAMD_RUNTIME_DIR": str(path / "run"),
        }  # fmt: skip
        (path / "proj.py").write_text(IDLE)

    def streamd(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return self.run([sys.executable, "-m", "streamd", *words])

    def spawn(self, *words: str, within: Sequence[str] = ()) -> "subprocess.Popen[str]":
        """A command that goes on; what it writes comes together."""
        return subprocess.Popen(
            [*within, sys.executable, "-m", "streamd", *words],
            cwd=self.path, env=self.environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, command: list[str]) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command, cwd=self.path, env=self.environment, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip


@contextlib.contextmanager
def a_place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="sv", dir="/tmp") as folder:
        place = Place(Path(folder))
        try:
            yield place
        finally:
            place.streamd("kill", "--tree", "--name", "proj")


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["start", "-A", "proj", "--without-web"], 0),
        (["start", "-A", "proj", "--without-web", "--foreground"], 75),
        (["worker", "-A", "proj", "--without-web"], 75),
    ],
    ids=["start", "in the foreground", "worker"],
)
def test_of_twenty_starts_at_once_exactly_one_runs(words: list[str], refused: int) -> None:
    script = TOGETHER.replace("STARTS", str(STARTS))
    with a_place() as place:
        folder = Folder(place.path / "run" / "proj")
        for _ in range(1 if refused else ROUNDS):
            with subprocess.Popen(
                [sys.executable, "-c", script, *words],
                cwd=place.path, env=place.environment, stdout=subprocess.PIPE, text=True,
            ) as together:  # fmt: skip
                eventually(lambda: is_running(place, folder), 30)
                if refused:
                    # All others have given up; who runs goes on until he is told.
                    eventually(lambda: others_told(place) == STARTS - 1, 30)
                    assert place.streamd("stop", "--name", "proj").returncode == 0
                codes = together.communicate(timeout=60)[0].split()
            assert sorted(codes) == sorted(["0"] + [str(refused)] * (STARTS - 1))
            record = folder.read_record()
            assert record is not None
            if not refused:
                winners = [number for number in range(STARTS) if "eady" in out(place, number)
                           and "lready" not in out(place, number)]  # fmt: skip
                assert len(winners) == 1
                told = [out(place, n) for n in range(STARTS) if n not in winners]
                assert all("Already" in text and "pid" in text for text in told)
                assert place.streamd("stop", "--name", "proj").returncode == 0


def is_running(place: Place, folder: Folder) -> bool:
    record = folder.read_record()
    if record is None or not folder.control_path.exists():
        return False
    done = place.streamd("--json", "status", "--name", "proj")
    return done.returncode == 0 and json.loads(done.stdout)["state"] == "running"


def others_told(place: Place) -> int:
    return sum("runs already (pid" in out(place, number) for number in range(STARTS))


def out(place: Place, number: int) -> str:
    path = place.path / f"out-{number}"
    return path.read_text() if path.exists() else ""


def listening(path: Path) -> None:
    """Leave the file of a socket that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\0\xff not json",
        b'{"name": "proj"}',
        json.dumps(
            {
                "name": "proj", "app": "proj", "app_id": "proj", "mode": "start",
                "tree": "0" * 32,
                "guardian": {"pid": 1, "start_ticks": 1, "boot_id": "of another boot"},
                "master": {"pid": 1, "start_ticks": 1, "boot_id": "of another boot"},
                "datadir": "/nowhere", "web": "", "started_at": 0.0, "version": "0",
            }
        ).encode(),
    ],
    ids=["empty", "garbage", "half", "of another boot"],
)  # fmt: skip
def test_what_a_power_cut_left_does_not_keep_a_start_from_running(record: bytes) -> None:
    with a_place() as place:
        folder = Folder(place.path / "run" / "proj")
        folder.make()
        folder.record_path.write_bytes(record)
        folder.lock_path.write_bytes(b"4711 garbage\n" + record)
        for name in ("control.sock", "log.sock", "app#0.sock", "control.sock.new"):
            listening(folder.path / name)
        data = place.path / "app-data"
        data.mkdir()
        (data / "lock").write_text(f"{os.getpid()} proj\n")
        (data / "registry.db").write_bytes(b"no database")

        done = place.streamd("start", "-A", "proj", "--without-web", "--datadir", str(data))

        assert done.returncode == 0, done.stdout + done.stderr
        assert place.streamd("stop", "--name", "proj").returncode == 0


def test_the_pages_know_that_all_is_ready_once_start_says_so() -> None:
    with a_place() as place:
        started = place.streamd("start", "-A", "proj", "-p", "0")
        record = Folder(place.path / "run" / "proj").read_record()
        assert started.returncode == 0 and record is not None
        with urllib.request.urlopen(f"{record.web}/streamd/stats/", timeout=10) as reply:
            assert json.load(reply)["state"] == "running"


def test_pids_that_are_a_stranger_s_by_now_do_not_keep_a_start_from_running() -> None:
    # This very process has the pids that the last tree had.
    stranger = Identity(os.getpid(), 1, boot_id())
    with a_place() as place:
        folder = Folder(place.path / "run" / "proj")
        folder.make()
        folder.record_path.write_text(
            json.dumps(
                {
                    "name": "proj", "app": "proj", "app_id": "proj", "mode": "start",
                    "tree": "0" * 32, "guardian": msgspec.to_builtins(stranger),
                    "master": msgspec.to_builtins(stranger), "datadir": "/nowhere",
                    "web": "", "started_at": 0.0, "version": "0",
                }
            )
        )  # fmt: skip
        holder = Holder("0" * 32, stranger, "proj", "start", 0.0)
        folder.lock_path.write_bytes(msgspec.json.encode(holder))

        done = place.streamd("start", "-A", "proj", "--without-web")

        assert done.returncode == 0, done.stdout + done.stderr
        assert place.streamd("stop", "--name", "proj").returncode == 0


def test_a_lock_file_that_is_deleted_lets_nobody_in_and_is_made_anew() -> None:
    with a_place() as place:
        folder = Folder(place.path / "run" / "proj")
        assert place.streamd("start", "-A", "proj", "--without-web").returncode == 0
        record = folder.read_record()
        assert record is not None
        folder.lock_path.unlink()

        again = place.streamd("start", "-A", "proj", "--without-web")
        worker = place.streamd("worker", "-A", "proj", "--without-web")

        assert again.returncode == 0 and f"(pid {record.master.pid})" in again.stdout
        assert worker.returncode == 75
        eventually(lambda: folder.lock_path.exists() and is_held(folder), 10)
        log = (place.path / "proj-data" / "streamd.log").read_text()
        assert f"{folder.lock_path} was deleted, and made anew" in log
        assert is_running(place, folder)
        assert place.streamd("stop", "--name", "proj").returncode == 0
        assert not record.master.is_alive()


def is_held(folder: Folder) -> bool:
    lock = folder.try_lock()
    if lock is None:
        return True
    os.close(lock)
    return False


LINGERS = (
    IDLE
    + """
import asyncio

@app.task
async def linger():
    try:
        await asyncio.sleep(600)
    finally:
        await asyncio.sleep(600)
"""
)


@pytest.mark.parametrize("mode", ["start", "worker"])
def test_a_start_while_it_stops_waits_for_the_end_and_says_so(mode: str) -> None:
    with a_place() as place:
        folder = Folder(place.path / "run" / "proj")
        (place.path / "proj.py").write_text(LINGERS)
        assert (
            place.streamd("start", "-A", "proj", "--without-web", "--grace", "2s").returncode
            == 0
        )
        before = folder.read_record()
        assert before is not None
        stop = place.spawn("stop", "--name", "proj")
        eventually(lambda: (record := folder.read_record()) and record.stopping, 10)
        (place.path / "proj.py").write_text(IDLE)

        again = place.streamd("stop", "--name", "proj") if mode == "start" else None
        with place.spawn(mode, "-A", "proj", "--without-web") as start:
            eventually(lambda: has_begun(folder, before.tree) and is_running(place, folder), 30)
            assert place.streamd("stop", "--name", "proj").returncode == 0
            said = start.communicate(timeout=30)[0]

        assert start.returncode == 0, said
        assert "Already" not in said
        if again is None:
            assert f"proj (pid {before.guardian.pid}) is stopping; waits for its end" in said
        else:
            assert "proj is stopping already" in again.stderr
        assert stop.wait(30) == 0
        stop.communicate()


def has_begun(folder: Folder, before: str) -> bool:
    """True once another tree than `before` has written its record."""
    record = folder.read_record()
    return record is not None and record.tree != before


def test_json_is_one_document_however_the_start_goes() -> None:
    with a_place() as place:
        words = ["--json", "start", "-A", "proj", "--without-web"]

        first, again = (json.loads(place.streamd(*words).stdout) for _ in range(2))
        assert place.streamd("stop", "--name", "proj").returncode == 0
        unwaited = json.loads(place.streamd(*words, "--no-wait").stdout)

        assert (first["ready"], again["ready"], unwaited["ready"]) == (True, True, False)
        assert again["already"] and again["pid"] == first["pid"] != unwaited["pid"]
        assert {each["schema"] for each in (first, again, unwaited)} == {"streamd.start/1"}


def test_a_daemon_holds_nothing_of_who_started_it() -> None:
    with a_place() as place, (place.path / "held").open("w") as held:
        os.set_inheritable(held.fileno(), True)
        words = ["start", "-A", "proj", "--without-web"]
        done = subprocess.run(
            [sys.executable, "-m", "streamd", *words], cwd=place.path, env=place.environment,
            capture_output=True, text=True, timeout=60, pass_fds=[held.fileno()],
        )  # fmt: skip

        assert done.returncode == 0, done.stderr
        assert "Running." in done.stdout
        record = Folder(place.path / "run" / "proj").read_record()
        assert record is not None
        for who in (record.guardian.pid, record.master.pid):
            files = [os.readlink(entry) for entry in Path(f"/proc/{who}/fd").iterdir()]
            assert str(place.path / "held") not in files
            assert not [each for each in files if "pts" in each or "tty" in each]
            assert os.getsid(who) != os.getsid(0)
            assert Path(f"/proc/{who}/cwd").resolve() == place.path.resolve()
        assert os.readlink(f"/proc/{record.guardian.pid}/fd/0") == os.devnull
        assert place.streamd("stop", "--name", "proj").returncode == 0


def test_a_start_that_fails_shows_the_last_lines_of_its_log() -> None:
    with a_place() as place:
        place.environment |= {"STREAMD_TEST": "1", "STREAMD_FAILPOINT": "master.claimed:1:kill"}

        done = place.streamd("start", "-A", "proj", "--without-web")

        assert done.returncode == 70
        assert "proj ended before it was ready" in done.stderr
        assert "group app: 1 process" in done.stderr
        assert "was ended by SIGKILL; its tree was ended too" in done.stderr


def have_pid_namespaces() -> bool:
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return False
    command = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.skipif(not have_pid_namespaces(), reason="needs pid namespaces")
def test_as_process_1_of_a_container_it_stays_in_front_reaps_and_stops_by_term() -> None:
    with a_place() as place:
        folder = Folder(place.path / "run" / "proj")
        inside = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        with place.spawn("start", "-A", "proj", "--without-web", within=inside) as container:
            try:
                rows = eventually(lambda: processes_in(folder), 30)
                assert {row["name"]: row["pid"] for row in rows}["guardian"] == 1
                [first] = children_of(container.pid)
                # What somebody who looks into the container leaves behind comes to process 1.
                subprocess.run(
                    ["nsenter", f"--target={first}", "--pid", "--mount",
                     "sh", "-c", "sleep 0.3 & sleep 0.3 & exit"],
                    timeout=30, check=True,
                )  # fmt: skip
                assert len(children_of(first)) == 3
                eventually(lambda: len(children_of(first)) == 1, 10)
                os.kill(first, signal.SIGTERM)

                said = container.communicate(timeout=30)[0]
            finally:
                container.kill()

        assert container.returncode == 0, said
        assert "proj stopped warm" in said


def children_of(pid: int) -> list[int]:
    """The children of a process, those that are not reaped too."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(each) for each in text.split()]


def processes_in(folder: Folder) -> list[dict[str, Any]] | None:
    """The rows of an instance whose pids mean nothing here; None: it is not ready."""

    async def ask() -> Any:
        link = await connect(folder.control_path, "proj")
        try:
            answer = await link.request(Command("status", {}), 5.0)
        finally:
            link.close()
        assert isinstance(answer, Document)
        return answer.data

    if not folder.control_path.exists():
        return None
    status = asyncio.run(ask())
    return list(status["processes"]) if status["state"] == "running" else None


def test_who_kills_what_systemd_runs_is_told_that_it_comes_back() -> None:
    with a_place() as place:
        folder = Folder(place.path / "run" / "proj")
        assert place.streamd("start", "-A", "proj", "--without-web").returncode == 0
        record = folder.read_record()
        assert record is not None
        folder.write_record(msgspec.structs.replace(record, unit="streamd-proj.service"))

        killed = place.streamd("kill", "--name", "proj")

        assert killed.returncode == 0
        assert "systemctl stop streamd-proj.service" in killed.stderr
