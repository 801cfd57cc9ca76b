"""What is too large for the cluster: the event at fault is given up, others go on."""

from pathlib import Path

import pytest
from confluent_kafka import Consumer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from kafka_clients import read, unique, write
from kafka_hosts import eventually, hosts

APP = """
import streamd

app = streamd.App("{id}", broker="kafka://{bootstrap}", topic_partitions=1)
sizes = app.topic("{id}-sizes", value_type=int, partitions=1)
small = app.topic("{id}-small", key_type=str, value_type=str, partitions=1)
rows = app.Table("rows", default=str, partitions=1)


@app.agent(sizes)
async def grow(stream):
    async for size in stream:
        if size % 2:
            rows[str(size)] = "x" * size
        else:
            await small.send(key="one", value="x" * size)


@app.page("/row/")
async def get_row(web, request):
    return web.json({{"size": len(rows["20001"])}})
"""


def records(bootstrap: str, topic: str, count: int) -> list[bytes]:
    """The first values of a topic."""
    consumer = Consumer({
        "bootstrap.servers": bootstrap, "group.id": unique("look"), "log_level": 0,
        "auto.offset.reset": "earliest",
    })  # fmt: skip
    consumer.subscribe([topic])
    found = read(consumer, count)
    consumer.close()
    return found


@pytest.mark.parametrize("guarantee", ["at_least_once", "exactly_once"])
def test_what_is_too_large_for_its_topic_is_the_fault_of_its_event_alone(
    kafka: str, guarantee: str, tmp_path: Path
) -> None:
    id = unique("sizes")
    admin = AdminClient({"bootstrap.servers": kafka, "log_level": 0})
    config = {"max.message.bytes": "100000"}
    letters = f"{id}-dead-letters"
    limited = [NewTopic(name, 1, 1, config=config) for name in (f"{id}-small", letters)]
    for future in admin.create_topics(limited).values():
        future.result(30)
    with hosts(APP.format(id=id, bootstrap=kafka), 1) as (host,):
        host.environment |= {
            "STREAMD_RETRIES": "0",
            "STREAMD_PROCESSING_GUARANTEE": guarantee,
        }
        host.start()
        # Many that are sent in one batch are no more than the topic takes, either.
        sent = [*[40_000] * 20, 150_000, 2_000_000, 10_001, 1_500_001, 20_001]
        unreadable = b"no number" * 15_000  # larger than a dead letter may be
        write(kafka, f"{id}-sizes", [unreadable, *(str(size).encode() for size in sent)])
        eventually(lambda: host.get("/row/")[1].get("size") == 20_001)
        eventually(lambda: "a row of table 'rows' has 15000" in host.log())

        assert list(map(len, records(kafka, f"{id}-small", 20))) == [40_002] * 20
        [letter, *_] = records(kafka, letters, 4)
        assert unreadable.startswith(letter) and len(letter) > 90_000
        assert "has 150005 bytes, and the cluster takes 99000" in host.log()
        assert all(each["restarts"] == 0 for each in host.processes().values())
