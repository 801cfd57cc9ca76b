"""The process `log`: what it serves, what it keeps in order, what it refuses to start on."""

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from log_tree import (
    Log,
    ended_at_last,
    fill,
    running_log,
    start_counter,
    wait_until,
    wrong_counts,
)

from streamd.agentproc.broker import TP
from streamd.agentproc.broker import client as client_module
from streamd.agentproc.broker.ballast import Ballast
from streamd.agentproc.broker.client import open_log
from streamd.agentproc.broker.reset import reset
from streamd.errors import Busy, StreamdError
from streamd.instance import Folder
from streamd.wire import (
    AgentInfo,
    Declare,
    Done,
    GroupInfo,
    LogState,
    Note,
    OutRecord,
    TopicInfo,
)

POSTS = TopicInfo("posts", 2, False, None, "", "")


@pytest.fixture
def datadir(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "run")
    made.make()
    return made


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await body()

    asyncio.run(main())


def records(count: int, first: int = 0) -> list[OutRecord]:
    return [OutRecord("posts", None, b"post %06d" % n) for n in range(first, first + count)]


async def started(log: Log) -> None:
    await log.ready()
    assert isinstance(await log.link.request(Declare([POSTS], [], [])), Done)


def test_what_is_sent_comes_back_and_the_topics_say_how_much(
    datadir: Path, folder: Folder
) -> None:
    async def body() -> None:
        async with running_log(datadir, folder) as log:
            await started(log)
            async with open_log(folder, datadir) as client:
                rich = OutRecord("posts", b"k", b"v", 1, 12.5, [("h", b"x")])

                placed = await client.append([rich, *records(4)])
                fetched = await client.fetch("posts", 1, 0, 1, 0)
                topics = await client.topics()

            assert placed == [(1, 0), (0, 0), (1, 1), (0, 1), (1, 2)]
            assert (fetched[0].offset, fetched[0].key, fetched[0].value) == (0, b"k", b"v")
            assert (fetched[0].timestamp, fetched[0].headers) == (12.5, [("h", b"x")])
            assert [(topic.name, topic.ends) for topic in topics] == [
                ("posts", [(0, 2), (0, 3)])
            ]
            assert topics[0].size_bytes > 0

    run(body)


def test_a_fetch_waits_for_the_first_record_but_no_longer_than_told(
    datadir: Path, folder: Folder
) -> None:
    async def body() -> None:
        async with running_log(datadir, folder) as log:
            await started(log)
            async with open_log(folder, datadir) as client:
                at = time.monotonic()
                assert await client.fetch("posts", 0, 0, 10, 0.2) == []
                assert 0.15 < time.monotonic() - at < 2

                waiting = asyncio.create_task(client.fetch("posts", 0, 0, 10, 20))
                await client.append(records(1))
                fetched = await waiting

            assert [record.value for record in fetched] == [b"post 000000"]

    run(body)


def test_many_senders_share_a_transaction_and_each_gets_its_own_answer(
    datadir: Path, folder: Folder
) -> None:
    async def body() -> None:
        async with running_log(datadir, folder) as log:
            await started(log)
            async with open_log(folder, datadir) as client:
                wrong = OutRecord("posts", None, b"", partition=9)
                answers = await asyncio.gather(
                    *(client.append(records(2, first=n)) for n in range(50)),
                    client.append([wrong]),
                    *(client.append(records(2, first=n)) for n in range(50)),
                    return_exceptions=True,
                )

        failed = [answer for answer in answers if isinstance(answer, StreamdError)]
        placed = [at for answer in answers if isinstance(answer, list) for at in answer]
        assert [error.exit_code for error in failed] == [2]
        assert sorted(placed) == [(p, offset) for p in range(2) for offset in range(100)]

    run(body)


def test_a_send_larger_than_a_frame_arrives_whole(datadir: Path, folder: Folder) -> None:
    async def body() -> None:
        async with running_log(datadir, folder) as log:
            await started(log)
            async with open_log(folder, datadir) as client:
                large = [OutRecord("posts", None, bytes(1 << 20), 0) for _ in range(20)]

                placed = await client.append(large)

                assert placed == [(0, offset) for offset in range(20)]
                fetched = await client.fetch("posts", 0, 0, 100, 0)
                assert 1 <= len(fetched) < 16

    run(body)


def test_another_number_of_partitions_is_refused_with_a_cure(
    datadir: Path, folder: Folder
) -> None:
    async def body() -> None:
        async with running_log(datadir, folder) as log:
            await started(log)
            more = TopicInfo("posts", 3, False, None, "", "")

            with pytest.raises(StreamdError, match="has 2 partitions in the log") as caught:
                await log.link.request(Declare([more], [], []))

            assert caught.value.exit_code == 78
            assert "2 partitions" in str(caught.value.remedy)

    run(body)


def test_an_unknown_topic_is_told_with_the_known_ones(datadir: Path, folder: Folder) -> None:
    async def body() -> None:
        async with running_log(datadir, folder) as log:
            await started(log)
            async with open_log(folder, datadir) as client:
                with pytest.raises(StreamdError, match="no topic 'psots': it has posts"):
                    await client.fetch("psots", 0, 0, 1, 0)
                with pytest.raises(StreamdError, match="partitions 0 to 1, not 5"):
                    await client.fetch("posts", 5, 0, 1, 0)

    run(body)


def test_term_empties_the_wal_and_ends_with_0(datadir: Path, folder: Folder) -> None:
    async def body() -> None:
        async with running_log(datadir, folder) as log:
            await started(log)
            async with open_log(folder, datadir) as client:
                await client.append(records(100))
            log.process.send_signal(signal.SIGTERM)

            assert await log.ended() == 0
            assert (datadir / "log.db-wal").stat().st_size == 0

    run(body)


def test_lag_is_told_by_agent_and_partition(datadir: Path, folder: Folder) -> None:
    reader = AgentInfo("proj.read", "read", ["posts"], 1, "retry", "")

    async def body() -> None:
        async with running_log(datadir, folder) as log:
            await log.ready()
            groups = [GroupInfo("read", [reader], [], 1, "")]
            assert isinstance(await log.link.request(Declare([POSTS], [], groups)), Done)
            async with open_log(folder, datadir) as client:
                await client.append([OutRecord("posts", b"k", b"v", 1), *records(2)])
                through_the_socket = await client.lag()
            log.process.send_signal(signal.SIGTERM)
            await log.ended()
        async with open_log(folder, datadir) as client:
            in_the_file = await client.lag()

        assert through_the_socket == in_the_file
        assert [(row.agent, row.partition, row.position, row.end, row.behind)
                for row in in_the_file] == [
            ("proj.read", 0, None, 1, 1), ("proj.read", 1, None, 2, 2),
        ]  # fmt: skip

    run(body)


def test_quit_ends_at_once_and_an_orphan_too(datadir: Path, folder: Folder) -> None:
    async def body() -> None:
        async with running_log(datadir, folder) as log:
            await log.ready()
            log.process.send_signal(signal.SIGINT)
            log.process.send_signal(signal.SIGQUIT)
            assert await log.ended() == 3
        async with running_log(datadir, folder) as log:
            await log.ready()
            log.link.close()
            assert await log.ended() == 70

    run(body)


def test_the_wal_is_copied_each_second_and_emptied_when_idle(
    datadir: Path, folder: Folder
) -> None:
    async def body() -> None:
        async with running_log(datadir, folder) as log:
            await started(log)
            async with open_log(folder, datadir) as client:
                await client.append(
                    [OutRecord("posts", None, bytes(1000)) for _ in range(1000)]
                )
                await log.got(LogState, lambda state: state.wal_bytes > 1_000_000)
                log.messages.clear()
                await log.got(LogState, lambda state: state.wal_bytes == 0)
            assert (datadir / "log.db").stat().st_size > 1_000_000

    run(body)


def test_who_keeps_the_turn_is_told_to_the_master(datadir: Path, folder: Folder) -> None:
    async def body() -> None:
        fill(datadir, 300)
        async with running_log(datadir, folder) as log:
            await log.ready()
            stopped = start_counter(datadir, failpoint="commit.after-begin:2:stop")
            with ended_at_last(stopped):
                state = await log.got(LogState, lambda state: state.holder_s > 0.5)
                assert state.holder_pid == stopped.pid
            log.messages.clear()
            await log.got(LogState, lambda state: state.holder_pid == 0)

    run(body)


# Without a master.


def test_without_a_master_the_file_is_opened_under_the_lock(
    datadir: Path, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "START_S", 0.1)

    async def body() -> None:
        async with open_log(folder, datadir / "fresh") as client:
            assert await client.append([OutRecord("posts", b"k", b"v", 0)]) == [(0, 0)]
            with pytest.raises(Busy, match="in use by another process"):
                async with open_log(folder, datadir / "fresh"):
                    raise AssertionError
        async with open_log(folder, datadir / "fresh") as client:
            assert (await client.topics())[0].ends[0] == (0, 1)
            assert [r.value for r in await client.fetch("posts", 0, 0, 9, 0)] == [b"v"]

    run(body)


def test_a_client_waits_for_a_log_that_is_about_to_listen(
    datadir: Path, folder: Folder
) -> None:
    async def body() -> None:
        # The master has the lock before its log listens.
        lock = os.open(datadir / "lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)

        async def ask() -> int:
            async with open_log(folder, datadir) as client:
                return len(await client.topics())

        asking = asyncio.create_task(ask())
        async with running_log(datadir, folder) as log:
            await started(log)
            assert await asking in {0, 1}
        os.close(lock)

    run(body)


def test_reset_forgets_tables_and_positions_and_says_from_where(
    datadir: Path, folder: Folder
) -> None:
    words = fill(datadir, 200)
    counter = start_counter(datadir)
    with ended_at_last(counter):
        assert counter.wait(20) == 0

    assert reset(datadir, ["table"], ["other"]) == {}
    assert reset(datadir, ["table", "unknown"], ["count"]) == {
        TP("words", 0): 0,
        TP("words", 1): 0,
    }

    assert len(wrong_counts(datadir, words)) >= 2
    counter = start_counter(datadir)
    with ended_at_last(counter):
        assert counter.wait(20) == 0
    # The outputs are there twice now; the tables are what they were.
    assert not [text for text in wrong_counts(datadir, words) if text.startswith("table of")]


# Damage.


async def acknowledge(datadir: Path, folder: Folder, count: int, *, warm: bool) -> None:
    """Append records that are acknowledged; then end, with a full WAL or an empty one."""
    async with running_log(datadir, folder) as log:
        await started(log)
        async with open_log(folder, datadir) as client:
            for n in range(count):
                await client.append(records(1, first=n))
        if warm:
            log.process.terminate()
            assert await log.ended() == 0


def cut_wal(datadir: Path) -> None:
    wal = datadir / "log.db-wal"
    os.truncate(wal, wal.stat().st_size // 2)


def flip_wal(datadir: Path) -> None:
    flip(datadir / "log.db-wal", (datadir / "log.db-wal").read_bytes().rindex(b"post 000020"))


def delete_wal(datadir: Path) -> None:
    (datadir / "log.db-wal").unlink()
    (datadir / "log.db-shm").unlink()


def delete_log(datadir: Path) -> None:
    for path in datadir.glob("log.db*"):
        path.unlink()


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("damage", [cut_wal, flip_wal, delete_wal, delete_log])
def test_acknowledged_records_that_are_gone_are_told_at_start(
    datadir: Path, folder: Folder, damage: Callable[[Path], None]
) -> None:
    async def body() -> None:
        await acknowledge(datadir, folder, 40, warm=False)
        damage(datadir)

        async with running_log(datadir, folder) as log:
            failing = await log.failed()

        assert failing.exit_code == 78
        assert "lost events that were acknowledged" in failing.message
        assert any("acknowledged was 20" in line for line in failing.seen)
        assert "acknowledged" in str(failing.remedy)

    run(body)


def test_a_killed_log_loses_nothing_that_it_acknowledged(datadir: Path, folder: Folder) -> None:
    async def body() -> None:
        for _ in range(3):
            await acknowledge(datadir, folder, 20, warm=False)

        async with running_log(datadir, folder) as log:
            await log.ready()
            async with open_log(folder, datadir) as client:
                (topic,) = await client.topics()
        assert [end for _, end in topic.ends] == [30, 30]

    run(body)


def test_a_flipped_byte_in_the_newest_pack_is_told_at_start(
    datadir: Path, folder: Folder
) -> None:
    async def body() -> None:
        await acknowledge(datadir, folder, 4, warm=True)
        path = datadir / "log.db"
        flip(path, path.read_bytes().rindex(b"post 000003"))

        async with running_log(datadir, folder) as log:
            failing = await log.failed()

        assert failing.exit_code == 78
        assert "posts[1]@1" in failing.message
        assert "checksum" in failing.message

    run(body)


def test_a_flipped_byte_in_an_old_pack_is_told_when_it_is_read(
    datadir: Path, folder: Folder
) -> None:
    async def body() -> None:
        await acknowledge(datadir, folder, 6, warm=True)
        path = datadir / "log.db"
        flip(path, path.read_bytes().rindex(b"post 000000"))

        async with running_log(datadir, folder) as log:
            await log.ready()
            async with open_log(folder, datadir) as client:
                with pytest.raises(StreamdError, match=r"posts\[0\]@0 .* checksum"):
                    await client.fetch("posts", 0, 0, 10, 0)
                assert len(await client.fetch("posts", 0, 1, 10, 0)) == 2

    run(body)


def test_garbage_in_a_page_is_told_at_start(datadir: Path, folder: Folder) -> None:
    async def body() -> None:
        await acknowledge(datadir, folder, 4, warm=True)
        with (datadir / "log.db").open("r+b") as file:
            file.seek(4096 * 3)
            file.write(os.urandom(4096))

        async with running_log(datadir, folder) as log:
            failing = await log.failed()

        assert failing.exit_code == 78
        assert "is damaged" in failing.message
        assert failing.remedy

    run(body)


def test_a_newer_format_is_told_at_start(datadir: Path, folder: Folder) -> None:
    async def body() -> None:
        await acknowledge(datadir, folder, 1, warm=True)
        # The user version, at its place in SQLite's header.
        with (datadir / "log.db").open("r+b") as file:
            file.seek(60)
            file.write((99).to_bytes(4, "big"))
        before = (datadir / "log.db").read_bytes()

        async with running_log(datadir, folder) as log:
            failing = await log.failed()

        assert failing.exit_code == 78
        assert "has format 99" in failing.message
        assert (datadir / "log.db").read_bytes() == before

    run(body)


@pytest.mark.parametrize("name", ["trim.before-commit", "checkpoint.before-truncate"])
def test_a_log_that_is_killed_in_its_housekeeping_goes_on_with_it(
    datadir: Path, folder: Folder, name: str
) -> None:
    async def body() -> None:
        old = TopicInfo("posts", 2, False, 1.0, "", "")
        armed = {"STREAMD_TEST": "1", "STREAMD_FAILPOINT": f"{name}:1:kill"}
        async with running_log(datadir, folder, **armed) as log:
            await log.ready()
            await log.link.request(Declare([old], [], []))
            async with open_log(folder, datadir) as client:
                await client.append([OutRecord("posts", None, b"old", 0, timestamp=5.0)])
                await client.append([OutRecord("posts", None, b"new", 0)] * 3)
            assert await log.ended() == -signal.SIGKILL

        async with running_log(datadir, folder) as log:
            await log.ready()
            async with open_log(folder, datadir) as client:

                async def low() -> tuple[int, int]:
                    return (await client.topics())[0].ends[0]

                while (await low())[0] < 1:
                    await asyncio.sleep(0.02)
                low_, end = await low()
        assert (low_ >= 1, end) == (True, 4)

    run(body)


# A full disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_on_a_full_disk_sends_are_refused_until_there_is_space(
    small_disk: Path, folder: Folder
) -> None:
    async def body() -> None:
        async with running_log(small_disk, folder) as log:
            await started(log)
            assert Ballast(small_disk).held_bytes > 2_000_000
            async with open_log(folder, small_disk) as client:
                large = [OutRecord("posts", None, bytes(250_000), 0) for _ in range(4)]
                appended = 0
                filler = small_disk / "filler"
                with filler.open("wb") as file, contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(100_000))
                        file.flush()

                with pytest.raises(StreamdError, match="is full") as caught:
                    while appended < 1000:
                        await client.append(large)
                        appended += 4
                await log.got(Note, lambda note: note.level == "ERROR")
                await asyncio.to_thread(wait_until, lambda: Ballast(small_disk).held_bytes == 0)
                filler.unlink()
                await log.got(Note, lambda note: "can be written again" in note.text)
                placed = await client.append(large)

        assert caught.value.exit_code == 69
        assert placed == [(0, offset) for offset in range(appended, appended + 4)]
        assert Ballast(small_disk).held_bytes > 0

    run(body)
