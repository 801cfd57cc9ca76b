"""What processes leave behind is adopted, shown, reaped, and ended with the instance."""

import os
import signal
import time
from typing import Any

import pytest
from supervisor_tree import Tree, allowed_s, eventually, tree_of

from streamd.supervisor import tree

ORPHANS = """
import os, time
import streamd
app = streamd.App("proj")

def daemon(seconds):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execvpe("sleep", ["sleep", str(seconds)], {"PATH": os.environ["PATH"]})
        os._exit(0)
    os.wait()

@app.task
async def leave():
    daemon(600)
    for _ in range(20):
        daemon(0)
    print("left them")
"""

DAEMONS = 300

MANY_DAEMONS = """
import os
import streamd
app = streamd.App("proj")

@app.task
async def leave():
    for _ in range(COUNT):
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            os._exit(0)
        os.wait()
    print("left them")
"""

CRASHES_BESIDE_A_DAEMON = """
import os, pathlib
import streamd
app = streamd.App("proj")

@app.task
async def leave():
    first = pathlib.Path("crashed-once")
    if not first.exists():
        first.touch()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.execvp("sleep", ["sleep", "600"])
            os._exit(0)
        os.wait()
        os._exit(5)
"""

FROM_A_THREAD = """
import asyncio, subprocess, threading
import streamd
app = streamd.App("proj")

def spawn():
    print("spawned", subprocess.Popen(["sleep", "600"]).pid)

@app.task
async def run():
    thread = threading.Thread(target=spawn)
    thread.start()
    thread.join()
    print("the thread has ended")
"""

OF_ANOTHER_USER = """
import os
import streamd
app = streamd.App("proj")

@app.task
async def run():
    child = os.fork()
    if child == 0:
        os.setsid()
        os.setuid(65534)
        os.execve("/bin/sleep", ["sleep", "600"], {})
    print("spawned", child)
"""


def strays(house: Tree) -> list[dict[str, Any]]:
    """What was adopted, of all processes."""
    return [stray for row in house.ask("ps") for stray in row["strays"]]


def zombies_of(parent: int) -> list[int]:
    return [each.pid for each in tree.everything() if each.ppid == parent and each.state == "Z"]


def spawned(house: Tree) -> int:
    """The pid that the app has printed."""
    line = eventually(
        lambda: next((each for each in house.log.splitlines() if " spawned " in each), None)
    )
    return int(str(line).split()[-1])


def test_orphans_are_adopted_shown_reaped_and_ended_at_the_stop() -> None:
    with tree_of(ORPHANS) as house:
        master = house.run().pid("master")
        eventually(lambda: "left them" in house.log)

        left = eventually(lambda: [each for each in strays(house) if each["name"] == "sleep"])
        eventually(lambda: not zombies_of(master))
        house.signal(signal.SIGTERM)

        assert len(left) == 1
        assert house.wait_exit() == 0
        assert tree.look_at(left[0]["pid"]) is None


def test_daemons_that_end_leave_no_zombie() -> None:
    leave_daemons(DAEMONS)


def leave_daemons(count: int) -> None:
    """Let an agent process leave so many daemons that end at once."""
    with tree_of(MANY_DAEMONS.replace("COUNT", str(count))) as house:
        master = house.run().pid("master")
        app = house.pid("app#0")
        eventually(lambda: "left them" in house.log, 60)

        eventually(lambda: not zombies_of(master), allowed_s(1.0))

        assert zombies_of(app) == []
        assert strays(house) == []
        assert house.pid("app#0") == app


def test_the_daemon_of_a_process_that_crashes_is_the_masters_child_and_shown() -> None:
    with tree_of(CRASHES_BESIDE_A_DAEMON) as house:
        master = house.run().pid("master")

        eventually(lambda: house.process("app#0")["last_exit"] == "exited with 5")
        stray = eventually(lambda: strays(house))[0]

        found = tree.look_at(stray["pid"])
        assert found is not None and found.ppid == master
        assert stray["name"] == "sleep"


def test_what_a_thread_spawned_outlives_the_thread() -> None:
    with tree_of(FROM_A_THREAD) as house:
        house.run()
        pid = spawned(house)
        eventually(lambda: "the thread has ended" in house.log)

        eventually(lambda: len(house.ask("status")["history"]) > 2, 10)

        found = tree.look_at(pid)
        assert found is not None and found.state != "Z"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_stop_ends_the_child_that_has_become_another_user() -> None:
    with tree_of(OF_ANOTHER_USER) as house:
        house.run()
        pid = spawned(house)
        eventually(lambda: os.stat(f"/proc/{pid}").st_uid == 65534)
        began = time.monotonic()

        house.signal(signal.SIGTERM)

        assert house.wait_exit() == 0
        assert tree.look_at(pid) is None
        assert time.monotonic() - began < allowed_s(1.0)
