"""A process that the kernel ends for lack of memory is named so, and only such a one."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervisor_tree import eventually, tree_of

from streamd.supervisor import oom

EATS = """
import asyncio, pathlib
import streamd
app = streamd.App("proj")

@app.task
async def eat():
    first = pathlib.Path("has-eaten")
    if not first.exists():
        first.touch()
        await asyncio.sleep(0.3)
        print("eats", len(b"x" * (1 << 30)))
"""

LIMIT_BYTES = 256 * 2**20


@pytest.fixture
def cramped() -> Iterator[Path]:
    """A control group with little memory."""
    path = make_cramped()
    if path is None:
        pytest.skip("needs a control group with a memory limit")
    yield path
    eventually(lambda: not (path / "cgroup.procs").read_text())
    path.rmdir()


def make_cramped() -> Path | None:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, folder = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        above = oom.CGROUP / controllers / folder.lstrip("/")
        limit = "memory.limit_in_bytes" if controllers else "memory.max"
        path = above / f"streamd-test-{uuid.uuid4().hex[:8]}"
        with contextlib.suppress(OSError):
            path.mkdir()
            try:
                (path / limit).write_text(str(LIMIT_BYTES))
            except OSError:
                path.rmdir()
                continue
            return path
    return None


def test_a_process_that_the_kernel_ends_for_lack_of_memory_is_named_so(cramped: Path) -> None:
    enter = f'echo $$ > {cramped}/cgroup.procs; exec "$@"'
    with tree_of(EATS) as house:
        house.start(within=["sh", "-c", enter, "sh"])
        house.wait_ready(60)

        eventually(lambda: house.process("app#0")["restarts"], 30)

        row = house.process("app#0")
        assert row["last_exit"] == "was ended by SIGKILL: out of memory", house.log
        assert [house.process(name)["restarts"] for name in ("zygote", "log")] == [0, 0]
        (event,) = [each for each in house.ask("events") if each["kind"] == "memory"]
        assert event["process"] == "app#0"
        assert "was ended by SIGKILL: out of memory; restarted at once" in event["text"]


def test_the_nearest_count_is_taken_and_each_kill_is_given_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, folder = line.split(":", 2)
        if controllers in ("", "memory"):
            place = tmp_path / controllers / folder.lstrip("/")
            place.mkdir(parents=True, exist_ok=True)
            name = "memory.oom_control" if controllers else "memory.events"
            count = place / name
            count.write_text("low 0\noom_kill 3\n")
    monkeypatch.setattr(oom, "CGROUP", tmp_path)
    kills = oom.KernelKills()
    nearest = next(
        path
        for path in (*tmp_path.rglob("memory.events"), *tmp_path.rglob("memory.oom_control"))
    )

    assert kills.is_sure and not kills.take(1.0)
    nearest.write_text("low 0\noom_kill 5\n")
    # Two died at one moment, and a third by somebody's hand.
    assert [kills.take(2.0) for _ in range(3)] == [True, True, False]
    nearest.write_text("low 0\noom_kill 7\n")
    assert kills.take(3.0)
    # The other was no process of ours.
    assert not kills.take(9.0)
    os.unlink(nearest)
    assert not kills.take(10.0)
