"""Memory: what is shared is not counted, and a kill by the kernel is named."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from supervisor_tree import eventually, tree_of

from streamd.supervisor import cgroups

LARGE_IMPORT = """
import asyncio
import streamd
app = streamd.App("proj", max_memory=40 * 2**20)
held = [bytes([number % 256]) * 4096 for number in range(25_000)]

@app.task
async def idle():
    print("holds", len(held))
    await asyncio.sleep(600)
"""

DEVOURS = """
import asyncio, pathlib
import streamd
app = streamd.App("proj")
held = []

@app.agent()
async def other(stream):
    async for event in stream:
        pass

@app.task
async def devour():
    first = pathlib.Path("devoured-once")
    if not first.exists():
        first.touch()
        while True:
            held.append(bytearray(b"x" * 2**20))
            await asyncio.sleep(0.001)
"""

LIMIT_BYTES = 400 * 2**20


def test_a_fresh_process_of_a_large_import_is_not_replaced() -> None:
    with tree_of(LARGE_IMPORT) as house:
        pid = house.run(option_memory_check="100ms").pid("app#0")
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
        assert resident > 100 * 2**20

        # More than twenty looks: a process is replaced after two.
        before = len(house.ask("status")["history"])
        eventually(lambda: len(house.ask("status")["history"]) > before + 2, 10)

        row = house.process("app#0")
        assert (row["pid"], row["recycles"]) == (pid, 0)


@contextmanager
def memory_group() -> Iterator[Path | None]:
    """A control group with little memory; None where there is none to be had."""
    path = None
    for parent, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path(cgroups.own() or "/nonexistent"), "memory.max"),
    ):
        path = parent / f"test-{os.urandom(4).hex()}"
        try:
            path.mkdir()
        except OSError:
            path = None
            continue
        try:
            (path / limit).write_text(str(LIMIT_BYTES))
        except OSError:
            path.rmdir()
            path = None
            continue
        break
    try:
        yield path
    finally:
        if path is not None:
            path.rmdir()


def have_memory_group() -> bool:
    with memory_group() as path:
        return path is not None


@pytest.mark.skipif(not have_memory_group(), reason="needs a memory control group")
def test_a_process_that_the_kernel_killed_for_memory_is_named_and_no_other_is_touched() -> None:
    with memory_group() as group, tree_of(DEVOURS) as house:
        enter = ["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"', str(group)]
        house.start(within=enter)
        assert "ready" in house.wait_ready()
        other = house.pid("other#0")

        eventually(lambda: house.process("app#0")["restarts"] == 1, 60)

        row = house.process("app#0")
        assert row["last_exit"] == "was ended by SIGKILL: out of memory"
        assert house.pid("other#0") == other
        assert house.process("other#0")["restarts"] == 0
