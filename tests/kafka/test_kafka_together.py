"""A group that reads several topics: the partitions of one number are one process's."""

from pathlib import Path

from kafka_clients import unique
from kafka_hosts import Feeder, Host, eventually, hosts


def source(bootstrap: str, id: str, payments: int = 4) -> str:
    return f'''
import os

import streamd

app = streamd.App("{id}", broker="kafka://{bootstrap}")
orders = app.topic("{id}-orders", key_type=str, value_type=str, partitions=4)
payments = app.topic("{id}-payments", key_type=str, value_type=str, partitions={payments})
counts = app.Table("counts", default=int)


@app.agent(orders, processes=2, group="pairs")
async def order(stream):
    async for word in stream:
        counts[word] += 1


@app.agent(payments, processes=2, group="pairs")
async def pay(stream):
    async for word in stream:
        counts[word] += 1


@app.page("/count/{{word}}/")
@app.table_route(table=counts, match_info="word")
async def get_count(web, request, word):
    return web.json({{"count": counts[word]}})
'''


def shares(host: Host) -> dict[str, list[int]]:
    return {
        name: each["partitions"]
        for name, each in host.processes().items()
        if name.startswith("pairs#")
    }


def test_the_same_key_of_two_topics_meets_in_one_process_also_after_a_kill(
    kafka: str,
) -> None:
    id = unique("together")
    with hosts(source(kafka, id), 1) as (host,):
        host.start()
        eventually(lambda: sorted(map(len, shares(host).values())) == [2, 2])
        before = shares(host)
        with (
            Feeder(kafka, f"{id}-orders") as ordered,
            Feeder(kafka, f"{id}-payments") as paid,
        ):
            eventually(lambda: sum(ordered.counts.values()) > 100)
            pid = host.kill("pairs#1")
            eventually(lambda: host.pid("pairs#1") != pid)
            eventually(lambda: sum(paid.counts.values()) > 300)
        eventually(lambda: shares(host) == before)
        url = host.web
        expected = {word: ordered.counts[word] + paid.counts[word] for word in paid.counts}
        eventually(lambda: expected == {
            word: host.get(f"/count/{word}/", url)[1].get("count") for word in expected
        })  # fmt: skip


def test_topics_of_different_partition_counts_in_one_group_are_refused(
    kafka: str, tmp_path: Path
) -> None:
    with hosts(source(kafka, unique("apart"), payments=3), 1) as (host,):
        done = host.command("start")
        assert done.returncode != 0
        said = done.stdout + done.stderr
        assert "orders has 4" in said
        assert "payments has 3" in said
        assert "Traceback" not in said
