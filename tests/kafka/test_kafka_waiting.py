"""Nothing waits for a moment of the client's own, where there is something to do."""

import asyncio
import time

from kafka_clients import unique, write

from streamd.agentproc.broker import Subscription
from streamd.agentproc.broker.kafka import KafkaBroker
from streamd.app import App

# Without a word to it the client looks once a second whether there is something to fetch.
AT_ONCE_S = 0.8
TRIES = 5


async def first_batch_after_s(broker: KafkaBroker, topic: str) -> float:
    """Seconds from a session's opening to the first events."""
    session = broker.session(
        Subscription(broker.settings.id, "group", 0, 1, {"a": [topic]}, {})
    )
    await session.open()
    began_at = time.monotonic()
    async with asyncio.timeout(60):
        await session.poll(1000)
    took_s = time.monotonic() - began_at
    await session.close()
    return took_s


def test_partitions_that_were_taken_over_are_read_at_once(kafka: str) -> None:
    app = App(unique("app"), broker=f"kafka://{kafka}", topic_partitions=1)
    topic = f"{app.id}-events"
    broker = KafkaBroker(app.settings, [], "host", patience_s=30)
    broker.ensure([broker.wanted(topic)])
    write(kafka, topic, [b"1"])

    took_s = min(asyncio.run(first_batch_after_s(broker, topic)) for _ in range(TRIES))

    assert took_s < AT_ONCE_S
