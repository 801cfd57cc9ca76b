"""The newer protocol for groups, in which the cluster assigns (KIP-848)."""

import time
from pathlib import Path

from kafka_clients import unique
from kafka_hosts import Feeder, Trace, eventually, hosts, traced_app


def test_hosts_share_and_give_back_by_the_protocol_in_which_the_cluster_assigns(
    kafka: str, tmp_path: Path
) -> None:
    id = unique("protocol")
    source = traced_app(kafka, id, tmp_path / "trace", processes=1)
    trace = Trace(tmp_path / "trace")
    with hosts(source, 2, "--broker-group-protocol consumer") as (a, b):
        a.start()
        with Feeder(kafka, f"{id}-words") as feeder:
            eventually(lambda: len(trace.owners(0)) == 4)
            b.start()
            eventually(lambda: [len(host.partitions("count")) for host in (a, b)] == [2, 2])
            b.stop()
            eventually(lambda: len(a.partitions("count")) == 4)
            since = time.monotonic()
            eventually(lambda: len(trace.owners(since)) == 4)
        url = a.web
        eventually(lambda: feeder.counts == {
            word: a.get(f"/count/{word}/", url)[1].get("count") for word in feeder.counts
        })  # fmt: skip
