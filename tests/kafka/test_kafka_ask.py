"""`ask` on Kafka: the reply comes, and one that is too large says so."""

from typing import Any

from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from kafka_clients import unique
from kafka_hosts import hosts

APP = """
import streamd
from streamd.agents import AgentFailed

app = streamd.App("{id}", broker="kafka://{bootstrap}", topic_partitions=1)


@app.agent(value_type=int)
async def repeat(sizes):
    async for size in sizes:
        yield "x" * size


@app.page("/ask/{{size}}/")
async def ask(web, request, size):
    try:
        return web.json({{"size": len(await repeat.ask(int(size)))}})
    except AgentFailed as error:
        return web.json({{"error": str(error)}})
"""


def test_a_reply_that_is_larger_than_its_topic_takes_fails_the_question_alone(
    kafka: str,
) -> None:
    id = unique("ask")
    limited = NewTopic(f"{id}-reply-one-app-0", 1, 1, config={"max.message.bytes": "100000"})
    admin = AdminClient({"bootstrap.servers": kafka, "log_level": 0})
    admin.create_topics([limited])[limited.topic].result(30)
    with hosts(APP.format(id=id, bootstrap=kafka), 1) as (host,):
        host.environment["STREAMD_INSTANCE"] = "one"
        host.start()

        def answer(size: int) -> Any:
            return host.get(f"/ask/{size}/")[1]

        assert answer(90_000) == {"size": 90_000}
        for size in (150_000, 2_000_000):
            error = answer(size)["error"]
            assert error.startswith(f"the reply of agent 'proj.repeat' has {size + 88} bytes")
            assert "and the cluster takes 99000: send where it is kept" in error
        assert answer(3) == {"size": 3}
        assert all(each["restarts"] == 0 for each in host.processes().values())
