"""Whoever exists and does nothing is found, named, ended and replaced; nobody else is."""

import os
import re
import signal
import time

import pytest
from supervisor_tree import Tree, eventually, tree_of

HANGS = """
import ctypes, re, threading, time, asyncio, pathlib
import streamd
app = streamd.App("proj")
lock = threading.Lock()

def guilty_function():
    HOW

@app.task
async def hang():
    first = pathlib.Path("hung-once")
    if not first.exists():
        first.touch()
        await asyncio.sleep(0.6)
        print("hangs from now on")
        guilty_function()
"""

HANGS_AT_START = """
import os, pathlib, time
import streamd
app = streamd.App("proj")

def guilty_function():
    first = pathlib.Path("hung-once")
    if not first.exists():
        first.touch()
        time.sleep(600)

# What a user's library may do to a process that is about to start.
import streamd.agentproc.process as process
before = process.make_broker
process.make_broker = lambda *given: (guilty_function(), before(*given))[1]
"""

ALWAYS_HANGS = """
import time
import streamd
app = streamd.App("proj")

@app.task
async def hang():
    time.sleep(600)
"""

LATE = """
import asyncio, time
import streamd
app = streamd.App("proj")
words = app.topic("words", value_type=str)

async def slow_step():
    await asyncio.sleep(600)

@app.agent(words, timeout=0.5, retries=0)
async def count(stream):
    async for word in stream:
        await slow_step()

@app.task
async def feed():
    await words.send(value="one")
"""

WAITS_LONG = LATE.replace(", timeout=0.5, retries=0", "").replace("600", "2.5")

SLOW_IMPORT = """
import time
time.sleep(2.5)
import streamd
app = streamd.App("proj")
"""

LIMIT_S = 1.0
SLACK_S = 1.0 * 5  # the promise is one second more than the limit


@pytest.mark.parametrize(
    "how",
    [
        "time.sleep(600)",
        "ctypes.PyDLL(None).sleep(600)",
        "lock.acquire(); lock.acquire()",
        "while True: pass",
        "re.match(r'(a+)+$', 'a' * 40 + 'b')",
    ],
    ids=["blocked loop", "C call with the GIL", "deadlock", "busy loop", "regex"],
)
def test_a_hang_is_seen_in_time_and_named_by_function_file_and_line(how: str) -> None:
    with tree_of(HANGS.replace("HOW", how)) as house:
        house.run(option_hang_limit=f"{LIMIT_S}s")
        eventually(lambda: "hangs from now on" in house.log)
        began = time.monotonic()

        eventually(lambda: " hangs: " in house.log, 15)
        seen_s = time.monotonic() - began

        line = number_of(house, "HOW", how)
        assert re.search(
            rf"app#0 \(pid \d+\) hangs: .*guilty_function \(.*proj.py:{line}\)", house.log
        )
        assert seen_s < LIMIT_S + SLACK_S
        row = eventually(lambda: replaced(house, "app#0"))
        assert (row["hangs"], row["restarts"]) == (1, 1)


def number_of(house: Tree, marker: str, text: str) -> int:
    """The line of the app on which `text` stands."""
    lines = (house.place / "proj.py").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def replaced(house: Tree, name: str) -> dict[str, object] | None:
    row = house.process(name)
    return row if row["state"] == "RUNNING" and row["restarts"] else None


def test_a_process_that_blocks_before_it_is_ready_is_seen_too() -> None:
    with tree_of(HANGS_AT_START) as house:
        house.start(option_start_limit=f"{LIMIT_S}s")

        word = house.wait_ready(LIMIT_S + SLACK_S + 10)

        assert "ready" in word
        assert re.search(
            r"hangs: it starts and has given no sign of life .* guilty_function \(", house.log
        )


def test_a_stopped_web_process_is_replaced_in_the_limit_and_a_little() -> None:
    with tree_of() as house:
        house.run(option_hang_limit=f"{LIMIT_S}s", option_web_enabled="true")
        web = house.pid("web")
        eventually(lambda: len(house.ask("status")["history"]) > 1)
        began = time.monotonic()
        os.kill(web, signal.SIGSTOP)

        eventually(lambda: replaced(house, "web"), 15)

        assert time.monotonic() - began < LIMIT_S + 2.0 * 5
        assert f"web (pid {web}) hangs" in house.log
        assert "it was stopped by a signal" in house.log


def test_a_process_that_hangs_each_time_is_given_up_like_one_that_crashes() -> None:
    with tree_of(ALWAYS_HANGS) as house:
        house.run(option_hang_limit="300ms")

        row = eventually(lambda: given_up(house), 60)

        assert row["hangs"] == 5


def given_up(house: Tree) -> dict[str, object] | None:
    row = house.process("app#0")
    return row if row["state"] == "FATAL" else None


def test_an_event_past_its_timeout_is_named_by_function_file_and_line() -> None:
    with tree_of(LATE) as house:
        house.run()

        eventually(lambda: "it took longer than 0.5 s" in house.log, 15)

        line = number_of(house, "", "await asyncio.sleep(600)")
        eventually(lambda: f'proj.py", line {line}, in slow_step' in house.log)


def test_an_event_that_waits_long_is_no_hang() -> None:
    with tree_of(
        WAITS_LONG.replace("await slow_step()", "await slow_step(); print('done')")
    ) as house:
        house.run(option_hang_limit="500ms")

        eventually(lambda: "done" in house.log, 15)

        assert "hangs" not in house.log
        assert house.process("count#0")["restarts"] == 0


def test_a_long_import_is_no_hang() -> None:
    with tree_of(SLOW_IMPORT) as house:
        house.run(option_hang_limit="500ms", option_start_limit="500ms")

        assert "hangs" not in house.log
        assert house.process("app#0")["restarts"] == 0


def test_a_limit_of_zero_is_none() -> None:
    with tree_of() as house:
        app = house.run(option_hang_limit="0", option_start_limit="0").pid("app#0")
        os.kill(app, signal.SIGSTOP)

        # Other looks go on: three of the master's seconds.
        before = len(house.ask("status")["history"])
        eventually(lambda: len(house.ask("status")["history"]) > before + 2, 10)

        os.kill(app, signal.SIGCONT)
        assert house.process("app#0")["restarts"] == 0


def test_a_stopped_master_does_not_blame_processes_that_start() -> None:
    with tree_of(ALWAYS_HANGS.replace("600", "1.5")) as house:
        master = house.run(option_hang_limit="3s", option_start_limit="1s").pid("master")
        os.kill(master, signal.SIGSTOP)
        time.sleep(1.2)  # the stop itself is what is tested

        os.kill(master, signal.SIGCONT)

        before = len(house.ask("status")["history"])
        eventually(lambda: len(house.ask("status")["history"]) > before + 2, 10)
        assert "hangs" not in house.log


BLOCKS_AT_EVENT = """
import asyncio, time
import streamd
app = streamd.App("proj", hang_limit="1s")
words = app.topic("words", key_type=str, value_type=str, partitions=1)

def block():
    print("blocks now")
    time.sleep(600)

@app.agent(words)
async def count(stream):
    async for word in stream:
        if word == "block":
            block()
        await asyncio.sleep(0)
        if word == "wait":
            print("waits now")
            await asyncio.sleep(600)

@app.task
async def feed():
    for word in ("one", "WORD"):
        await words.send(key="a key", value=word)
"""


def test_a_process_that_hangs_while_it_stops_does_not_cost_the_whole_grace() -> None:
    with tree_of(BLOCKS_AT_EVENT.replace("WORD", "block")) as house:
        house.run()
        eventually(lambda: "blocks now" in house.log, 20)
        began = time.monotonic()

        house.signal(signal.SIGTERM)

        # What it worked on is done again: that is no warm end.
        assert house.wait_exit(20) == 3
        assert time.monotonic() - began < 15  # the grace is 30 s
        assert re.search(
            r"count#0 \(pid \d+\) hangs: its loop has not turned for \d\.\d s, it is in "
            r"block \(.*proj\.py:9\), at proj\.count: words\[0\]@\d or soon after, for "
            r"\d\.\d s; it is killed$",
            house.log,
            re.MULTILINE,
        )


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("wait", r"In work:\n  count: words\[0\]@1 key 'a key' for \d+\.\d s\nTask "),
        ("block", r"In work, as it wrote last: proj\.count: words\[0\]@\d or soon after, for "),
        ("two", r"In work: nothing\nTask "),
    ],
)
def test_stacks_show_the_event_that_an_agent_works_on(word: str, line: str) -> None:
    source = BLOCKS_AT_EVENT.replace("WORD", word).replace("1s", "60s")
    with tree_of(source) as house:
        house.run()
        eventually(lambda: word == "two" or f"{word}s now" in house.log, 20)

        def shown() -> str:
            return str(house.ask("stacks", names=["count"]))

        eventually(lambda: re.search(line, shown()), 10)
        house.signal(signal.SIGQUIT)
        house.wait_exit(10)
