"""What tests do with a broker by hand: make a topic, write to it, read it."""

import time
import uuid

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic


def unique(word: str) -> str:
    """A name for a topic or group that no other test has."""
    return f"{word}-{uuid.uuid4().hex[:8]}"


def make_topic(bootstrap: str, *, partitions: int = 1, copies: int = 1) -> str:
    """Create a topic and wait until the broker has it; its name."""
    name = unique("topic")
    admin = AdminClient({"bootstrap.servers": bootstrap})
    admin.create_topics([NewTopic(name, partitions, copies)])[name].result(30)
    return name


def write(bootstrap: str, topic: str, values: list[bytes], *, within_s: float = 60) -> None:
    """Append records and wait until all are confirmed.

    Raises:
        AssertionError: One was refused, or not confirmed in time.
    """
    refused: list[KafkaError] = []

    def delivered(error: KafkaError | None, _: Message) -> None:
        if error is not None:
            refused.append(error)

    producer = Producer({"bootstrap.servers": bootstrap, "acks": "all"})
    for value in values:
        producer.produce(topic, value, key=value, on_delivery=delivered)
    assert producer.flush(within_s) == 0
    assert not refused


def read(consumer: Consumer, count: int, *, within_s: float = 60) -> list[bytes]:
    """The next `count` values that a subscribed consumer gets.

    Raises:
        AssertionError: They have not come in time.
    """
    values: list[bytes] = []
    deadline = time.monotonic() + within_s
    while len(values) < count:
        assert time.monotonic() < deadline, f"{len(values)} of {count} came"
        message = consumer.poll(0.2)
        if message is None:
            continue
        if (error := message.error()) is not None:
            raise KafkaException(error)
        value = message.value()
        assert value is not None
        values.append(value)
    return values
