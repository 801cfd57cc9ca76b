"""An app that counts words while its cluster is in trouble; is it what was sent in the end?"""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kafka_broker import Cluster
from kafka_clients import unique
from kafka_hosts import Feeder, Host, eventually, hosts, traced_app

EXACTLY_ONCE = {"STREAMD_PROCESSING_GUARANTEE": "exactly_once"}


class App:
    """One instance that counts words, and what feeds it."""

    def __init__(self, host: Host, feeder: Feeder) -> None:
        self.host = host
        self.feeder = feeder

    def start(self) -> None:
        """Start it, and feed it."""
        self.host.start()
        self.feeder.__enter__()
        self.flows()

    def counts(self) -> dict[str, int]:
        """How often each word was counted, as far as pages answer."""
        replies = {word: self.host.get(f"/count/{word}/")[1] for word in self.feeder.counts}
        return {word: reply.get("count") for word, reply in replies.items()}

    def flows(self) -> None:
        """Wait until more events have been worked on."""
        before = self.host.status().get("events", 0)
        eventually(lambda: self.host.status().get("events", 0) > before + 50)

    def waits_for(self) -> str:
        """What its processes wait for; "" where there is nothing."""
        problems = self.host.status().get("problems", [])
        return "; ".join(each["text"] for each in problems if each["code"] == "waits")

    def not_ready(self) -> str:
        """The last reason why it is not ready; "" where it is."""
        code, body = self.host.get("/readyz")
        return str(body["reasons"][-1]) if code == 503 else ""

    def lines(self, since: int = 0) -> list[str]:
        """What was logged above INFO, from the line `since` on."""
        lines = self.host.log().splitlines()[since:]
        return [line for line in lines if " WARNING " in line or " ERROR " in line]

    def restarts(self) -> int:
        """How often processes were started again."""
        return sum(each["restarts"] for each in self.host.processes().values())

    def differences(self) -> dict[str, tuple[int | None, int]]:
        """Words that were not counted as often as they were sent: word -> both."""
        counts, sent = self.counts(), self.feeder.counts
        return {word: (counts[word], sent[word]) for word in sent if counts[word] != sent[word]}

    def ends_exact(self, within_s: float = 60) -> None:
        """Wait until every word that was sent is counted, and see that none was twice."""
        self.feeder.end()
        with contextlib.suppress(AssertionError):
            eventually(lambda: not self.differences(), within_s)
        differences = self.differences()
        assert not differences, f"counted and sent: {differences}"


@contextmanager
def app(cluster: Cluster, folder: Path, lines: str = "", **settings: str) -> Iterator[App]:
    """An app on a cluster; `lines` are put before it."""
    id = unique("trouble")
    source = traced_app(cluster.url.removeprefix("kafka://"), id, folder / "trace")
    with hosts(lines + source, 1) as (host,):
        host.environment |= settings
        yield App(host, Feeder(cluster.bootstrap, f"{id}-words"))
