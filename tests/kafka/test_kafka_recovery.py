"""Recovery from a local store and the changelog's tail; any other store is made anew."""

import asyncio
import fcntl
import logging
import os
import re
import shutil
import signal
import threading
import urllib.error
import urllib.request
from contextlib import closing
from email.message import Message
from pathlib import Path

import apsw
import pytest
from kafka_clients import unique
from kafka_hosts import eventually, hosts

from streamd.agentproc.broker import Checkpoint, Subscription, TableChange
from streamd.agentproc.broker.kafka import KafkaBroker
from streamd.agentproc.kafka.session import KafkaSession
from streamd.config import resolve

GUARANTEES = ["at_least_once", "exactly_once"]


class App:
    """An app with one table in one partition, `sessions` of which are opened by hand."""

    def __init__(self, kafka: str, place: Path, guarantee: str = "at_least_once") -> None:
        self.id = unique("app")
        options = {
            "id": self.id, "broker": f"kafka://{kafka}", "topic_partitions": 1,
            "processing_guarantee": guarantee,
        }  # fmt: skip
        self.settings = resolve(options, {}, None, {})
        self.store = place / "store"

    @property
    def file(self) -> Path:
        return self.store / f"{self.id}-table-changes-0.db"

    async def open(self, store: Path | None = None) -> KafkaSession:
        broker = KafkaBroker(self.settings, [], "host", stores=store or self.store)
        sub = Subscription(self.id, "g", 0, 1, {"a": [f"{self.id}-in"]}, {"table": 1})
        session = broker.session(sub)
        await session.open()
        return session

    async def rows(self, store: Path | None = None) -> dict[bytes, bytes]:
        """What a process that starts and stops warm finds."""
        session = await self.open(store)
        found = dict(await session.load("table", 0))
        await session.close()
        return found

    def put(self, **values: bytes) -> None:
        """Change what the store holds behind its back."""
        with closing(apsw.Connection(str(self.file))) as db:
            for key, value in values.items():
                db.execute("UPDATE rows SET v = ? WHERE k = ?", (value, key.encode()))


def stored(file: Path) -> dict[bytes, bytes]:
    """What a store holds that nobody has."""
    with closing(apsw.Connection(str(file))) as db:
        return {k: v for k, v in db.execute("SELECT k, v FROM rows")}


def change(**values: bytes | None) -> Checkpoint:
    rows = [(key.encode(), value) for key, value in values.items()]
    return Checkpoint(changes=[TableChange("table", 0, rows)])


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_a_restart_reads_the_store_and_of_the_changelog_only_what_came_since(
    kafka: str, tmp_path: Path, guarantee: str
) -> None:
    async def main() -> None:
        app = App(kafka, tmp_path, guarantee)
        first = await app.open()
        await first.commit(change(a=b"1", b=b"1", c=b"1"))
        await first.commit(change(a=b"2", c=None))
        await first.close()
        app.put(b=b"only in the store")

        second = await app.open()
        found = dict(await second.load("table", 0))
        await second.commit(change(a=b"3", d=b"1"))
        shutil.copytree(app.store, tmp_path / "crash")
        third = await app.rows(tmp_path / "crash")
        await second.close()

        assert found == {b"a": b"2", b"b": b"only in the store"}
        assert third == {b"a": b"3", b"b": b"only in the store", b"d": b"1"}

    asyncio.run(main())


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_a_store_that_is_wiped_or_damaged_is_rebuilt_from_the_changelog(
    kafka: str, tmp_path: Path, guarantee: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        app = App(kafka, tmp_path, guarantee)
        session = await app.open()
        await session.commit(change(a=b"1", b=b"1"))
        await session.commit(change(b=b"2"))
        await session.close()
        assert caplog.text.count("made anew") == 0

        app.put(b=b"wrong")
        shutil.rmtree(app.store)
        assert await app.rows() == {b"a": b"1", b"b": b"2"}

        app.file.write_bytes(os.urandom(10_000))
        assert await app.rows() == {b"a": b"1", b"b": b"2"}
        assert caplog.text.count("made anew: it cannot be read") == 1

        app.put(a=b"from the store")  # which was made again
        assert await app.rows() == {b"a": b"from the store", b"b": b"2"}

    asyncio.run(main())


def test_a_store_of_another_app_is_rebuilt(
    kafka: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        one, other = App(kafka, tmp_path / "one"), App(kafka, tmp_path / "other")
        for app, value in (one, b"1"), (other, b"2"):
            session = await app.open()
            await session.commit(change(a=value))
            await session.close()
        shutil.copy(one.file, other.file)

        assert await other.rows() == {b"a": b"2"}
        assert caplog.text.count("was made anew since") == 1

    asyncio.run(main())


def test_what_an_owner_writes_after_it_was_replaced_is_in_no_table(
    kafka: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        app = App(kafka, tmp_path)
        frozen = await app.open()
        await frozen.commit(change(a=b"1", b=b"1"))
        assert frozen._poller is not None and frozen._local is not None
        # It hears nothing of its group any more, as a process that was stopped.
        frozen._poller.end(leave=False)
        await asyncio.to_thread(frozen._poller.join)

        successor = await app.open(tmp_path / "elsewhere")
        await frozen.commit(change(a=b"late", c=b"late"))
        await frozen._local.save()  # the successor has written nothing: it cannot know
        await frozen.close()
        await successor.close()
        assert stored(app.file)[b"a"] == b"late"
        shutil.copytree(app.store, tmp_path / "its")

        # By its own store, while its successor's claim is the last:
        assert await app.rows() == {b"a": b"1", b"b": b"1"}
        assert caplog.text.count("by an owner that was replaced") == 1
        # by its successor's; and by its own, once what it wrote is repaired.
        assert await app.rows(tmp_path / "elsewhere") == {b"a": b"1", b"b": b"1"}
        assert await app.rows(tmp_path / "its") == {b"a": b"1", b"b": b"1"}

    asyncio.run(main())


def test_without_a_store_that_another_process_has_all_is_read_from_the_changelog(
    kafka: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        app = App(kafka, tmp_path)
        session = await app.open()
        await session.commit(change(a=b"1"))
        await session.close()
        app.put(a=b"from the store")
        lock = os.open(app.file.with_suffix(".lock"), os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)

        assert await app.rows() == {b"a": b"1"}
        assert caplog.text.count("is recovered without a store") == 1

        os.close(lock)
        assert await app.rows() == {b"a": b"from the store"}

    asyncio.run(main())


def test_stores_are_written_while_the_app_runs(
    kafka: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamd.agentproc.kafka.storing.SAVE_S", 0.1)

    async def main() -> None:
        app = App(kafka, tmp_path)
        session = await app.open()
        await session.commit(change(a=b"1"))
        async with asyncio.timeout(30):
            while not await asyncio.to_thread(holds, b"1"):
                await asyncio.sleep(0.05)
            await session.commit(change(a=b"2"))
            while not await asyncio.to_thread(holds, b"2"):
                await asyncio.sleep(0.05)
        await session.close()

    def holds(value: bytes) -> bool:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tmp_path / "store", copy)
        try:
            return value in stored(next(copy.glob("*.db"))).values()
        except apsw.Error as error:
            logging.info("the copy is of a moment when it was written: %s", error)
            return False

    asyncio.run(main())


COUNTS = """
import streamd

app = streamd.App("ID", broker="kafka://BROKER", topic_partitions=2)
words = app.topic("ID-words", value_type=str)
counts = app.Table("counts", default=int)

@app.agent(words)
async def count(words):
    async for word in words:
        counts[word] += 1
"""


def test_while_partitions_are_recovered_nothing_is_ready_and_look_ups_are_told_to_wait(
    kafka: str,
) -> None:
    with hosts(COUNTS.replace("ID", unique("app")).replace("BROKER", kafka), 1) as (host,):
        host.environment |= {
            "STREAMD_TEST": "1", "STREAMD_FAILPOINT": "kafka.before-restore:1:stop",
        }  # fmt: skip
        start = threading.Thread(target=host.start)
        start.start()
        reason = "partition 1 of count is recovering"
        eventually(lambda: host.web and reason in host.get("/readyz")[1]["reasons"])

        status, headers = answer(f"{host.web}/table/counts/word/")
        assert (status, headers.get("retry-after")) == (503, "1")

        os.kill(host.pid("count#0"), signal.SIGCONT)
        start.join(60)
        eventually(lambda: host.get("/readyz")[0] == 200)
        assert answer(f"{host.web}/table/counts/word/")[0] == 200


def answer(url: str) -> tuple[int, Message]:
    """Status and headers of a page."""
    try:
        with urllib.request.urlopen(url, timeout=20) as reply:
            return int(reply.status), reply.headers
    except urllib.error.HTTPError as error:
        return int(error.code), error.headers


def test_a_long_recovery_says_how_far_it_is(
    kafka: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamd.agentproc.kafka.recovery.PROGRESS_S", 0.0)
    said: list[str] = []

    async def main() -> None:
        app = App(kafka, tmp_path)
        session = await app.open()
        await session.commit(change(a=b"1", b=b"1"))
        monkeypatch.setattr(type(session), "_says", lambda _, text: said.append(text))
        await session.close()
        shutil.rmtree(app.store)
        await app.rows()

    asyncio.run(main())

    assert any(
        re.fullmatch(r"recovers rows: 100 %, \d+ k rows/s, 0 s left", text) for text in said
    ), said
