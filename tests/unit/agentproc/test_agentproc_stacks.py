"""Stacks of tasks: what is shown, and that users' data is not."""

import asyncio
import os
from collections.abc import AsyncIterator

import pytest
import uvloop

from streamd.agentproc.stacks import END_OF_TASKS, MAX_FRAMES, task_stacks, write_task_stacks


async def waits_in_the_end() -> None:
    password = "hunter2"
    await asyncio.sleep(60)
    print(password)  # noqa: T201


async def numbers() -> AsyncIterator[int]:
    await waits_in_the_end()
    yield 1


async def iterates() -> None:
    async for _ in numbers():
        break


async def deep(depth: int) -> None:
    if depth:
        await deep(depth - 1)
    else:
        await asyncio.sleep(60)


async def dump(*named: tuple[str, object]) -> str:
    tasks = [asyncio.create_task(coro, name=name) for name, coro in named]  # type: ignore[arg-type,var-annotated]
    await asyncio.sleep(0)
    text = task_stacks(asyncio.get_running_loop())
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return text


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_dump_names_each_task_and_the_lines_on_which_it_waits(new_loop: object) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:  # type: ignore[arg-type]
        text = runner.run(dump(("agent count", iterates())))

    block = text.partition("Task 'agent count'")[2]
    assert [
        block.index(name) for name in ("in iterates", "in numbers", "in waits_in")
    ] == sorted(block.index(name) for name in ("in iterates", "in numbers", "in waits_in"))
    assert "await asyncio.sleep(60)" in block
    assert __file__ in block
    assert text.endswith(END_OF_TASKS + "\n")


def test_dump_shows_no_values() -> None:
    text = asyncio.run(dump(("agent", waits_in_the_end())))

    assert "hunter2" not in text


def test_deep_stack_is_cut() -> None:
    text = asyncio.run(dump(("deep", deep(MAX_FRAMES + 20))))

    assert text.count("in deep:") == MAX_FRAMES
    assert "more" in text


def test_two_dumps_stand_one_after_the_other_in_the_file() -> None:
    fd = os.memfd_create("dump")

    async def write_twice() -> None:
        write_task_stacks(fd, asyncio.get_running_loop())
        write_task_stacks(fd, asyncio.get_running_loop())

    asyncio.run(write_twice())
    text = os.pread(fd, 1 << 20, 0).decode()
    os.close(fd)

    assert text.count(END_OF_TASKS) == 2
    assert "\0" not in text
