"""What runs once runs on one host of all, and moves when that one dies."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kafka_clients import unique
from kafka_hosts import SESSION_S, Host, Trace, eventually, hosts, start_all


def source(bootstrap: str, id: str, trace: Path) -> str:
    return f'''
import os
import time

import streamd

app = streamd.App("{id}", broker="kafka://{bootstrap}")
trace = os.open("{trace}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)


@app.timer(0.05, on_leader=True)
async def tick():
    os.write(trace, f"{{time.monotonic()}} {{os.getpid()}} 0 tick\\n".encode())
'''


class Pair:
    """Two hosts whose processes tick where they lead."""

    def __init__(self, ab: list[Host], trace: Trace) -> None:
        self.hosts = ab
        self.trace = trace

    def leaders(self, since: float) -> list[int]:
        """The processes that ticked, in order of their first tick."""
        return list(dict.fromkeys(tick.pid for tick in self.trace.events(since)))

    def leader(self) -> int:
        """The only process that has ticked lately, once there is one."""
        return eventually(
            lambda: pids[0] if len(pids := self.leaders(time.monotonic() - 0.5)) == 1 else 0
        )

    def other(self, pid: int) -> int:
        """The process of the other host."""
        return next(found for host in self.hosts if (found := host.pid("app#0")) != pid)

    def took_over_in_s(self, pid: int, since: float) -> float:
        """How long after `since` another process than `pid` ticked; it is waited for."""
        eventually(lambda: any(tick.pid != pid for tick in self.trace.events(since)))
        return next(t.at for t in self.trace.events(since) if t.pid != pid) - since

    def pause_s(self, since: float) -> float:
        """The longest time in which nobody ticked."""
        moments = [tick.at for tick in self.trace.events(since)]
        return max(after - before for before, after in zip(moments, moments[1:], strict=False))

    def check_never_two(self, since: float) -> None:
        """No process ticked between two ticks of another one."""
        pids = [tick.pid for tick in self.trace.events(since)]
        changes = [b for a, b in zip(pids, pids[1:], strict=False) if a != b]
        assert len(changes) == len(set(changes) - {pids[0]}), "it went back and forth"


@pytest.fixture(scope="module")
def pair(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    trace = tmp_path_factory.mktemp("trace") / "trace"
    with hosts(source(kafka, unique("leader"), trace), 2) as ab:
        start_all(ab)
        yield Pair(ab, Trace(trace))


def test_a_leader_that_was_stopped_longer_than_its_session_calls_nothing_more(
    pair: Pair,
) -> None:
    since = time.monotonic()
    first = pair.leader()
    os.kill(first, signal.SIGSTOP)
    stopped_at = time.monotonic()
    try:
        pair.took_over_in_s(first, stopped_at + 0.1)
    finally:
        os.kill(first, signal.SIGCONT)
    goes_on_at = time.monotonic()
    eventually(lambda: time.monotonic() > goes_on_at + 1)
    assert first not in pair.leaders(goes_on_at)
    pair.check_never_two(since)


def test_one_of_two_hosts_leads_and_the_other_one_when_it_dies(pair: Pair) -> None:
    since = time.monotonic()
    first = pair.leader()
    index = [host.pid("app#0") for host in pair.hosts].index(first)
    pair.hosts[index].crash()
    died_at = time.monotonic()
    assert pair.took_over_in_s(first, died_at) < SESSION_S + 2 + 10
    pair.check_never_two(since)
    # A host that comes back does not take the lead away; one that stops gives it away at once.
    second = pair.leader()
    pair.hosts[index].start()
    pair.other(second)
    assert pair.leader() == second
    stopped_at = time.monotonic()
    pair.hosts[1 - index].stop()
    pair.took_over_in_s(second, stopped_at)
    assert pair.pause_s(stopped_at) < SESSION_S - 1
    pair.check_never_two(since)
