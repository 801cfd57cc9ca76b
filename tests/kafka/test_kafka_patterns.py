"""Topics that are named by a pattern: found when they come, let go of when they go."""

import json
import re
from collections import Counter
from pathlib import Path

from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from kafka_clients import unique, write
from kafka_hosts import Host, eventually, hosts, sooner

APP = """
import os

import streamd

app = streamd.App("{id}", broker="kafka://{bootstrap}", consumer_auto_offset_reset="latest")
news = app.topic(pattern="{id}-.*", value_type=str, partitions=2)
log = os.open("{trace}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
counts = app.Table("counts", default=int)


@app.agent(news, processes=2)
async def read(stream):
    async for event in stream.events():
        counts[event.message.topic] += 1
        os.write(log, f"{{event.message.topic}} {{event.value}}\\n".encode())
        await other.send(value=event.value)


@app.agent(value_type=str, partitions=2)
async def other(stream):
    async for value in stream:
        os.write(log, f"other {{value}}\\n".encode())
"""


class Topics:
    """The topics of one test, and what was read of them."""

    def __init__(self, bootstrap: str, id: str, trace: Path) -> None:
        self._bootstrap, self._id, self._trace = bootstrap, id, trace
        self._admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})

    def make(self, name: str, partitions: int = 2) -> None:
        """Make `{id}-name`."""
        topic = f"{self._id}-{name}"
        self._admin.create_topics([NewTopic(topic, partitions, 1)])[topic].result(30)

    def delete(self, name: str) -> None:
        """Delete it."""
        self._admin.delete_topics([f"{self._id}-{name}"])[f"{self._id}-{name}"].result(30)

    def write(self, name: str, values: str) -> None:
        """Send some words to it."""
        texts = [f'"{value}"'.encode() for value in values.split()]
        write(self._bootstrap, f"{self._id}-{name}", texts)

    def read(self) -> Counter[str]:
        """What agents worked on: `name value`, with how often."""
        lines = self._trace.read_text() if self._trace.exists() else ""
        return Counter(line.removeprefix(f"{self._id}-") for line in lines.splitlines())


def lag(host: Host) -> dict[str, int]:
    """Topic -> how many records of it were read, as the reader's group says; {}: nobody can."""
    done = host.command("lag read --json")
    found: Counter[str] = Counter()
    for row in json.loads(done.stdout)["lag"] if done.stdout else ():
        found[row["topic"]] += row["position"] or 0
    return dict(found)


def meant(host: Host) -> list[list[str]]:
    """What each of the two processes has said last that it reads."""
    told = re.findall(r"(read#\d) +group read reads by its patterns (.+)", host.log())
    return [sorted(topics.split(", ")) for topics in dict(told).values()]


def test_topics_of_a_pattern_are_found_when_they_come_and_let_go_when_they_go(
    kafka: str, tmp_path: Path
) -> None:
    id, trace = unique("news"), tmp_path / "trace"
    topics = Topics(kafka, id, trace)
    topics.make("de")
    topics.make("odd", partitions=3)
    app = APP.format(id=id, bootstrap=kafka, trace=trace)
    with hosts(sooner(sourcing_FIND_S=0.5) + app, 1) as (host,):
        host.start()
        topics.write("de", "a b c d")
        wanted = Counter({f"de {word}": 1 for word in "abcd"})
        wanted += Counter({f"other {word}": 1 for word in "abcd"})
        eventually(lambda: topics.read() == wanted)
        told = f"does not read topic '{id}-odd': it has 3 partitions"
        eventually(lambda: told in host.status().get("sentence", ""))
        topics.delete("odd")

        # What came before anybody knew of it is read too, whatever `latest` says of others.
        topics.make("fr")
        topics.write("fr", "e f g h")
        wanted += Counter({f"fr {word}": 1 for word in "efgh"})
        wanted += Counter({f"other {word}": 1 for word in "efgh"})
        eventually(lambda: topics.read() == wanted)
        eventually(lambda: host.state() == "running")
        eventually(lambda: lag(host) == {f"{id}-de": 4, f"{id}-fr": 4})

        topics.delete("de")
        # The cluster lets go of it before the processes do: what they read of another topic of
        # this name till then, they would read twice.
        eventually(lambda: meant(host) == [[f"{id}-fr"]] * 2)
        eventually(lambda: lag(host) == {f"{id}-fr": 4})
        topics.write("fr", "i j")
        wanted += Counter(["fr i", "fr j", "other i", "other j"])
        eventually(lambda: topics.read() == wanted)
        assert host.state() == "running", host.status()

        # One that was made anew is another: it is read from its beginning.
        topics.make("de")
        topics.write("de", "k l m n o p")
        wanted += Counter({f"de {word}": 1 for word in "klmnop"})
        wanted += Counter({f"other {word}": 1 for word in "klmnop"})
        eventually(lambda: topics.read() == wanted)
        assert all(each["restarts"] == 0 for each in host.processes().values())
        # Who is only joining again when it stops is a member until its session is over.
        eventually(lambda: meant(host) == [[f"{id}-de", f"{id}-fr"]] * 2)
        eventually(lambda: host.partitions("read") == [0, 1])
        host.stop()
        reset = host.command("reset --dry-run")
        assert f"{id}-de" in reset.stdout, reset.stdout + reset.stderr
