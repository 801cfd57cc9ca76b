"""A topic that is deleted under a running app: it is told, waited for, and read anew."""

from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from kafka_clients import unique, write
from kafka_hosts import Host, eventually, hosts, sooner

APP = """
import streamd

app = streamd.App("{id}", broker="kafka://{bootstrap}", topic_partitions=2)
words = app.topic("{id}-words", value_type=str)
out = app.topic("{id}-out", value_type=str)
counts = app.Table("counts", default=int)


@app.agent(words)
async def count(stream):
    async for event in stream.events():
        counts[event.value] += 1
        if event.value == "send":
            await out.send(value="sent")


@app.page("/count/")
async def get_counts(web, request):
    return web.json(dict(counts.items()))
"""


class Topics:
    """What others do to the topics of an app."""

    def __init__(self, bootstrap: str, id: str) -> None:
        self.bootstrap = bootstrap
        self.id = id
        self._admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})

    def delete(self, name: str) -> None:
        """Delete a topic."""
        self._admin.delete_topics([f"{self.id}-{name}"])[f"{self.id}-{name}"].result(30)

    def make(self, name: str, partitions: int = 2) -> None:
        """Make it, once the former one is gone for good."""
        new = NewTopic(f"{self.id}-{name}", partitions, 1)
        self._admin.create_topics([new])[new.topic].result(30)

    def write(self, values: list[str]) -> None:
        """Send to `words`."""
        write(self.bootstrap, f"{self.id}-words", [f'"{value}"'.encode() for value in values])


def counts(host: Host) -> dict[str, int]:
    return dict(host.get("/count/")[1])


def waits_for(host: Host) -> str:
    """What it waits for; "" where there is nothing."""
    problems = host.status().get("problems", [])
    return "; ".join(each["text"] for each in problems if each["code"] == "waits")


def test_a_topic_that_was_deleted_is_waited_for_and_read_anew(kafka: str) -> None:
    id = unique("gone")
    app = sooner(access_LOOK_S=0.5) + APP.format(id=id, bootstrap=kafka)
    with hosts(app, 1) as (host,):
        # Else a young client believes for 30 s that a topic is about to be made.
        options = '{"topic.metadata.propagation.max.ms": 1000}'
        host.environment["STREAMD_BROKER_PRODUCER_OPTIONS"] = options
        host.start()
        topics = Topics(kafka, id)
        before = ["a", "b", "c", "d", "e"] * 3
        topics.write(before)
        eventually(lambda: counts(host) == {word: 3 for word in "abcde"})

        topics.delete("words")
        eventually(lambda: "was deleted" in waits_for(host))
        status, (code, _) = host.status(), host.get("/readyz")
        assert (status["state"], code) == ("degraded", 503)
        told = f"waits for topic '{id}-words', which was deleted: make it again, with 2"
        assert waits_for(host).startswith(told), waits_for(host)
        topics.make("words")
        # More than there were, and none of them is passed over.
        topics.write(before * 2)
        eventually(lambda: counts(host) == {word: 9 for word in "abcde"})
        eventually(lambda: host.state() == "running")
        assert host.log().count("which was deleted") == 1
        assert all(each["restarts"] == 0 for each in host.processes().values())

        topics.delete("out")
        topics.write(["send", "f"])
        eventually(lambda: f"topic '{id}-out', which was deleted" in waits_for(host))
        topics.make("out")
        eventually(lambda: counts(host).get("send") == counts(host).get("f") == 1)
        eventually(lambda: host.state() == "running")
        # What the producer has lost is done again by its successor.
        assert sum(each["restarts"] for each in host.processes().values()) <= 1
        eventually(lambda: counts(host).get("a") == 9)
