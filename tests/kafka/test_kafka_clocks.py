"""Clocks that are wrong by hours: what an app keeps is taken; for the rest it waits."""

import time

import pytest
from confluent_kafka import KafkaError, Producer
from kafka_sessions import GUARANTEES, Place, run

from streamd.agentproc.broker import TP, Output
from streamd.agentproc.kafka import options
from streamd.agentproc.kafka.health import Health
from streamd.agentproc.kafka.producing import Writer
from streamd.agentproc.kafka.sources import Tracer
from streamd.errors import BrokerLost

HOURS_S = 30 * 3600.0


def refusals(bootstrap: str, topic: str, off_s: float) -> list[str]:
    """Why the cluster takes no record whose sender's clock is wrong by so much."""
    told: list[str] = []

    def delivered(error: KafkaError | None, _: object) -> None:
        if error is not None:
            told.append(error.str())

    producer = Producer({"bootstrap.servers": bootstrap, "acks": "all"})
    moment_ms = int((time.time() + off_s) * 1000)
    producer.produce(topic, b"1", b"k", timestamp=moment_ms, on_delivery=delivered)
    assert producer.flush(30) == 0
    return told


def test_what_an_app_keeps_is_taken_whatever_the_hosts_clock_says(kafka: str) -> None:
    place = Place(kafka)

    async def test() -> None:
        async with place.reader():
            for topic in (place.words, place.changelog, place.markers):
                assert refusals(kafka, topic, HOURS_S) == [], topic
                assert refusals(kafka, topic, -HOURS_S) == [], topic
            place.broker().ensure([place.broker().wanted(place.out)])
            # Of a topic that others read, the cluster's own rule holds.
            assert refusals(kafka, place.out, HOURS_S) == ["Broker: Invalid timestamp"]

    run(test)


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_refused_timestamps_are_waited_for_before_events_are_done_anew(
    kafka: str, guarantee: str
) -> None:
    place = Place(kafka, guarantee)
    place.broker().ensure([place.broker().wanted(place.out)])
    waited: list[set[str]] = []
    id = place.app_id if guarantee == "exactly_once" else None

    def writer() -> Writer:
        return Writer(
            options.producer(options.connection(place.settings), transactional_id=id),
            lambda topic: False, Tracer(), Health({"bootstrap.servers": kafka}),
            wait_timely=lambda topics: waited.append(set(topics)),
        )  # fmt: skip

    def send(to: Writer, value: bytes, moment: float) -> None:
        to.commit([Output(TP(place.out, 0), [None], [value], [moment])], [], [], None)

    with pytest.raises(BrokerLost, match="Invalid timestamp"):
        send(writer(), b"early", time.time() + HOURS_S)
    assert waited == [{place.out}]
    send(writer(), b"timely", time.time())
    assert [message.value() for message in place.records(place.out)] == [b"timely"]
