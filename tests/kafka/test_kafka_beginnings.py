"""Where a group begins that has never run, and what it does not see."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from kafka_clients import make_topic, unique, write

from streamd.agentproc.broker import TP, Checkpoint, Subscription
from streamd.agentproc.broker.kafka import KafkaBroker
from streamd.agentproc.kafka.packs import offset_of, position_of
from streamd.agentproc.kafka.session import KafkaSession
from streamd.config import resolve
from streamd.errors import ConfigError
from streamd.wire import TopicInfo

AGENT = "proj.count"


class Reading:
    """A group of one agent that reads one plain topic."""

    def __init__(self, bootstrap: str, tables: dict[str, int] | None = None) -> None:
        self.bootstrap = bootstrap
        self.id = unique("app")
        self.topic = make_topic(bootstrap)
        self.tp = TP(self.topic, 0)
        self.topics = [self.topic]
        self.packed = False
        self.tables = tables or {}

    def write(self, count: int) -> None:
        write(self.bootstrap, self.topic, [b"%d" % n for n in range(count)])

    def in_session(
        self, body: Callable[[KafkaSession], Awaitable[Any]], reset: str = "earliest"
    ) -> Any:
        """What `body` says of an open session, which is left as a process that ends does."""

        async def main() -> Any:
            keywords = {"id": self.id, "broker": f"kafka://{self.bootstrap}"}
            info = TopicInfo(self.topic, 1, self.packed, None, "", "", packed=self.packed)
            broker = KafkaBroker(resolve(keywords, {}, None, {}), [info], "host")
            session = broker.session(
                Subscription(
                    self.id, "g", 0, 1, {AGENT: self.topics}, self.tables,
                    {self.topic: reset},
                )
            )  # fmt: skip
            try:
                async with asyncio.timeout(60):
                    await session.open()
                    return await body(session)
            finally:
                await session.close(leave=True)

        return asyncio.run(main())

    def begins(self, reset: str = "earliest") -> int:
        """The offset that the agent reads on from."""

        async def position(session: KafkaSession) -> int:
            return offset_of(session.positions[AGENT, self.tp])

        return int(self.in_session(position, reset))

    def commit_as(self, group: str, offset: int) -> None:
        """Commit as another program's consumer group."""
        consumer = Consumer({"bootstrap.servers": self.bootstrap, "group.id": group})
        consumer.commit(offsets=[TopicPartition(self.topic, 0, offset)], asynchronous=False)
        consumer.close()


@pytest.mark.parametrize(("reset", "offset"), [("earliest", 0), ("latest", 5)])
def test_a_new_group_begins_where_it_is_told(kafka: str, reset: str, offset: int) -> None:
    reading = Reading(kafka)
    reading.write(5)

    assert reading.begins(reset) == offset


def test_what_comes_after_the_first_start_is_read_though_nothing_was_settled(
    kafka: str,
) -> None:
    reading = Reading(kafka)
    reading.write(5)
    reading.begins("latest")
    reading.write(3)

    assert reading.begins("latest") == 5


def test_a_group_that_must_have_a_position_is_refused_without_one(kafka: str) -> None:
    reading = Reading(kafka)
    assert reading.begins("error") == 0, "there was nothing to choose between"
    other = Reading(kafka)
    other.write(1)

    with pytest.raises(ConfigError, match=r"has no position in .*\[0\], which holds events"):
        other.begins("error")


def test_offsets_of_a_faust_app_are_taken_over_once(
    kafka: str, caplog: pytest.LogCaptureFixture
) -> None:
    reading = Reading(kafka, {"counts": 1})
    reading.write(5)
    reading.commit_as(reading.id, 3)

    async def settle_one(session: KafkaSession) -> int:
        first = session.positions[AGENT, reading.tp]
        await session.commit(Checkpoint(positions={(AGENT, reading.tp): position_of(4)}))
        return offset_of(first)

    assert reading.in_session(settle_one, "latest") == 3
    assert "its tables counts begin empty" in caplog.text
    reading.commit_as(reading.id, 1)
    assert reading.begins() == 4


def test_a_group_reads_several_topics_each_from_where_it_was(kafka: str) -> None:
    reading = Reading(kafka)
    other = make_topic(kafka)
    reading.write(3)
    write(kafka, other, [b"x"])
    reading.topics = [reading.topic, other]

    async def read(session: KafkaSession) -> list[bytes | None]:
        values: list[bytes | None] = []
        while len(values) < 4:
            values += [value for batch in await session.poll(100) for value in batch.values]
        await session.commit(
            Checkpoint(
                positions={
                    (AGENT, reading.tp): position_of(2),
                    (AGENT, TP(other, 0)): position_of(1),
                }
            )
        )
        return values

    assert sorted(v or b"" for v in reading.in_session(read)) == [b"0", b"1", b"2", b"x"]
    assert reading.begins() == 2


def test_an_agents_own_topic_that_lost_its_beginning_goes_on_with_what_faust_committed(
    kafka: str,
) -> None:
    reading = Reading(kafka)
    reading.packed = True
    reading.write(5)
    admin = AdminClient({"bootstrap.servers": kafka})
    admin.delete_records([TopicPartition(reading.topic, 0, 2)])[
        TopicPartition(reading.topic, 0, 2)
    ].result(30)

    with pytest.raises(ConfigError, match="begins at offset 2: what was before was read"):
        reading.begins()

    reading.commit_as(reading.id, 3)
    assert reading.begins() == 3


def test_an_offset_beyond_the_end_is_of_a_topic_that_is_no_more(kafka: str) -> None:
    reading = Reading(kafka)
    reading.write(2)
    reading.commit_as(reading.id, 7)

    assert reading.begins() == 0


def test_records_of_aborted_transactions_are_not_seen(kafka: str) -> None:
    reading = Reading(kafka)
    producer = Producer({"bootstrap.servers": kafka, "transactional.id": unique("t")})
    producer.init_transactions(30)
    for value, ends in ((b"aborted", producer.abort_transaction),
                        (b"committed", producer.commit_transaction)):  # fmt: skip
        producer.begin_transaction()
        producer.produce(reading.topic, value)
        producer.flush(30)
        ends(30)

    async def read(session: KafkaSession) -> list[bytes | None]:
        return [value for batch in await session.poll(100) for value in batch.values]

    assert reading.in_session(read) == [b"committed"]
