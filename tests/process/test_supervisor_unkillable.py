"""A process that the kernel does not let go is named, with the place, and waited for no longer.

It writes to a file system that is frozen: no signal ends that.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from supervisor_tree import Tree, eventually, tree_of

WRITES = """
import asyncio, pathlib
import streamd
app = streamd.App("proj")

@app.task
async def write():
    while not pathlib.Path("now").exists():
        await asyncio.sleep(0.05)
    if not pathlib.Path("written-once").exists():
        pathlib.Path("written-once").touch()
        print("writes")
        pathlib.Path("disk/file").write_text("anything")
"""


def run(*words: object) -> bool:
    """Run a command; True if it did well."""
    return subprocess.run([*map(str, words)], capture_output=True, check=False).returncode == 0


@contextmanager
def disk(mount_point: Path) -> Iterator[bool]:
    """A small disk that can be frozen; False where there is none to be had."""
    mount_point.mkdir()
    image = mount_point.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(8 * 2**20)
    mounted = False
    try:
        mounted = (
            shutil.which("fsfreeze") is not None
            and run("mkfs.ext4", "-q", image)
            and run("mount", "-o", "loop", image, mount_point)
        )
        yield mounted
    finally:
        if mounted:
            run("fsfreeze", "--unfreeze", mount_point)
            run("umount", "--lazy", mount_point)


def can_freeze() -> bool:
    """True if a disk can be mounted and frozen here."""
    if os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory() as folder:
        with disk(Path(folder) / "disk") as mounted:
            return mounted and run("fsfreeze", "--freeze", Path(folder) / "disk")


pytestmark = pytest.mark.skipif(not can_freeze(), reason="needs root")


def hold(house: Tree) -> None:
    """Let the process of `house` be held by the kernel."""
    assert run("fsfreeze", "--freeze", house.place / "disk")
    (house.place / "now").touch()
    eventually(lambda: "writes" in house.log)


def test_a_stop_names_what_cannot_be_ended_with_the_place_and_ends_in_time() -> None:
    with tree_of(WRITES) as house, disk(house.place / "disk"):
        pid = house.run(option_grace="300ms").pid("app#0")
        hold(house)
        began = time.monotonic()

        house.signal(signal.SIGTERM)

        assert house.wait_exit(30) == 3
        # Cold after the grace, then 2 s of the master's, 2 s for the group, 3 s the guardian's.
        assert time.monotonic() - began < 0.3 + 1.5 + 7.0 + 5.0
        assert re.search(rf"UNKILLABLE: {pid} app#0 \(state D, in \w+\)", house.log)
        assert [each for each in house.survivors() if each.startswith(f"{pid} ")]


def test_a_hanging_process_that_cannot_be_ended_is_a_problem_until_it_is_let_go() -> None:
    with tree_of(WRITES) as house, disk(house.place / "disk"):
        pid = house.run(option_hang_limit="500ms").pid("app#0")
        hold(house)

        problem = eventually(
            lambda: [p for p in house.ask("status")["problems"] if p["code"] == "unkillable"],
            30,
        )[0]
        run("fsfreeze", "--unfreeze", house.place / "disk")

        assert f"app#0 (pid {pid})" in problem["text"] and "state D, in " in problem["text"]
        assert f"app#0 (pid {pid}) is UNKILLABLE" in house.log
        eventually(lambda: house.process("app#0")["restarts"] == 1, 10)
        eventually(lambda: house.ask("status")["state"] == "running", 10)
