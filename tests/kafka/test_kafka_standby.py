"""Standbys: a host follows what another one has, and takes it over with only a tail to read."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from kafka_clients import unique

from streamd.agentproc.broker import Checkpoint, Subscription, TableChange
from streamd.agentproc.broker.kafka import KafkaBroker
from streamd.agentproc.kafka.session import KafkaSession
from streamd.config import resolve

GUARANTEES = ["at_least_once", "exactly_once"]
WITHIN_S = 60.0
KEYS = 3000

Rows = dict[bytes, bytes]


class Host:
    """One process of an app on a host of its own: holds what its session gains."""

    def __init__(self, app: "App", name: str) -> None:
        self._app = app
        self.store = app.place / name
        broker = KafkaBroker(app.settings, [], name, stores=self.store)
        sub = Subscription(app.id, "g", 0, 1, {"a": [f"{app.id}-in"]}, {"table": 2})
        self.session: KafkaSession = broker.session(sub, self)
        self.parts: dict[int, Rows] = {}

    async def open(self) -> "Host":
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
            "processing_guarantee": guarantee, "broker_session_timeout": 2.0,
            "table_standby_replicas": 1,
        }  # fmt: skip
        self.settings = resolve(options, {}, None, {})


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not is_so():
            await asyncio.sleep(0.02)


def key(number: int) -> bytes:
    return b"%d" % number


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamd.agentproc.kafka.members.LOOK_S", 0.3)


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_who_takes_over_reads_only_what_its_copy_had_not_read(
    kafka: str, tmp_path: Path, guarantee: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def taken() -> list[tuple[int, int]]:
        """Rows from stores, and records read, of each take-over so far."""
        found = re.findall(r"over: (\d+) rows from stores, (\d+) records", caplog.text)
        return [(int(stored), int(read)) for stored, read in found]

    async def main() -> None:
        app = App(kafka, tmp_path, guarantee)
        a = await Host(app, "a").open()
        for partition in (0, 1):
            await a.write(partition, {key(n): b"1" for n in range(KEYS)})
            await a.write(partition, {key(n): None for n in range(100)})
        expected = {key(n): b"1" for n in range(100, KEYS)}
        b = await Host(app, "b").open()
        await until(lambda: len(a.parts) == len(b.parts) == 1)
        [mine], [its] = a.parts, b.parts
        await until(lambda: b.follows(mine) and a.follows(its))
        changed = {key(n): b"2" for n in range(50, 150)}
        await a.write(mine, {**changed})
        expected |= changed
        await until(lambda: b.follows(mine))
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
        assert taken()[before] == (len(expected), len(tail))
        await a.session.close()
        await b.session.close()

    asyncio.run(main())
