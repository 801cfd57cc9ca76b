"""Owners, registry, claims, pages, stacks and the guardian's own memory."""

import asyncio
import os
import socket
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import streamd
from streamd.errors import Busy, ConfigError
from streamd.instance import identify
from streamd.supervisor import claims, stacks
from streamd.supervisor.child import Child, Run
from streamd.supervisor.logfile import LogFile
from streamd.supervisor.logpipe import LogPipe
from streamd.supervisor.logs import Logs
from streamd.supervisor.owners import OwnerMap
from streamd.supervisor.pages import BeatPage, DumpFile
from streamd.supervisor.registry import Registry
from streamd.wire import Owns

DUMP = f"""Thread 0x00007f01 (most recent call first):
  File "{os.__file__}", line 10 in poll
  File "{os.path.dirname(streamd.__file__)}/agentproc/poller.py", line 5 in run

Current thread 0x00007f02 (most recent call first):
  File "{os.__file__}", line 12 in sleep
  File "/home/ann/proj/app.py", line 33 in slow
  File "/home/ann/proj/app.py", line 40 in count
  File "{os.path.dirname(streamd.__file__)}/agentproc/engine.py", line 99 in turn
Task 'x' (outermost call first):
  File "/home/ann/proj/app.py", line 1, in other
"""


def test_the_guilty_function_is_the_users_innermost_in_the_main_thread() -> None:
    assert stacks.guilty(DUMP) == "slow (/home/ann/proj/app.py:33)"


def test_without_a_frame_of_the_user_the_innermost_is_named() -> None:
    dump = "\n".join(line for line in DUMP.splitlines() if "/home/ann" not in line)

    assert stacks.guilty(dump) == f"sleep ({os.__file__}:12)"
    assert stacks.guilty("") is None


def test_owners_grow_a_generation_with_each_change_and_no_other() -> None:
    owners = OwnerMap()

    assert owners.set("count#0", "/run/0", 0, 2, Owns("count", 1, [2, 0], []))
    assert not owners.set("count#0", "/run/0", 0, 2, Owns("count", 2, [0, 2], []))
    assert owners.set("count#0", "/run/0", 0, 2, Owns("count", 3, [0], [2]))

    assert owners.generation == 2
    assert owners.partitions("count#0") == [0, 2]
    assert owners.drop("count#0") and not owners.drop("count#0")
    assert owners.frame().owners == [] and owners.generation == 3


def test_the_registry_remembers_over_a_restart(tmp_path: Path) -> None:
    first = Registry()
    first.note("INFO", "start", "before it had a file")
    first.open(tmp_path / "registry.db")
    first.started("count#0", identify(os.getpid()), 3)
    first.ended("count#0", "exited with 5")
    first.note("ERROR", "stop", "after it")
    first.close(5.0)

    second = Registry()
    second.open(tmp_path / "registry.db")

    assert [event["text"] for event in second.events] == ["before it had a file", "after it"]
    assert second.last_exits == {"count#0": "exited with 5"}
    second.close(5.0)


def test_history_has_an_end(tmp_path: Path) -> None:
    for number in range(1500):
        if number % 500 == 0:
            registry = Registry()
            registry.open(tmp_path / "registry.db")
        registry.note("INFO", "start", str(number))
        if number % 500 == 499:
            registry.close(5.0)

    again = Registry()
    again.open(tmp_path / "registry.db")

    assert [event["text"] for event in again.events] == [str(each) for each in range(500, 1500)]
    again.close(5.0)


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000])
def test_a_damaged_registry_costs_history_only(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "registry.db"
    path.write_bytes(content)

    registry = Registry()
    registry.open(path)
    registry.note("INFO", "start", "goes on")
    registry.commit()
    registry.close(1.0)

    assert [event["text"] for event in registry.events] == ["goes on"]
    assert path.with_suffix(".damaged").exists() == bool(content)


def test_a_registry_that_is_locked_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("CREATE TABLE registry (key TEXT PRIMARY KEY, value BLOB)")
    other.execute("BEGIN EXCLUSIVE")

    registry = Registry()
    registry.open(path)
    registry.note("INFO", "start", "goes on")

    assert len(registry.events) == 1
    registry.close(1.0)
    other.close()


def test_a_data_directory_has_one_master(tmp_path: Path) -> None:
    lock = claims.claim_datadir(tmp_path / "data", "first")

    with pytest.raises(Busy, match=rf"in use by first \(pid {os.getpid()}\)") as refused:
        claims.claim_datadir(tmp_path / "data", "second")

    assert refused.value.exit_code == 75
    assert any("scale" in line for line in refused.value.seen)
    os.close(lock)
    os.close(claims.claim_datadir(tmp_path / "data", "second"))


def test_a_port_has_one_listener_and_0_finds_a_free_one() -> None:
    with claims.claim_port("127.0.0.1", 0) as one:
        port = one.getsockname()[1]
        assert claims.url_of(one) == f"http://127.0.0.1:{port}"

        with pytest.raises(Busy, match=f"port {port} on 127.0.0.1 is taken") as refused:
            claims.claim_port("127.0.0.1", port)

        assert "-p 0" in str(refused.value.remedy)


def test_addresses_that_are_none_and_unix_sockets(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        claims.claim_port("198.51.100.7", 0)
    with pytest.raises(ConfigError):
        claims.claim_port("no such host", 0)
    with claims.claim_port(f"unix:{tmp_path}/web", 0) as listener:
        assert listener.family == socket.AF_UNIX
        assert claims.url_of(listener) == f"unix:{tmp_path}/web"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{tmp_path}/web")


def test_a_page_is_read_as_it_is_written() -> None:
    page = BeatPage()
    text = b'{"agent":"count","topic":"words","partition":3,"position":7}'
    os.pwrite(page.fd, struct.pack("=dqqdqd", 1.5, 100, 2, 1.0, 2, 0.5), 0)
    os.pwrite(page.fd, struct.pack("=q", len(text)) + text, 1016)

    assert (page.beat, page.settled, page.in_work, page.stage.name) == (1.5, 100, 2, "RUNNING")
    assert page.place == ("count", "words", 3, 7)
    page.close()


@pytest.mark.parametrize(
    "content", [b"\0" * 8, b"\xff" * 4096, struct.pack("=q", 20) + b"{" * 20]
)
def test_a_page_that_makes_no_sense_names_no_place(content: bytes) -> None:
    page = BeatPage()
    os.pwrite(page.fd, content, 1016 if len(content) < 4096 else 0)

    assert page.place is None
    assert page.stage is not None
    page.close()


def test_a_dump_is_whole_when_the_tasks_are_there() -> None:
    dump = DumpFile()
    os.write(dump.fd, b"Thread 1\n")
    assert not dump.is_whole()
    os.write(dump.fd, b"-- end of tasks --\n")
    assert dump.is_whole()

    dump.clear()
    os.write(dump.fd, b"again")

    assert dump.read() == b"again"
    dump.close()


def test_a_process_that_ends_while_stacks_are_collected_is_told_so(tmp_path: Path) -> None:
    async def collect(process: "subprocess.Popen[bytes]") -> str:
        logs = Logs(LogFile(str(tmp_path / "log")), style="text", level="info")
        child = Child("count#0", "agent", "count")
        run = Run(
            process.pid, os.pidfd_open(process.pid), identify(process.pid),
            LogPipe("count#0", logs), page=BeatPage(), dump=DumpFile(),
        )  # fmt: skip
        child.run = run
        asking = asyncio.create_task(stacks.collect([child], 0.5))
        await asyncio.sleep(0)
        # As its end is dealt with, and what it had is another's by now.
        child.run = None
        run.close()
        os.close(run.pidfd)
        others = [os.pipe() for _ in range(8)]
        try:
            return (await asking)["count#0"]
        finally:
            for fd in (fd for pair in others for fd in pair):
                os.close(fd)

    takes = "import signal; signal.signal(signal.SIGUSR1, print); print(flush=True)"
    command = [sys.executable, "-c", f"{takes}; signal.pause(); signal.pause()"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()

            text = asyncio.run(collect(process))
        finally:
            process.kill()

    assert text == f"== count#0 (pid {process.pid})\n(it ended meanwhile)\n"


def test_the_guardian_is_small() -> None:
    folder = Path(streamd.__file__).parent / "supervisor"
    script = (
        f"import sys; sys.path.append({str(folder)!r}); import guardian; "
        "print([line for line in open('/proc/self/status') if line.startswith('VmRSS')][0])"
    )

    out = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True
    )

    assert int(out.stdout.split()[1]) < 16_000
