"""Reading much from a real broker while little is worked on."""

import asyncio

import psutil
from confluent_kafka import Producer
from kafka_clients import make_topic, unique

from streamd.agentproc.broker import Batch, Subscription
from streamd.agentproc.broker.kafka import KafkaBroker
from streamd.agentproc.kafka.poller import CHUNK_RECORDS, FULL_EVENTS
from streamd.config import resolve
from streamd.wire import TopicInfo

PARTITIONS = 2
EVENTS = 500_000
VALUE_BYTES = 100
# What was read ahead, and as much in librdkafka, which adds its own to each small record.
MOST_BYTES = 150 * 1024 * 1024
WITHIN_S = 120.0


def write_numbers(bootstrap: str, topic: str) -> None:
    """Many small records: each partition holds ascending numbers, filled up to a size."""
    producer = Producer({
        "bootstrap.servers": bootstrap, "linger.ms": 50, "compression.type": "lz4",
        "queue.buffering.max.messages": EVENTS,
    })  # fmt: skip
    for number in range(EVENTS):
        producer.produce(topic, b"%0*d" % (VALUE_BYTES, number), partition=number % PARTITIONS)
        if not number % 10_000:
            producer.poll(0)
    assert producer.flush(WITHIN_S) == 0


def test_who_works_slowly_reads_no_further_ahead_than_memory_allows_and_then_all_in_order(
    kafka: str,
) -> None:
    topic = make_topic(kafka, partitions=PARTITIONS)
    write_numbers(kafka, topic)
    settings = resolve({"id": unique("app"), "broker": f"kafka://{kafka}"}, {}, None, {})
    broker = KafkaBroker(settings, [TopicInfo(topic, PARTITIONS, False, None, "", "")], "host")
    session = broker.session(Subscription(settings.id, "g", 0, 1, {"a": [topic]}, {}))
    seen = dict.fromkeys(range(PARTITIONS), 0)

    def take(batches: list[Batch]) -> int:
        for batch in batches:
            partition = batch.tp.partition
            first = seen[partition]
            assert [int(value or b"") for value in batch.values] == list(
                range(
                    partition + first * PARTITIONS,
                    partition + (first + len(batch.values)) * PARTITIONS,
                    PARTITIONS,
                )
            )
            seen[partition] += len(batch.values)
        return sum(seen.values())

    async def main() -> tuple[int, int]:
        memory = psutil.Process().memory_info
        async with asyncio.timeout(2 * WITHIN_S):
            await session.open()
            before = memory().rss
            poller = session._poller
            assert poller is not None
            while not poller._paused:
                await asyncio.sleep(0.02)
            waiting = poller._waiting_events
            grown = memory().rss - before
            while take(await session.poll(CHUNK_RECORDS)) < EVENTS:
                continue
        await session.close(leave=True)
        return waiting, grown

    waiting, grown = asyncio.run(main())

    assert waiting <= FULL_EVENTS + CHUNK_RECORDS
    assert grown < MOST_BYTES, f"{grown / 1e6:.0f} MB"
