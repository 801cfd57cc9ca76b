"""A stop at any moment: nothing is lost, nothing is started any more, nothing is left."""

import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from supervisor_load import COUNT, Feed, wait_counted
from supervisor_tree import ROOT, Tree, allowed_s, eventually, tree_of

from streamd.supervisor import tree

# Works on each job once: what was begun and not finished is begun again by the next start.
JOBS = """
import asyncio, pathlib
import streamd
app = streamd.App("proj")
jobs = app.topic("jobs", value_type=str)

@app.agent(jobs)
async def work(stream):
    async for job in stream:
        print("begins", job)
        await asyncio.sleep(float(job))
        print("finished", job)

@app.task
async def feed():
    first = pathlib.Path("fed-once")
    await jobs.send(key="same", value="0" if first.exists() else "SECONDS")
    first.touch()
"""

# Shows each order to stop that reaches an agent process.
TELLS_OF_TERM = """
import asyncio
import streamd
import streamd.agentproc.process as process
app = streamd.App("proj")
before = process.Process._stop_warm

def stop_warm(self):
    print("heard TERM")
    before(self)

process.Process._stop_warm = stop_warm

@app.task
async def busy():
    await asyncio.shield(asyncio.sleep(0.5))
"""

HEARS_INT = """
import asyncio, signal
import streamd
app = streamd.App("proj")

@app.task
async def listen():
    signal.signal(signal.SIGINT, lambda number, frame: print("heard INT"))
    print("listens")
    await asyncio.sleep(600)
"""

HOLDS_THE_GIL = """
import asyncio, re
import streamd
app = streamd.App("proj")

@app.task
async def stick():
    await asyncio.sleep(0.3)
    print("stuck now")
    re.match(r"(a+)+$", "a" * 60 + "b")
"""

CRASHES = """
import os
import streamd
app = streamd.App("proj")

@app.task
async def crash():
    os._exit(5)
"""

SLOW_FORK = """
import os, time
import streamd
app = streamd.App("proj")

def late():
    print("forked", flush=True)
    time.sleep(0.4)

os.register_at_fork(after_in_child=late)
"""


def test_a_warm_stop_finishes_the_task_that_runs_and_commits_it() -> None:
    with tree_of(JOBS.replace("SECONDS", "2")) as house:
        house.run()
        eventually(lambda: "begins 2" in house.log)
        began = time.monotonic()

        house.signal(signal.SIGTERM)

        assert house.wait_exit() == 0
        assert time.monotonic() - began < allowed_s(2.5)
        assert "finished 2" in house.log
        house.run()
        eventually(lambda: "finished 0" in house.log)
        assert house.log.count("begins 2") == 1


def test_what_the_end_of_grace_cut_off_is_done_once_more_by_the_next_start() -> None:
    with tree_of(JOBS.replace("SECONDS", "600")) as house:
        house.run(option_grace="500ms")
        eventually(lambda: "begins 600" in house.log)
        began = time.monotonic()

        house.signal(signal.SIGTERM)

        assert house.wait_exit() == 3
        assert time.monotonic() - began < 0.5 + allowed_s(1.5)
        house.run(option_grace="500ms")
        eventually(lambda: house.log.count("begins 600") == 2)
        house.signal(signal.SIGTERM)
        assert house.wait_exit() == 3
        assert house.log.count("begins 600") == 2


def test_fifty_terms_at_once_are_one() -> None:
    with tree_of(TELLS_OF_TERM) as house:
        house.run()

        for _ in range(50):
            house.signal(signal.SIGTERM)

        assert house.wait_exit() == 0
        assert house.log.count("heard TERM") == 1


def test_ctrl_c_in_a_terminal_stops_warm_and_no_process_hears_it() -> None:
    with tree_of(HEARS_INT) as house:
        controller, terminal = pty.openpty()
        house.run(terminal=os.ttyname(terminal))
        eventually(lambda: "listens" in house.log)

        os.write(controller, b"\x03")

        assert house.wait_exit() == 0
        assert "proj stopped warm" in house.log
        assert "heard INT" not in house.log
        os.close(controller)
        os.close(terminal)


def test_a_process_stuck_in_c_is_killed_when_the_grace_is_over() -> None:
    with tree_of(HOLDS_THE_GIL) as house:
        house.run(option_grace="500ms")
        eventually(lambda: "stuck now" in house.log)
        began = time.monotonic()

        house.signal(signal.SIGTERM)

        assert house.wait_exit() == 3
        assert time.monotonic() - began < 0.5 + allowed_s(1.5)
        assert "killed, since they did not end: app#0" in house.log


def test_what_is_killed_while_it_drains_is_not_started_again() -> None:
    with tree_of(JOBS.replace("SECONDS", "600")) as house:
        pid = house.run().pid("work#0")
        eventually(lambda: "begins 600" in house.log)
        house.signal(signal.SIGTERM)
        eventually(lambda: "stopping: what runs is finished first" in house.log)

        os.kill(pid, signal.SIGKILL)

        assert house.wait_exit() == 0
        assert len(re.findall(r"work#0 \(pid \d+\) is RUNNING", house.log)) == 1


@pytest.mark.parametrize(
    ("source", "state"),
    [(CRASHES, "BACKOFF"), (SLOW_FORK, "STARTING")],
    ids=["waits", "starts"],
)
def test_what_waits_or_starts_is_stopped_at_once_and_not_started_again(
    source: str, state: str
) -> None:
    with tree_of(source) as house:
        house.start()
        eventually(lambda: house.folder.control_path.exists())
        eventually(lambda: is_in(house, state), 20)
        began = time.monotonic()

        house.signal(signal.SIGTERM)

        assert house.wait_exit() == 0
        assert time.monotonic() - began < allowed_s(1.0)
        house.wait_nothing_left(1.0)
        # The guardian waits for every child, and its end is the end of the tree.
        assert house.log.splitlines()[-1].endswith("proj stopped warm")


def is_in(house: Tree, state: str) -> bool:
    rows = house.ask("status")["processes"]
    return any(row["name"] == "app#0" and row["state"] == state for row in rows)


def test_term_between_a_fork_and_its_handlers_is_not_lost() -> None:
    with tree_of(SLOW_FORK) as house:
        house.start()
        eventually(lambda: "forked" in house.log)

        house.signal(signal.SIGTERM)

        assert house.wait_exit() == 0
        house.wait_nothing_left(1.0)
        assert "killed, since" not in house.log


def test_sources_end_before_sinks_and_no_event_is_lost_or_done_twice() -> None:
    with tree_of(COUNT) as house:
        house.run()
        with Feed(house) as feed:
            eventually(lambda: feed.sent.total() > 500, 20)
            told = len(house.log)

        house.signal(signal.SIGTERM)

        assert house.wait_exit() == 0
        ended = re.findall(r"(\S+) \(pid \d+\) exited with 0", house.log[told:])
        groups = [name.partition("#")[0] for name in ended]
        assert list(dict.fromkeys(groups)) == ["app", "split", "count", "zygote", "log"]
        house.run()
        wait_counted(house, feed.sent)


# Half of the points lie before the processes run.
LAST_S = 0.8
TERMS = 50


@pytest.mark.parametrize("seed", range(TERMS))
def test_term_at_a_random_moment_from_the_very_start_ends_it_warm(seed: int) -> None:
    term_at_random(random.Random(seed))


@pytest.mark.parametrize("seed", range(TERMS // 5))
def test_quit_and_int_at_random_moments_leave_nothing_either(seed: int) -> None:
    quit_or_int_at_random(random.Random(seed))


def term_at_random(chance: random.Random) -> None:
    """Start, stop by TERM at a random moment, and see that it ends warm."""
    assert end_at_random(chance, [signal.SIGTERM]) == 0


def quit_or_int_at_random(chance: random.Random) -> None:
    """Start, stop by three signals at random moments, and see that it ends warm or cold."""
    numbers = chance.choices([signal.SIGQUIT, signal.SIGINT, signal.SIGTERM], k=3)
    assert end_at_random(chance, numbers) in (0, 3)


@pytest.mark.parametrize("seed", range(TERMS // 5))
def test_the_command_obeys_term_from_its_first_moment_on(seed: int) -> None:
    command_at_random(random.Random(seed))


def command_at_random(chance: random.Random) -> None:
    """Run `streamd worker`, end it by TERM at a random moment, and see that all ends well."""
    with tree_of(COUNT) as house:
        command = worker(house)
        # The moment itself is what is tested.
        time.sleep(1.5 * LAST_S * chance.random())
        command.terminate()

        said, _ = command.communicate(timeout=20)

        # Before there is a guardian nothing has begun: it ends like any command.
        assert command.returncode in (0, -signal.SIGTERM), said
        assert house.survivors_of_record() == []
        assert tree.is_free(house.folder.lock_path)
        assert "Traceback" not in said


def test_term_to_a_guardian_that_is_only_starting_is_obeyed() -> None:
    with tree_of(COUNT) as house:
        command = worker(house)
        cmdline = Path(f"/proc/{command.pid}/cmdline")
        deadline = time.monotonic() + 20
        # Without a pause: its Python takes some milliseconds until it has handlers.
        while b"guardian.py" not in cmdline.read_bytes():
            assert time.monotonic() < deadline

        command.terminate()

        said, _ = command.communicate(timeout=20)
        assert command.returncode == 0, said
        assert "proj stopped warm" in said


def worker(house: Tree) -> "subprocess.Popen[str]":
    """Run `streamd worker` on the app of `house`."""
    return subprocess.Popen(
        [sys.executable, "-m", "streamd", "-A", "proj", "worker", "-p", "0"],
        cwd=house.place,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "STREAMD_RUNTIME_DIR": str(house.folder.path.parent),
            "STREAMD_DATADIR": str(house.place / "data"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end_at_random(chance: random.Random, numbers: list[signal.Signals]) -> int:
    """Start, send the signals at random moments, see that nothing is left; the exit code."""
    after_s = sorted(LAST_S * chance.random() ** 2 for _ in numbers)
    with tree_of(chance.choice([COUNT, CRASHES, SLOW_FORK])) as house:
        house.start(option_web_enabled=chance.choice(["true", "false"]))
        began = time.monotonic()
        for at_s, number in zip(after_s, numbers, strict=True):
            # The moment itself is what is tested.
            time.sleep(max(0.0, began + at_s - time.monotonic()))
            house.signal(number)

        code = house.wait_exit(20)

        house.wait_nothing_left(1.0)
        assert "Traceback" not in house.log, house.log
        assert (house.place / "guardian.txt").read_text() == ""
        return code
