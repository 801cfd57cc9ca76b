"""What becomes of a process that dies or hangs."""

import asyncio
import os
import re
import signal
import time

import pytest
from supervisor_tree import Tree, eventually, tree_of

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


def test_a_killed_process_is_replaced_at_once_and_it_is_not_its_fault() -> None:
    with tree_of() as house:
        before = house.run().pid("app#0")
        for _ in range(7):
            os.kill(before, signal.SIGKILL)
            before = wait_other(house, "app#0", before)

        row = eventually(lambda: running(house.process("app#0")))
        assert row["restarts"] == 7
        assert row["last_exit"] == "was ended by SIGKILL from outside"


def wait_other(house: Tree, name: str, before: int, within_s: float = 5.0) -> int:
    """The pid of the process that runs in place of `before`."""

    def other() -> int | None:
        row = house.process(name)
        return row["pid"] if row["state"] == "RUNNING" and row["pid"] != before else None

    return int(eventually(other, within_s))


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
            wait_other(house, name, pid, within_s=15)
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
    with tree_of() as house:
        master = house.run(option_hang_limit="1s").pid("master")
        os.kill(master, signal.SIGSTOP)
        time.sleep(1.8)

        os.kill(master, signal.SIGCONT)

        time.sleep(0.8)
        assert house.process("app#0")["restarts"] == 0
        assert "hangs" not in house.log


def test_the_zygote_is_replaced_and_the_processes_go_on() -> None:
    with tree_of() as house:
        zygote, app = house.run().pid("zygote"), house.pid("app#0")
        os.kill(zygote, signal.SIGKILL)

        wait_other(house, "zygote", zygote)
        os.kill(app, signal.SIGKILL)

        wait_other(house, "app#0", app)
        assert house.process("app#0")["restarts"] == 1


def test_a_dead_web_process_is_replaced_on_the_same_port() -> None:
    with tree_of() as house:
        house.run(option_web_enabled="true")
        before, address = house.pid("web"), house.ask("status")["web"]
        app = house.pid("app#0")

        os.kill(before, signal.SIGKILL)

        wait_other(house, "web", before)
        assert house.ask("status")["web"] == address
        assert house.pid("app#0") == app


def test_restart_by_a_verb_makes_a_new_process_and_counts_no_crash() -> None:
    with tree_of() as house:
        before = house.run().pid("app#0")

        assert house.ask("restart", names=["app"]) == ["app#0"]

        row = house.process("app#0")
        assert row["state"] == "RUNNING" and row["pid"] != before
        assert row["restarts"] == 0
