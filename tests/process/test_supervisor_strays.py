"""What a process leaves behind when it ends is kept or ended, as the setting `strays` says."""

import signal

import pytest
from supervisor_tree import Tree, eventually, tree_of

from streamd.supervisor import tree

LEAVES = """
import asyncio, os, pathlib, signal, subprocess, sys, time
import streamd
app = streamd.App("proj", strays="POLICY", grace="1s")
one = app.topic("one", value_type=str)
other = app.topic("other", value_type=str)

def start(name):
    # Detached by a process between, as daemons are: an orphan at once.
    code = "import os,sys,time; os.setsid(); SIGNALS; "
    code += f"os.fork() and os._exit(0); open('{name}', 'w').write(str(os.getpid())); "
    code += "os.rename(sys.argv[1], sys.argv[1] + '.pid'); time.sleep(600)"
    subprocess.run([sys.executable, "-c", code, name])

@app.agent(one)
async def leaver(stream):
    async for word in stream:
        start("left")
        os._exit(9)

@app.agent(other)
async def keeper(stream):
    async for word in stream:
        start("kept")

@app.task
async def feed():
    if not pathlib.Path("fed").exists():
        pathlib.Path("fed").touch()
        await other.send(value="x")
        await one.send(value="x")
"""


def pid_in(house: Tree, name: str) -> int:
    file = house.place / f"{name}.pid"
    eventually(file.exists, 15)
    return int(file.read_text())


def is_there(pid: int) -> bool:
    found = tree.look_at(pid)
    return found is not None and found.state not in "ZX"


def shown(house: Tree) -> dict[int, str]:
    """pid of each stray -> the process that it is shown with."""
    return {stray["pid"]: row["name"] for row in house.ask("ps") for stray in row["strays"]}


@pytest.mark.parametrize(
    ("signals", "text"),
    [
        ("pass", "left behind, is ended"),
        (
            "import signal; signal.signal(15, signal.SIG_IGN)",
            "did not end in 1 s: it is killed",
        ),
    ],
)
def test_what_a_process_that_ended_left_behind_is_ended(signals: str, text: str) -> None:
    source = LEAVES.replace("POLICY", "kill").replace("SIGNALS", signals)
    with tree_of(source) as house:
        house.run()
        kept = pid_in(house, "kept")
        # The event is tried three times, and each try leaves one.
        eventually(lambda: "took its process down 3 times" in house.log, 20)
        left = pid_in(house, "left")

        eventually(lambda: not is_there(left), 20)

        told = [event for event in house.ask("events") if event["kind"] == "stray"]
        assert any(text in event["text"] for event in told)
        assert {event["process"] for event in told} == {"leaver#0"}
        # That of a process that runs is the process's own business.
        assert is_there(kept) and shown(house)[kept] == "keeper#0"


def test_it_is_kept_where_nothing_is_said_and_ends_with_the_instance() -> None:
    source = LEAVES.replace("POLICY", "keep").replace("SIGNALS", "pass")
    with tree_of(source) as house:
        house.run()
        eventually(lambda: "took its process down 3 times" in house.log, 20)
        left = pid_in(house, "left")
        eventually(lambda: left in shown(house))

        assert is_there(left) and shown(house)[left] == "master"
        assert not [event for event in house.ask("events") if event["kind"] == "stray"]

        house.signal(signal.SIGTERM)
        assert house.wait_exit() == 0
        assert not is_there(left)
