"""Who has which partitions: processes that die, are added, leave; hosts that come and go."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from kafka_clients import unique
from kafka_hosts import SESSION_S, Feeder, Host, Trace, eventually, hosts, traced_app

from streamd.partition import partition_for

EXIT = """

@app.page("/exit/{word}/")
@app.table_route(table=counts, match_info="word")
async def exit_at_once(web, request, word):
    os._exit(70)
"""


class Running:
    """An app that counts words on up to two hosts, fed all the time."""

    def __init__(self, ab: list[Host], trace: Trace, feeder: Feeder) -> None:
        self.a, self.b = ab
        self.trace = trace
        self.feeder = feeder

    def settled(self, a: int, b: int = 0) -> None:
        """Wait until the hosts have so many of the four partitions."""
        eventually(lambda: len(self.a.partitions("count")) == a)
        if b:
            eventually(lambda: len(self.b.partitions("count")) == b)

    def shared_in_two(self) -> list[dict[str, Any]]:
        """The two processes of the first host, once each works on two partitions; else []."""
        there = self.a.processes()
        both = [there[name] for name in ("count#0", "count#1") if name in there]
        lately = self.trace.owners(time.monotonic() - 1.5)
        working = [{at for at, pids in lately.items() if pids == {p["pid"]}} for p in both]
        told = [set(each["partitions"]) for each in both]
        return both if working == told and [len(has) for has in told] == [2, 2] else []

    def flows(self, since: float) -> None:
        """Wait until events of each partition have been worked on."""
        eventually(lambda: len(self.trace.owners(since)) == 4)

    def longest_pause_s(self, partitions: list[int], since: float) -> float:
        """The longest time without an event of these partitions."""
        moments = [e.at for e in self.trace.events(since) if e.partition in partitions]
        moments = [since, *moments, time.monotonic()]
        return max(after - before for before, after in zip(moments, moments[1:], strict=False))


@pytest.fixture(scope="module")
def running(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    id = unique("groups")
    trace = tmp_path_factory.mktemp("trace") / "trace"
    with hosts(traced_app(kafka, id, trace) + EXIT, 2) as ab:
        ab[0].start()
        with Feeder(kafka, f"{id}-words") as feeder:
            yield Running(ab, Trace(trace), feeder)


def test_a_killed_process_gets_its_partitions_back_and_nobody_else_is_moved(
    running: Running,
) -> None:
    mine, others = eventually(running.shared_in_two)
    killed_at = time.monotonic()
    os.kill(mine["pid"], signal.SIGKILL)
    eventually(lambda: running.a.pid("count#0") != mine["pid"])
    running.flows(time.monotonic())
    owners = running.trace.owners(killed_at)
    for partition in others["partitions"]:
        assert owners[partition] == {others["pid"]}
    for partition in mine["partitions"]:
        assert others["pid"] not in owners[partition]
    assert running.longest_pause_s(others["partitions"], killed_at) < SESSION_S / 2
    eventually(lambda: running.a.processes()["count#0"]["partitions"] == mine["partitions"])


def test_more_processes_share_the_partitions_and_fewer_take_them_over_at_once(
    running: Running,
) -> None:
    # A process that has crashed just before does not keep the others from it.
    _, other = eventually(running.shared_in_two)
    words = running.feeder.counts
    word = next(w for w in words if partition_for(w.encode(), 4) in other["partitions"])
    running.a.get(f"/exit/{word}/")
    eventually(lambda: running.a.pid("count#1") != other["pid"])
    before = running.a.pid("count#0")
    assert running.a.command("scale count=4").returncode == 0
    eventually(lambda: all(
        len(each["partitions"]) == 1
        for name, each in running.a.processes().items() if name.startswith("count#")
    ))  # fmt: skip
    running.flows(time.monotonic())
    down_at = time.monotonic()
    assert running.a.command("scale count=2").returncode == 0
    running.settled(4)
    running.flows(time.monotonic())
    assert running.longest_pause_s([0, 1, 2, 3], down_at) < SESSION_S
    assert running.a.pid("count#0") == before


def test_a_reload_replaces_one_process_after_the_other(running: Running) -> None:
    before = {name: running.a.pid(name) for name in ("count#0", "count#1")}
    done = running.a.command("reload")
    assert done.returncode == 0, done.stderr
    # What is asked may be as it was a second ago.
    eventually(lambda: all(running.a.pid(name) != pid for name, pid in before.items()))
    running.settled(4)
    running.flows(time.monotonic())


def test_a_second_host_takes_its_share_and_gives_it_back_when_it_stops(
    running: Running,
) -> None:
    running.b.start()
    running.settled(2, 2)
    assert not set(running.a.partitions("count")) & set(running.b.partitions("count"))
    running.flows(time.monotonic())
    stopped_at = time.monotonic()
    running.b.stop()
    running.settled(4)
    running.flows(time.monotonic())
    assert running.longest_pause_s([0, 1, 2, 3], stopped_at) < SESSION_S


def test_what_a_host_had_is_taken_over_when_it_dies(running: Running) -> None:
    running.b.start()
    running.settled(2, 2)
    running.flows(time.monotonic())
    running.b.crash()
    died_at = time.monotonic()
    running.settled(4)
    running.flows(time.monotonic())
    assert time.monotonic() - died_at < SESSION_S + 20


def test_after_all_of_it_every_word_was_counted_once(running: Running) -> None:
    running.feeder.end()

    def counts() -> dict[str, int]:
        url = running.a.web
        replies = {
            word: running.a.get(f"/count/{word}/", url) for word in running.feeder.counts
        }
        return {word: reply[1].get("count") for word, reply in replies.items()}

    eventually(lambda: running.a.status().get("behind") == 0)
    eventually(lambda: counts() == running.feeder.counts, 20)
