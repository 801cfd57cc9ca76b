"""Signals to the guardian: what each means, with exit codes and limits of time."""

import os
import pty
import signal
import time

import pytest
from supervisor_tree import eventually, many, tree_of

SLOW = """
import asyncio
import streamd
app = streamd.App("proj")
jobs = app.topic("jobs", value_type=str)

@app.agent(jobs)
async def work(stream):
    async for job in stream:
        print("works on", job)
        await asyncio.sleep(float(job))

@app.task
async def feed():
    await jobs.send(value="SECONDS")
"""

DEAF = """
import asyncio, time
import streamd
app = streamd.App("proj")

@app.task
async def deafen():
    await asyncio.sleep(0.3)
    print("deaf now")
    time.sleep(60)
"""


def test_term_stops_warm_with_exit_code_0_and_nothing_left() -> None:
    with tree_of() as house:
        word = house.run(option_web_enabled="true").wait_ready()
        names = [told["process"] for told in house.told if told.get("state") == "ready"]

        house.signal(signal.SIGTERM)

        assert house.wait_exit() == 0
        house.wait_nothing_left(1.0)
        assert names[0] == "zygote" and {"log", "app#0", "web"} < set(names)
        assert word["web"].startswith("http://127.0.0.1:")
        assert "proj stopped warm" in house.log
        assert not [path for path in house.folder.path.iterdir() if path.is_socket()]


@pytest.mark.parametrize(
    "numbers",
    [[signal.SIGQUIT], [signal.SIGINT, signal.SIGINT], [signal.SIGTERM, signal.SIGQUIT]],
    ids=["quit", "int twice", "quit while it stops warm"],
)
def test_a_cold_stop_ends_running_events_within_its_limit(numbers: list[int]) -> None:
    with tree_of(SLOW.replace("SECONDS", "60")) as house:
        house.run()
        eventually(lambda: "works on 60" in house.log)

        for number in numbers[:-1]:
            house.signal(number)
            eventually(lambda: "stopping: what runs is finished first" in house.log)
        began = time.monotonic()
        house.signal(numbers[-1])

        assert house.wait_exit() == 3
        assert time.monotonic() - began < 1.5 * 3
        house.wait_nothing_left(1.0)


def test_a_warm_stop_waits_for_the_event_that_runs_and_says_so() -> None:
    with tree_of(SLOW.replace("SECONDS", "2")) as house:
        house.run()
        eventually(lambda: "works on 2" in house.log)

        house.signal(signal.SIGTERM)
        eventually(lambda: "stopping: what runs is finished first" in house.log)
        house.signal(signal.SIGTERM)

        assert house.wait_exit() == 0
        assert "still stopping: " in house.log


def test_the_end_of_grace_makes_the_stop_cold() -> None:
    with tree_of(SLOW.replace("SECONDS", "60")) as house:
        house.run(option_grace="500ms")
        eventually(lambda: "works on 60" in house.log)

        house.signal(signal.SIGTERM)

        assert house.wait_exit() == 3
        assert "the grace of 0.5 s is over" in house.log


def test_a_process_that_hears_nothing_is_killed_in_time() -> None:
    with tree_of(DEAF) as house:
        house.run()
        eventually(lambda: "deaf now" in house.log)
        began = time.monotonic()

        house.signal(signal.SIGQUIT)

        assert house.wait_exit() == 3
        assert time.monotonic() - began < 1.5 * 3
        assert "killed, since they did not end: app#0" in house.log


def test_the_third_int_kills_at_once() -> None:
    with tree_of(DEAF) as house:
        house.run()
        eventually(lambda: "deaf now" in house.log)

        house.signal(signal.SIGINT)
        eventually(lambda: "stopping: what runs is finished first" in house.log)
        house.signal(signal.SIGINT)
        eventually(lambda: "stopping cold" in house.log)
        house.signal(signal.SIGINT)

        assert house.wait_exit() == 3
        house.wait_nothing_left(1.0)
        assert "proj stopped" not in house.log


def test_a_stopped_process_hears_term_all_the_same() -> None:
    with tree_of() as house:
        os.kill(house.run().pid("app#0"), signal.SIGSTOP)

        house.signal(signal.SIGTERM)

        assert house.wait_exit() == 0


def test_hup_to_a_daemon_reloads() -> None:
    with tree_of() as house:
        before = house.run().pid("app#0")

        house.signal(signal.SIGHUP)

        eventually(lambda: house.process("app#0")["pid"] not in (None, before))
        eventually(lambda: house.ask("status")["state"] == "running")


@pytest.mark.parametrize("after_s", [0.06, 0.1, 0.15, 0.2, 0.3])
def test_a_term_at_any_moment_of_the_start_ends_it_warm(after_s: float) -> None:
    with tree_of() as house:
        house.start(option_web_enabled="true")
        # The guardian's own interpreter has started by then; nothing else needs to.
        time.sleep(after_s)

        house.signal(signal.SIGTERM)

        assert house.wait_exit() == 0
        assert "Traceback" not in house.log
        assert (house.place / "guardian.txt").read_text() == ""


def test_an_import_that_hangs_can_be_stopped() -> None:
    with tree_of("import time\nprint('imports', flush=True)\ntime.sleep(600)\n") as house:
        house.start()
        eventually(lambda: "imports" in house.log)

        house.signal(signal.SIGTERM)

        assert house.wait_exit() == 0


def test_a_hundred_idle_processes_stop_soon() -> None:
    with tree_of(many(100)) as house:
        house.run()
        began = time.monotonic()

        house.signal(signal.SIGTERM)

        assert house.wait_exit() == 0
        assert time.monotonic() - began < 1.0 * 5
        assert house.log.count("exited with 0") == 103


def test_usr2_opens_the_log_file_anew() -> None:
    with tree_of() as house:
        house.run()
        moved = house.logfile.with_suffix(".1")
        house.logfile.rename(moved)

        house.signal(signal.SIGUSR2)

        eventually(lambda: "the log file was opened anew" in house.log)
        assert "is ready after" in moved.read_text()


def test_a_terminal_that_hangs_up_stops_warm_and_ctrl_z_is_refused() -> None:
    with tree_of() as house:
        controller, terminal = pty.openpty()
        house.run(terminal=os.ttyname(terminal))

        house.signal(signal.SIGTSTP)
        eventually(lambda: "Ctrl-Z is refused" in house.log)
        house.signal(signal.SIGHUP)

        assert house.wait_exit() == 0
        assert "proj stopped warm" in house.log
        os.close(controller)
        os.close(terminal)
