"""Restart types, strategies, one more try, exits: the policy with real processes."""

import os
import re
import signal
from pathlib import Path

import pytest
from supervisor_exits import crash_cycles, instant_exits
from supervisor_tree import Tree, eventually, tree_of

from streamd.agentproc import forking

ENDS = """
import asyncio, os, pathlib, signal, sys
import streamd
app = streamd.App("proj")

async def end():
    HOW

def of(kind):
    @app.agent(name=f"proj.{kind}", restart=kind)
    async def agent(stream):
        async for _ in stream:
            await end()
    return agent

agents = [of(kind) for kind in ("permanent", "transient", "temporary")]

@app.task
async def feed():
    if not pathlib.Path("fed").exists():
        pathlib.Path("fed").touch()
        for agent in agents:
            await agent.cast(1)
"""

FLOW = """
import streamd
app = streamd.App("proj", strategy="STRATEGY")

@app.agent()
async def split(stream):
    async for event in stream:
        await count.send(value=event)

@app.agent()
async def count(stream):
    async for event in stream:
        await report.send(value=event)

@app.agent()
async def report(stream):
    async for _ in stream:
        pass
"""

SLOW_SINK = (
    FLOW.replace("STRATEGY", "one_for_all").replace(
        "    async for _ in stream:\n        pass\n",
        "    async for _ in stream:\n"
        "        print('in work')\n"
        "        await asyncio.sleep(1.5)\n",
    )
    + """
import asyncio, pathlib

@app.task
async def feed():
    if not pathlib.Path("fed").exists():
        pathlib.Path("fed").touch()
        for _ in range(20):
            await report.cast(1)
"""
)

CRASHES_AT_START = """
import os, pathlib, sys
import streamd
app = streamd.App("proj")

@app.task
async def crash():
    if not pathlib.Path("healed").exists():
        print("the disk of the user is on fire", file=sys.stderr)
        os._exit(5)
"""


def rows(house: Tree) -> dict[str, dict[str, object]]:
    return {row["name"]: row for row in house.ask("status")["processes"]}


@pytest.mark.parametrize(
    ("how", "restarted"),
    [
        ("os._exit(0)", {"permanent"}),
        ("os._exit(7)", {"permanent", "transient"}),
        ("os.kill(os.getpid(), signal.SIGSEGV)", {"permanent", "transient"}),
    ],
    ids=["exit 0", "exit 7", "a crash"],
)
def test_restart_types(how: str, restarted: set[str]) -> None:
    with tree_of(ENDS.replace("HOW", how)) as house:
        house.run()
        names = ("permanent", "transient", "temporary")

        eventually(lambda: all(rows(house)[f"{name}#0"]["last_exit"] for name in names), 20)
        eventually(
            lambda: all(
                rows(house)[f"{name}#0"]["state"]
                == ("RUNNING" if name in restarted else "STOPPED")
                for name in names
            ),
            20,
        )

        assert {n for n in names if rows(house)[f"{n}#0"]["restarts"]} == restarted
        assert house.ask("status")["state"] == "running"


def test_a_crash_leaves_the_place_where_it_happened() -> None:
    source = ENDS.replace("    HOW", "    import ctypes; ctypes.string_at(0)")
    with tree_of(source) as house:
        house.run()

        eventually(lambda: re.search(r"#0 ended in (string_at|end) \(", house.log), 15)


@pytest.mark.parametrize(
    ("strategy", "killed", "with_it"),
    [
        ("one_for_one", "count#0", []),
        ("rest_for_one", "count#0", ["split#0", "app#0"]),
        ("rest_for_one", "report#0", ["count#0", "split#0", "app#0"]),
        ("one_for_all", "count#0", ["report#0", "split#0", "app#0"]),
    ],
)
def test_strategies_restart_exactly_these_in_order(
    strategy: str, killed: str, with_it: list[str]
) -> None:
    with tree_of(FLOW.replace("STRATEGY", strategy)) as house:
        house.run()
        names = ("report#0", "count#0", "split#0", "app#0")
        before = {name: house.pid(name) for name in names}
        told = len(house.log)

        os.kill(before[killed], signal.SIGKILL)

        changed = {killed, *with_it}
        eventually(
            lambda: all(
                row["state"] == "RUNNING" and row["pid"] != before[name]
                for name, row in rows(house).items()
                if name in changed
            ),
            20,
        )
        after = {name: house.pid(name) for name in names}
        assert {name for name in names if after[name] != before[name]} == changed
        log = house.log[told:]
        ended = re.findall(r"(\S+#0) \(pid \d+\) exited with 0", log)
        assert ended == list(reversed(with_it))


def test_a_strategy_and_a_reload_that_want_the_same_process_take_turns() -> None:
    with tree_of(SLOW_SINK) as house:
        house.run(option_grace="60s")
        names = ("report#0", "count#0", "split#0", "app#0")
        before = {name: house.pid(name) for name in names}
        eventually(lambda: "in work" in house.log)

        house.signal(signal.SIGHUP)
        eventually(lambda: rows(house)["report#0"]["state"] == "STOPPING", 20)
        # Both wait for the end of report#0 now, to start it anew.
        os.kill(before["split#0"], signal.SIGKILL)

        eventually(
            lambda: (
                house.ask("status")["state"] == "running"
                and all(rows(house)[name]["pid"] not in (None, before[name]) for name in names)
            ),
            30,
        )
        events = [event["text"] for event in house.ask("events")]
        assert "reloaded: 4 processes run the new code" in events
        # Nobody waits for an end any more: the strategy is obeyed the next time, too.
        eventually(lambda: house.process("split#0")["state"] == "RUNNING")
        before = {name: house.pid(name) for name in names}
        os.kill(before["split#0"], signal.SIGKILL)
        eventually(lambda: all(house.pid(name) != before[name] for name in names), 30)
        eventually(lambda: all(len(running_as(house, name)) == 1 for name in names), 10)
        assert "Traceback" not in house.log


def running_as(house: Tree, name: str) -> list[str]:
    """The living processes that the log calls by this name."""
    told = re.findall(rf"{name} \(pid (\d+)\) is RUNNING", house.log)
    return [pid for pid in dict.fromkeys(told) if Path(f"/proc/{pid}").exists()]


def test_what_was_given_up_shows_its_last_lines_and_is_tried_once_more() -> None:
    with tree_of(CRASHES_AT_START) as house:
        house.run(option_fatal_retry="1s")
        row = eventually(lambda: given_up(house), 40)

        problem = next(
            each for each in house.ask("status")["problems"] if each["code"] == "fatal"
        )
        assert problem["lines"] == ["the disk of the user is on fire"]
        assert row["retry_in_s"] is not None
        assert "the disk of the user is on fire" in house.ask("events")[-1]["text"]
        (house.place / "healed").touch()

        eventually(lambda: rows(house)["app#0"]["state"] == "RUNNING", 15)
        assert "it is tried once more" in house.log


def given_up(house: Tree) -> dict[str, object] | None:
    row = rows(house).get("app#0")
    return row if row and row["state"] == "FATAL" else None


CYCLES = 60


def test_crash_cycles_leave_no_zombie_descriptor_thread_or_memory() -> None:
    assert crash_cycles(CYCLES) == []


@pytest.mark.parametrize("forks", ["once", "twice"])
def test_every_one_of_600_instant_exits_is_told_right(forks: str) -> None:
    if forks == "once" and not forking.tid_address():
        pytest.skip("needs x86-64 and glibc")

    assert instant_exits(600, forks) == []
