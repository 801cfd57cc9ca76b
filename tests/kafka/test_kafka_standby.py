"""Standbys: a host follows what another one has, and takes it over with only a tail to read."""

import asyncio
import re
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from confluent_kafka import Producer
from kafka_clients import unique
from kafka_hosts import Feeder, Host, Trace, eventually, hosts, start_all, traced_app

from streamd.agentproc.broker import Checkpoint, Subscription, TableChange
from streamd.agentproc.broker.kafka import KafkaBroker
from streamd.agentproc.kafka.session import KafkaSession
from streamd.config import resolve

WITHIN_S = 60.0
SESSION_S = 2.0
KEYS = 3000

Rows = dict[bytes, bytes]


class Member:
    """One process of an app on a host of its own: holds what its session gains."""

    def __init__(self, app: "App", name: str) -> None:
        self._app = app
        self.store = app.place / name
        broker = KafkaBroker(app.settings, [], name, stores=self.store)
        sub = Subscription(app.id, "g", 0, 1, {"a": [f"{app.id}-in"]}, {"table": 2})
        self.session: KafkaSession = broker.session(sub, self)
        self.parts: dict[int, Rows] = {}

    async def open(self) -> "Member":
        await self.session.open()
        await self.gain(self.session.partitions)
        return self

    def recovers(self) -> None:
        """Nobody asks."""

    def has_gained(self) -> None:
        """Nobody asks."""

    async def gain(self, partitions: list[int]) -> None:
        for partition in partitions:
            self.parts[partition] = dict(await self.session.load("table", partition))

    async def lose(self, partitions: list[int], *, gone: bool) -> None:
        for partition in partitions:
            del self.parts[partition]

    async def write(self, partition: int, rows: dict[bytes, bytes | None]) -> None:
        """One checkpoint."""
        await self.session.commit(
            Checkpoint(changes=[TableChange("table", partition, list(rows.items()))])
        )

    def follows(self, partition: int) -> bool:
        """Has it all of a partition that the other host has?"""
        return any(
            (row.partition, row.behind) == (partition, 0) for row in self.session.standby()
        )

    async def die(self) -> None:
        """Be silent from now on, as a host without power."""
        poller, follower = self.session._poller, self.session._standby
        assert poller is not None and follower is not None
        poller.end(leave=False)
        await asyncio.to_thread(poller.join)
        follower.end()
        await asyncio.to_thread(follower.join)


class App:
    """An app with one table in two partitions."""

    def __init__(self, kafka: str, place: Path, guarantee: str) -> None:
        self.id = unique("app")
        self.place = place
        options = {
            "id": self.id, "broker": f"kafka://{kafka}", "topic_partitions": 2,
            "processing_guarantee": guarantee, "broker_session_timeout": 1.0,
            "table_standby_replicas": 1,
        }  # fmt: skip
        self.settings = resolve(options, {}, None, {})


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not is_so():
            await asyncio.sleep(0.02)


def spoil(store: Path, id: str) -> None:
    """Files that are no stores, in the places of both partitions."""
    store.mkdir()
    for partition in (0, 1):
        (store / f"{id}-table-changes-{partition}.db").write_bytes(b"no database" * 1000)


def key(number: int) -> bytes:
    return b"%d" % number


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamd.agentproc.kafka.members.LOOK_S", 0.3)
    monkeypatch.setattr("streamd.agentproc.kafka.standby.TELL_S", 0.05)


def test_who_takes_over_reads_only_what_its_copy_had_not_read(
    kafka: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def taken() -> list[tuple[int, int]]:
        """Rows from stores, and records read, of each take-over so far."""
        found = re.findall(r"over: (\d+) rows from stores, (\d+) records", caplog.text)
        return [(int(stored), int(read)) for stored, read in found]

    async def main() -> None:
        app = App(kafka, tmp_path, "exactly_once")
        a = await Member(app, "a").open()
        for partition in (0, 1):
            await a.write(partition, {key(n): b"1" for n in range(KEYS)})
            await a.write(partition, {key(n): None for n in range(100)})
        expected = {key(n): b"1" for n in range(100, KEYS)}
        spoil(app.place / "b", app.id)
        b = await Member(app, "b").open()
        await until(lambda: len(a.parts) == len(b.parts) == 1)
        [mine], [its] = a.parts, b.parts
        await until(lambda: b.follows(mine) and a.follows(its))
        changed = {key(n): b"2" for n in range(50, 150)}
        await a.write(mine, {**changed})
        expected |= changed
        assert set(b.parts) == {its}

        # Its copy is left behind: nobody follows any more.
        assert b.session._standby is not None
        b.session._standby.end()
        await asyncio.to_thread(b.session._standby.join)
        tail = {key(n): b"3" for n in range(20)}
        await a.write(mine, {**tail})
        await a.die()
        before = len(taken())
        await until(lambda: mine in b.parts)

        assert b.parts[mine] == expected | tail
        stored, read = taken()[before]
        assert stored > KEYS * 0.9
        assert len(tail) <= read <= len(changed) + len(tail)
        assert caplog.text.count("made anew: it cannot be read") == 2
        await a.session.close()
        await b.session.close()

    asyncio.run(main())


def test_a_host_that_dies_is_followed_by_the_other_one_and_nothing_is_lost_or_doubled(
    kafka: str, tmp_path: Path
) -> None:
    id = unique("standby")
    trace = Trace(tmp_path / "trace")
    source = traced_app(kafka, id, tmp_path / "trace").replace(
        "topic_partitions=4", "topic_partitions=4, table_standby_replicas=1"
    )
    keys = 8000
    with hosts(source, 2) as (a, b):
        for host in (a, b):
            host.environment["STREAMD_BROKER_SESSION_TIMEOUT"] = str(SESSION_S)
        start_all((a, b))
        eventually(lambda: [len(host.partitions("count")) for host in (a, b)] == [2, 2])
        fill(kafka, f"{id}-words", keys)
        eventually(lambda: held(a) + held(b) == keys and follows(a) == follows(b) == 2)
        assert re.search(r"counts +count +\S+( \d+)? +4 +2 +0 ", b.command("tables").stdout)
        assert "standby of 2 partitions, 0 behind" in b.command("status").stdout
        assert "streamd_standby_behind_records{" in metrics(b)
        lost = a.partitions("count")

        with Feeder(kafka, f"{id}-words") as feeder:
            eventually(lambda: min(feeder.counts.values()) > 1)
            a.crash()
            died_at = time.monotonic()
            eventually(lambda: {e.partition for e in trace.events(died_at + 0.5)} >= set(lost))
        eventually(lambda: held(b) == keys + len(feeder.counts))
        eventually(lambda: answers(b, feeder.counts) == feeder.counts)
        taken = re.findall(r"over: ([1-9]\d*) rows from stores, (\d+) records", b.log())
        assert len(taken) in (1, 2), taken
        stored, read = (sum(map(int, counts)) for counts in zip(*taken, strict=True))
        assert stored > keys / 3
        assert read < keys / 10


def fill(kafka: str, topic: str, keys: int) -> None:
    """Count so many words once."""
    producer = Producer({"bootstrap.servers": kafka, "partitioner": "murmur2_random"})
    for number in range(keys):
        producer.produce(topic, f'"k{number}"'.encode(), key=f"k{number}")
    assert producer.flush(60) == 0


def answers(host: Host, words: Iterable[str]) -> dict[str, object]:
    """What a host's pages say of each word."""
    replies = {word: host.get(f"/count/{word}/", host.web) for word in words}
    return {word: body.get("count", status) for word, (status, body) in replies.items()}


def held(host: Host) -> int:
    return sum(int(row["keys"]) for row in host.status().get("tables", []))


def follows(host: Host) -> int:
    """How many partitions a host has all of that the other one has."""
    return sum(row["behind"] == 0 for row in host.status().get("standby", []))


def metrics(host: Host) -> str:
    with urllib.request.urlopen(f"{host.web}/metrics", timeout=20) as reply:
        return str(reply.read().decode())
