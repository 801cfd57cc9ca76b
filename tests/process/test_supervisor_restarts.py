"""What becomes of a process that dies or hangs."""

import asyncio
import os
import re
import signal
import time
from typing import Any

import psutil
import pytest
from supervisor_tree import ROOT, Tree, allowed_s, eventually, tree_of

from streamd.link import connect
from streamd.wire import Command

ENDS = """
import os, signal, sys, asyncio
import streamd
app = streamd.App("proj")

@app.task
async def end():
    HOW
"""

CRASHES_UNTIL_HEALED = """
import os, pathlib
import streamd
app = streamd.App("proj")

@app.task
async def crash():
    if not pathlib.Path("healed").exists():
        os._exit(5)
"""

HANGS = """
import re, time, asyncio, pathlib
import streamd
app = streamd.App("proj")

def guilty_function():
    HOW

@app.task
async def hang():
    first = pathlib.Path("hung-once")
    if not first.exists():
        first.touch()
        await asyncio.sleep(0.6)
        guilty_function()
"""

POISON = """
import os
import streamd
app = streamd.App("proj")
words = app.topic("words", value_type=str)

@app.agent(words)
async def count(stream):
    async for word in stream:
        if word == "poison":
            os._exit(9)
        print("counted", word)

@app.task
async def feed():
    for word in ("one", "poison", "two"):
        await words.send(value=word, key="same")
"""


def test_a_killed_process_is_ready_again_within_the_limit_and_each_step_is_told_once() -> None:
    kill_again_and_again(15)


def kill_again_and_again(count: int) -> None:
    """Kill one process so many times, each time once it runs."""
    with tree_of() as house:
        before = house.run().pid("app#0")
        took_s = []
        for _ in range(count):
            began = time.monotonic()
            os.kill(before, signal.SIGKILL)
            before = house.wait_other("app#0", before)
            took_s.append(time.monotonic() - began)

        assert sorted(took_s)[count // 2] < allowed_s(0.02), took_s
        assert max(took_s) < allowed_s(0.1), took_s
        assert len(re.findall(r"app#0 \(pid \d+\) was ended by SIGKILL", house.log)) == count
        assert len(re.findall(r"app#0 \(pid \d+\) is RUNNING", house.log)) == count + 1


def test_a_killed_process_is_replaced_at_once_and_it_is_not_its_fault() -> None:
    with tree_of() as house:
        before = house.run().pid("app#0")
        for _ in range(7):
            os.kill(before, signal.SIGKILL)
            before = house.wait_other("app#0", before)

        row = eventually(lambda: running(house.process("app#0")))
        assert row["restarts"] == 7
        assert row["last_exit"] == "was ended by SIGKILL from outside"


def running(row: dict[str, object]) -> dict[str, object] | None:
    return row if row["state"] == "RUNNING" else None


def test_a_crash_loop_backs_off_and_is_given_up() -> None:
    with tree_of(ENDS.replace("HOW", "os._exit(5)")) as house:
        house.start()

        row = eventually(lambda: fatal(house), 30)

        assert row["restarts"] == 4
        assert row["last_exit"] == "exited with 5"
        status = house.ask("status")
        assert status["state"] == "degraded" or status["state"] == "starting"
        assert status["problems"][0]["process"] == "app#0"
        assert "5 crashes in" in house.log
        assert house.wait_ready()["ready"]
        assert cpu_share(house.pid("master")) < 0.01 * 5


def cpu_share(pid: int, over_s: float = 2.0) -> float:
    """How much of one processor a process takes."""
    began, before = time.monotonic(), cpu_s(pid)
    eventually(lambda: time.monotonic() > began + over_s)
    return (cpu_s(pid) - before) / (time.monotonic() - began)


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def test_a_restart_by_hand_waits_for_no_back_off_and_takes_its_place() -> None:
    with tree_of(CRASHES_UNTIL_HEALED) as house:
        house.run()
        row = eventually(lambda: waits(house), 30)
        (house.place / "healed").touch()
        began = time.monotonic()

        assert house.ask("restart", names=["app"]) == ["app#0"]

        assert time.monotonic() - began < allowed_s(0.2)
        pid = house.pid("app#0")
        # Beyond the moment at which it would have been tried.
        eventually(lambda: time.monotonic() > began + (row["retry_in_s"] or 0.0) + 0.3, 10)
        assert house.pid("app#0") == pid and house.process("app#0")["state"] == "RUNNING"


def waits(house: Tree) -> dict[str, Any] | None:
    """The row of the process while it waits some time for its next start, or was given up."""
    row = house.process("app#0")
    if row["state"] == "FATAL":
        return row
    return row if row["state"] == "BACKOFF" and row["retry_in_s"] > 0.2 else None


CLOCK = """
import pathlib, time
real, step = time.time, pathlib.Path("step")

def stepped():
    return real() + (float(step.read_text()) if step.exists() else 0.0)

time.time = stepped
"""


@pytest.mark.parametrize("step_s", [-3600, 3600])
def test_a_step_of_the_wall_clock_restarts_nothing_and_delays_nothing(step_s: int) -> None:
    with tree_of() as house:
        # Read by every Python of the tree when it starts.
        (house.place / "sitecustomize.py").write_text(CLOCK)
        house.start({"PYTHONPATH": f"{house.place}:{ROOT}"})
        assert "ready" in house.wait_ready()
        app = house.pid("app#0")

        (house.place / "step").write_text(str(step_s))

        eventually(lambda: has_stepped(house, step_s), 10)
        assert house.pid("app#0") == app
        os.kill(app, signal.SIGKILL)
        began = time.monotonic()
        house.wait_other("app#0", app)
        assert time.monotonic() - began < allowed_s(0.1)
        assert house.ask("status")["state"] == "running"
        assert "hangs" not in house.log


def has_stepped(house: Tree, step_s: int) -> bool:
    """True once the master has told two seconds by the new time."""
    moments = [each["t"] for each in house.ask("status")["history"]]
    return sum(bool(abs(t - time.time() - step_s) < 60) for t in moments) > 1


def fatal(house: Tree) -> dict[str, object] | None:
    if not house.folder.control_path.exists():
        return None
    rows = house.ask("status")["processes"]
    return next((row for row in rows if row["state"] == "FATAL"), None)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("os._exit(1)", "exited with 1"),
        ("os._exit(255)", "exited with 255"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was ended by SIGSEGV"),
    ],
)
def test_the_exit_status_is_the_one_that_the_process_had(how: str, text: str) -> None:
    source = ENDS.replace(
        "HOW",
        f"import pathlib\n    if not pathlib.Path('once').exists():\n"
        f"        pathlib.Path('once').touch()\n        {how}",
    )
    with tree_of(source) as house:
        house.run()

        row = eventually(lambda: ended(house.process("app#0")))

        assert row["last_exit"] == text


def ended(row: dict[str, object]) -> dict[str, object] | None:
    return row if row["last_exit"] else None


def test_an_event_that_takes_its_process_down_three_times_is_parked() -> None:
    with tree_of(POISON) as house:
        house.run()

        eventually(lambda: "took its process down 3 times" in house.log, 20)
        eventually(lambda: "counted two" in house.log, 20)

        assert house.process("count#0")["restarts"] == 3
        assert house.process("app#0")["restarts"] == 0


@pytest.mark.parametrize(
    "how",
    ["while True: pass", "re.match(r'(a+)+$', 'a' * 40 + 'b')"],
    ids=["busy in Python", "stuck in C with the GIL"],
)
def test_a_hanging_process_is_found_named_and_replaced(how: str) -> None:
    with tree_of(HANGS.replace("HOW", how)) as house:
        house.run(option_hang_limit="1s")

        eventually(lambda: house.process("app#0")["restarts"] == 1, 10)

        assert re.search(
            r"hangs: its loop has not turned .*guilty_function \(.*proj.py:", house.log
        )
        eventually(lambda: running(house.process("app#0")))
        assert house.process("app#0")["last_exit"] == (
            "was ended by SIGKILL (its loop did not turn)"
        )


def test_a_stopped_process_is_named_as_stopped_and_replaced() -> None:
    with tree_of() as house:
        os.kill(house.run(option_hang_limit="1s").pid("app#0"), signal.SIGSTOP)

        eventually(lambda: house.process("app#0")["restarts"] == 1, 10)

        assert "it was stopped by a signal" in house.log


def test_a_stopped_log_or_web_process_is_replaced_too() -> None:
    with tree_of() as house:
        house.run(option_hang_limit="1s", option_web_enabled="true")
        before = {name: house.pid(name) for name in ("log", "web")}
        # They have to have been heard, and to have taken what they were sent.
        eventually(lambda: len(house.ask("status")["history"]) > 2)

        for pid in before.values():
            os.kill(pid, signal.SIGSTOP)

        for name, pid in before.items():
            house.wait_other(name, pid, within_s=15)
            assert f"{name} (pid {pid}) hangs" in house.log
        assert house.process("app#0")["restarts"] == 0


def test_a_process_stopped_with_the_turn_to_write_is_ended_long_before_the_hang_limit() -> None:
    with tree_of(POISON.replace("poison", "harmless")) as house:
        house.start({"STREAMD_TEST": "1", "STREAMD_FAILPOINT": "commit.after-begin:1:stop"})

        eventually(lambda: "(it was stopped with the turn to write)" in house.log, 15)


def test_restarts_by_hand_and_a_stop_do_not_meet() -> None:
    with tree_of() as house:
        house.run()
        folder = house.folder.control_path

        async def ask_for_many() -> None:
            links = [await connect(folder, "master") for _ in range(8)]
            asked = [
                asyncio.ensure_future(link.request(Command("restart", {"names": ["app"]})))
                for link in links
            ]
            await asked[0]
            await asyncio.sleep(0.05)
            house.signal(signal.SIGTERM)
            ends = await asyncio.gather(*asked, return_exceptions=True)
            for link in links:
                link.close()
            assert not isinstance(ends[0], BaseException)

        asyncio.run(ask_for_many())

        assert house.wait_exit() == 0
        assert "was ended by SIGKILL" not in house.log


def test_a_stopped_master_does_not_blame_the_processes() -> None:
    stop_the_master(1.8)


def stop_the_master(stopped_s: float) -> None:
    """Stop the master for so long, which is beyond the limit, and see that it blames nobody."""
    with tree_of() as house:
        master = house.run(option_hang_limit="1s").pid("master")
        os.kill(master, signal.SIGSTOP)
        time.sleep(stopped_s)

        os.kill(master, signal.SIGCONT)

        before = len(house.ask("status")["history"])
        eventually(lambda: len(house.ask("status")["history"]) > before + 1, 10)
        assert house.process("app#0")["restarts"] == 0
        assert "hangs" not in house.log


def test_the_zygote_is_replaced_and_the_processes_go_on() -> None:
    with tree_of() as house:
        zygote, app = house.run().pid("zygote"), house.pid("app#0")
        os.kill(zygote, signal.SIGKILL)

        house.wait_other("zygote", zygote)
        os.kill(app, signal.SIGKILL)

        house.wait_other("app#0", app)
        assert house.process("app#0")["restarts"] == 1


def test_a_dead_web_process_is_replaced_on_the_same_port() -> None:
    with tree_of() as house:
        house.run(option_web_enabled="true")
        before, address = house.pid("web"), house.ask("status")["web"]
        app = house.pid("app#0")

        os.kill(before, signal.SIGKILL)

        house.wait_other("web", before)
        assert house.ask("status")["web"] == address
        assert house.pid("app#0") == app


def test_restart_by_a_verb_makes_a_new_process_and_counts_no_crash() -> None:
    with tree_of() as house:
        before = house.run().pid("app#0")

        assert house.ask("restart", names=["app"]) == ["app#0"]

        row = house.process("app#0")
        assert row["state"] == "RUNNING" and row["pid"] != before
        assert row["restarts"] == 0
