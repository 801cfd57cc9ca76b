"""Agents that say much: none is stopped, no line is mangled, what is missing is told."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from supervisor_flood import account, flood, log_files, order, source, took_s
from supervisor_tree import Tree, eventually, tree_of

from streamd.link import connect
from streamd.wire import Append, Command, OutRecord

LINES = 2_000  # of 300 bytes: fit a pipe

both_ways = pytest.mark.parametrize("prints", [False, True], ids=["records", "prints"])


def test_ten_agents_lose_and_mangle_nothing_while_files_are_exchanged() -> None:
    done = flood(10, LINES, pause_s=0.02, max_size_bytes=1_000_000)

    assert not done.problems, str(done)
    assert set(done.account.arrived.values()) == {LINES}
    assert not done.account.dropped
    assert 900_000 < done.largest_file_bytes <= 1_000_000


@both_ways
def test_of_a_flood_every_line_arrives_or_is_told_as_dropped(prints: bool) -> None:
    done = flood(3, 20_000, prints=prints)

    assert not done.problems, str(done)
    assert len(done.account.arrived) == 3


@both_ways
def test_an_agent_that_is_killed_right_after_its_last_line_loses_none(prints: bool) -> None:
    with tree_of(source(1)) as house:
        house.run()

        order(house, ["a0"], LINES, prints=prints, kill=True)
        # The third death parks the event.
        eventually(lambda: took_s(house, "a0") and house.process("a0#0")["restarts"] >= 2, 60)

        os.kill(house.pid("master"), signal.SIGTERM)
        house.wait_exit(20)
        found = account(house)
        assert found.arrived["a0"] % LINES == 0 and found.arrived["a0"] >= 2 * LINES
        assert not found.dropped and not found.mangled


@both_ways
def test_agents_go_on_while_the_master_is_stopped(prints: bool) -> None:
    lines = 17_000  # 5 MB each
    with tree_of(source(2)) as house:
        master = house.run().pid("master")
        os.kill(master, signal.SIGSTOP)
        try:
            order(house, ["a0", "a1"], lines, prints=prints)
            for name in ("a0", "a1"):
                eventually(lambda name=name: took_s(house, name), 60)  # type: ignore[misc]
        finally:
            os.kill(master, signal.SIGCONT)

        eventually(lambda: account(house).of("a0") == account(house).of("a1") == lines, 30)
        found = account(house)
        assert found.dropped["a0"] > 0 and found.dropped["a1"] > 0
        assert not found.mangled
        assert house.process("a0#0")["restarts"] == 0


def test_clients_that_follow_and_do_not_read_cost_no_memory() -> None:
    with tree_of(source(2)) as house:
        master = psutil.Process(house.run().pid("master"))
        before_bytes = most_bytes = master.memory_info().rss

        async def stay() -> None:
            link = await connect(house.folder.control_path, "master")
            assert link._transport is not None
            link._transport.pause_reading()
            try:
                await anext(link.stream(Command("logs", {"follow": True})))
            finally:
                link.close()

        async def look() -> int:
            most_bytes = 0
            clients = [asyncio.create_task(stay()) for _ in range(3)]
            await asyncio.to_thread(order, house, ["a0", "a1"], 30_000)
            deadline = time.monotonic() + 60.0
            while not (took_s(house, "a0") and took_s(house, "a1")):
                assert time.monotonic() < deadline
                most_bytes = max(most_bytes, master.memory_info().rss)
                await asyncio.sleep(0.05)
            assert not any(client.done() for client in clients)
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            return most_bytes

        most_bytes = asyncio.run(look())
        assert most_bytes - before_bytes < 64 << 20


SPAWNS = """
import os, subprocess, sys
import streamd
app = streamd.App("proj")

CHILD = (
    "import os, sys, time\\n"
    "print('to stdout', flush=True)\\n"
    "print('to stderr kafka://ann:hunter22@host', file=sys.stderr, flush=True)\\n"
    "while os.getppid() == int(sys.argv[1]): time.sleep(0.01)\\n"
    "print('outlived it', flush=True)\\n"
)

@app.task
async def spawn():
    if not os.path.exists("spawned"):
        open("spawned", "w").close()
        subprocess.Popen([sys.executable, "-c", CHILD, str(os.getpid())])
"""


def test_what_an_agent_has_spawned_is_heard_also_after_its_death() -> None:
    with tree_of(SPAWNS) as house:
        house.run()
        eventually(lambda: "to stderr" in house.log, 20)

        os.kill(house.pid("app#0"), signal.SIGKILL)

        eventually(lambda: "app#0  outlived it" in house.log, 20)
        assert "app#0  to stdout" in house.log
        assert "app#0  to stderr kafka://ann:***@host" in house.log


def test_a_log_that_cannot_be_written_stops_nobody_and_is_told() -> None:
    with tree_of(source(1)) as house:
        house.run(logfile="/dev/full")

        order(house, ["a0"], 100)
        eventually(lambda: took_s(house, "a0"), 20)

        eventually(lambda: house.ask("status")["state"] == "degraded", 20)
        (problem,) = house.ask("status")["problems"]
        assert problem["text"] == "the log cannot be written: No space left on device"
        eventually(lambda: "No space left" in str(house.ask_all("events", since=0)))
        kept = house.ask_all("logs", names=["a0"], lines=1000)
        assert len([line for line in kept if line["text"].startswith("a0 ")]) == 100


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that takes a megabyte."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs root")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_tears_no_line_and_is_told_until_there_is_room(small_disk: Path) -> None:
    with tree_of(source(2)) as house:
        house.logfile = small_disk / "log"
        house.run(logfile=str(house.logfile))
        order(house, ["a0", "a1"], 2 * LINES, pause_s=0.02)
        for name in ("a0", "a1"):
            eventually(lambda name=name: took_s(house, name), 60)  # type: ignore[misc]
        eventually(lambda: house.ask("status")["problems"], 20)
        (problem,) = house.ask("status")["problems"]
        assert (
            "cannot be written: No space left on device; what runs goes on" in problem["text"]
        )
        arrived = account(house)

        # As logrotate does with copytruncate.
        os.truncate(house.logfile, 0)
        os.kill(house.pid("master"), signal.SIGUSR2)

        eventually(lambda: "log lines were lost here: No space left" in house.log, 20)
        eventually(lambda: not house.ask("status")["problems"], 20)
        eventually(lambda: "the log is written again" in str(house.ask_all("events")))
        assert not arrived.mangled
        assert 0 < arrived.arrived.total() < 4 * LINES


def test_a_file_that_logrotate_moves_under_load_loses_no_line() -> None:
    with tree_of(source(2)) as house:
        house.run()
        order(house, ["a0", "a1"], LINES, pause_s=0.05)

        for number in (3, 2, 1):
            begun = house.logfile.stat().st_size
            eventually(
                lambda begun=begun: house.logfile.stat().st_size > begun + 20_000,  # type: ignore[misc]
                20,
            )
            house.logfile.rename(f"{house.logfile}.{number}")
            os.kill(house.pid("master"), signal.SIGUSR2)
            eventually(house.logfile.exists, 20)

        eventually(lambda: account(house).arrived == {"a0": LINES, "a1": LINES}, 30)
        assert len(log_files(house)) == 4
        assert not account(house).mangled


SECRETS = """
import logging
import streamd
app = streamd.App("proj", web_token="t0ken-of-mine")
URL = "kafka://ann:hunter22@host:9092"

@app.agent(app.topic("go", value_type=int, partitions=1), on_error="stop")
async def go(stream):
    async for event in stream:
        print("printed", URL, "t0ken-of-mine")
        logging.warning("logged %s %s", URL, "t0ken-of-mine")
        raise RuntimeError(f"raised {URL} t0ken-of-mine sasl.password=hunter22")
"""


def everything(house: Tree) -> str:
    """All that people can see."""
    told = [house.log, (house.place / "guardian.txt").read_text()]
    for verb in ("status", "ps", "events", "stacks", "tree"):
        told.append(str(house.ask_all(verb)))
    told.append(str(house.ask_all("logs", lines=10_000)))
    pids = [row["pid"] for row in house.ask("ps") if row["pid"]]
    told += [" ".join(psutil.Process(pid).cmdline()) for pid in pids]
    return "\n".join(told)


def test_secrets_are_seen_nowhere() -> None:
    with tree_of(SECRETS) as house:
        house.run()

        asyncio.run(send_one(house))
        eventually(lambda: "FATAL" in house.log, 60)
        told = everything(house)
        house.signal(signal.SIGTERM)
        house.wait_exit(20)

        kept = b"".join(path.read_bytes() for path in (house.place / "data").glob("registry*"))
        for secret in ("hunter22", "t0ken-of-mine"):
            assert secret not in told
            assert secret.encode() not in kept
        for words in ("printed kafka", "logged kafka", "raised kafka"):
            assert f"{words}://ann:***@host:9092 ***" in told


async def send_one(house: Tree) -> None:
    """Append one event."""
    link = await connect(house.folder.log_path, "log")
    await link.request(Append([OutRecord("go", None, b"1")]), 10.0)
    link.close()
