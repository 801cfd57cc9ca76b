"""What librdkafka counts of itself comes to `/metrics`' figures."""

import time

from confluent_kafka import Consumer, Producer, TopicPartition
from kafka_clients import make_topic

from streamd.agentproc.kafka.figures import Figures

WITHIN_S = 30
RECORDS = 100


def test_records_of_all_clients_are_counted(kafka: str) -> None:
    figures = Figures()
    assert figures.sums() == {}
    topic = make_topic(kafka)
    reach = {
        "bootstrap.servers": kafka, "stats_cb": figures.take, "statistics.interval.ms": 100
    }  # fmt: skip
    out = Producer(reach)
    reader = Consumer(reach | {"group.id": topic, "enable.auto.commit": False})
    for _ in range(RECORDS):
        out.produce(topic, b"1234567890")
    assert out.flush(WITHIN_S) == 0
    reader.assign([TopicPartition(topic, 0, 0)])

    deadline = time.monotonic() + WITHIN_S
    while figures.sums().get("records_read") != RECORDS or (
        figures.sums()["records_written"] != RECORDS
    ):
        assert time.monotonic() < deadline, figures.sums()
        out.poll(0)
        reader.poll(0.1)
    reader.close()

    found = figures.sums()
    assert found["bytes_read"] >= 10 * RECORDS
    assert found["bytes_written"] >= 10 * RECORDS
    assert found["records_queued"] == 0
    assert found["requests"] > 0
    assert found["round_trip_ms"] > 0
