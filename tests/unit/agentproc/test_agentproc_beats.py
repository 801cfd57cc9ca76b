"""The beat page, read as the master reads it: another process's view of the same memory."""

import asyncio
import json
import mmap
import os
import struct
import time
from collections.abc import Iterator

import pytest

from streamd.agentproc.beats import BEAT_S, PAGE_BYTES, Beats, Place, Stage


@pytest.fixture
def page() -> Iterator[int]:
    fd = os.memfd_create("page")
    os.ftruncate(fd, PAGE_BYTES)
    yield fd
    os.close(fd)


def read(page: int) -> tuple[float, int, int, float, int, float]:
    fields: tuple[float, int, int, float, int, float] = struct.unpack(
        "dqqdqd", os.pread(page, 48, 0)
    )
    return fields


def read_place(page: int) -> dict[str, object] | None:
    (length,) = struct.unpack("q", os.pread(page, 8, 1016))
    if length == 0:
        return None
    found: dict[str, object] = json.loads(os.pread(page, length, 1024))
    return found


def test_page_of_a_new_process_says_starting_and_is_fresh(page: int) -> None:
    before = time.monotonic()

    Beats(page)

    beat, settled, in_work, oldest, stage, since = read(page)
    assert before <= beat <= time.monotonic() and before <= since <= time.monotonic()
    assert (settled, in_work, oldest, stage) == (0, 0, 0.0, Stage.STARTING)


def test_stage_changes_with_its_moment(page: int) -> None:
    beats = Beats(page)
    first = read(page)

    beats.enter(Stage.DRAINING)

    assert read(page)[4] == 3
    assert read(page)[5] >= first[5]


def test_settled_events_add_up(page: int) -> None:
    beats = Beats(page)

    beats.settled(3)
    beats.settled(4)

    assert read(page)[1] == 7


def test_work_of_several_groups_is_one_sum_with_the_oldest_moment(page: int) -> None:
    beats = Beats(page)

    beats.in_work("a", 2, 50.0)
    beats.in_work("b", 5, 40.0)
    beats.in_work("c", 0, 1.0)

    assert read(page)[2:4] == (7, 40.0)
    beats.in_work("b", 0, 0.0)
    assert read(page)[2:4] == (2, 50.0)
    beats.in_work("a", 0, 0.0)
    assert read(page)[2:4] == (0, 0.0)


def test_place_is_readable_until_it_is_replaced_or_cleared(page: int) -> None:
    beats = Beats(page)

    beats.place(Place("count", "proj-posts", 3, 1042))
    assert read_place(page) == {
        "agent": "count",
        "topic": "proj-posts",
        "partition": 3,
        "position": 1042,
    }

    beats.place(None)
    assert read_place(page) is None


def test_place_that_does_not_fit_is_left_out(page: int) -> None:
    beats = Beats(page)

    beats.place(Place("count", "t" * PAGE_BYTES, 0, 0))

    assert read_place(page) is None
    assert os.fstat(page).st_size == PAGE_BYTES


def test_loop_that_turns_beats_and_a_blocked_one_does_not(page: int) -> None:
    beats = Beats(page)

    async def watch() -> tuple[float, float, float]:
        beats.start()
        first = read(page)[0]
        deadline = time.monotonic() + 5
        while read(page)[0] == first and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        turned = read(page)[0]
        time.sleep(2 * BEAT_S)
        return first, turned, read(page)[0]

    first, turned, blocked = asyncio.run(watch())

    assert turned > first
    assert blocked == turned


def test_reader_never_sees_half_of_a_number(page: int) -> None:
    read_while_written(page, 300_000)


def read_while_written(page: int, times: int) -> None:
    """Read a number so often while another process writes it all the time."""
    beats = Beats(page)
    pid = os.fork()
    if pid == 0:
        while True:
            beats.enter(Stage.RUNNING)
            beats.settled(1)
    doubles = memoryview(mmap.mmap(page, PAGE_BYTES)).cast("d")
    start = time.monotonic()
    lowest = min(doubles[0] for _ in range(times))
    os.kill(pid, 9)
    os.waitpid(pid, 0)

    assert start - 1.0 < lowest <= time.monotonic()
