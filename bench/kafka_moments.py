"""What takes moments on Kafka: the way of an event to its result, and of a killed process's
partitions to the one after it; and what an app weighs, idle or with a million keys."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from confluent_kafka import Consumer, Producer, TopicPartition
from instance import Instance, cpu_of
from kafka_by_hand import PATIENCE_S, make_topics
from kafka_site import Page, site

ECHO = """
import streamd

app = streamd.App(SETTINGS, web_enabled=False)
events = app.topic("ID-events", value_type=int)
results = app.topic("ID-results", value_type=int)


@app.agent(events)
async def echo(stream):
    async for value in stream:
        await results.send(value=value)
"""
KEYS = """
import streamd

app = streamd.App(SETTINGS, web_enabled=False)
events = app.topic("ID-events", value_type=int)
numbers = app.Table("numbers", default=int, key_type=int)


@app.agent(events)
async def fill(stream):
    async for start in stream:
        for number in range(start, start + STEP):
            numbers[number] = number
"""
RATE = 1000  # events a second
WARM_UP_S = 1.0
INTERVAL_S = 1 / RATE
STEP = 10_000
REST_S = 3.0
RUNNING = re.compile(r"fill#0 \(pid \d+\) is RUNNING after ([\d.]+) s")


class Probe:
    """Sends numbers to `events` and takes what comes to `results`, from its end on."""

    def __init__(self, bootstrap: str, id: str) -> None:
        self._events = f"{id}-events"
        self._out = Producer({"bootstrap.servers": bootstrap, "linger.ms": 0})
        self._reader = Consumer(
            {"bootstrap.servers": bootstrap, "group.id": "none", "enable.auto.commit": False}
        )
        places = []
        for partition in (
            self._reader.list_topics(timeout=30).topics[f"{id}-results"].partitions
        ):
            place = TopicPartition(f"{id}-results", partition)
            _, place.offset = self._reader.get_watermark_offsets(place)
            places.append(place)
        self._reader.assign(places)

    def send(self, number: int, partition: int = 0) -> None:
        self._out.produce(self._events, b"%d" % number, partition=partition)
        self._out.poll(0)

    def receive(self, wait_s: float) -> list[int]:
        """The numbers of results that came."""
        first = self._reader.poll(wait_s)
        messages = [first, *self._reader.consume(1000, 0)] if first is not None else []
        return [int(message.value()) for message in messages if message.error() is None]

    def close(self) -> None:
        self._out.flush(5)
        self._reader.close()


@contextmanager
def echoing(bootstrap: str, guarantee: str) -> Iterator[tuple[Instance, Probe]]:
    with site(bootstrap, ECHO, guarantee) as bench:
        make_topics(bootstrap, f"{bench.app}-events", f"{bench.app}-results")
        bench.command("start")
        probe = Probe(bootstrap, bench.app)
        try:
            answer(probe, -1)
            yield bench, probe
        finally:
            probe.close()


def answer(probe: Probe, number: int) -> float:
    """Send a number and wait for its result; seconds."""
    began_at = time.monotonic()
    probe.send(number)
    while number not in probe.receive(0.5):
        if time.monotonic() - began_at > PATIENCE_S:
            raise SystemExit(f"no result in {PATIENCE_S} s")
    return time.monotonic() - began_at


def latencies(bootstrap: str, guarantee: str, events: int) -> tuple[float, float]:
    """p50 and p99 from an event's send to its result, seconds, at 1,000 a second."""
    warm_up = int(WARM_UP_S * RATE)
    with echoing(bootstrap, guarantee) as (_, probe):
        sent_at: dict[int, float] = {}
        took_s: list[float] = []

        def send() -> None:
            due = time.monotonic()
            for number in range(warm_up + events):
                due += INTERVAL_S
                time.sleep(max(0.0, due - time.monotonic()))
                sent_at[number] = time.monotonic()
                probe.send(number)

        sending = threading.Thread(target=send, daemon=True)
        sending.start()
        deadline = time.monotonic() + PATIENCE_S
        while len(took_s) < warm_up + events:
            if time.monotonic() > deadline:
                raise SystemExit(f"{len(took_s)} results in {PATIENCE_S} s")
            for number in probe.receive(0.5):
                took_s.append(time.monotonic() - sent_at[number])
        sending.join()
    kept = sorted(took_s[warm_up:])
    return kept[len(kept) // 2], kept[int(len(kept) * 0.99)]


def replacements(bootstrap: str, guarantee: str, trials: int) -> list[float]:
    """Seconds from an agent process's SIGKILL to the first result of the one after it."""
    took_s = []
    with echoing(bootstrap, guarantee) as (bench, probe):
        for number in range(trials):
            os.kill(bench.pids()["echo#0"], signal.SIGKILL)
            took_s.append(answer(probe, number))
            # A process that got on is replaced at once; so much has it to do for it.
            time.sleep(0.5)
    return sorted(took_s)


def idle(bootstrap: str, seconds: float) -> float:
    """CPU of an app that has nothing to do, all its processes, of one core."""
    with echoing(bootstrap, "at_least_once") as (bench, _):
        time.sleep(REST_S)
        pids = bench.pids()
        time.sleep(REST_S)  # to ask was work
        before = {name: cpu_of(pid) for name, pid in pids.items()}
        time.sleep(seconds)
        return sum(cpu_of(pid) - before[name] for name, pid in pids.items()) / seconds


@contextmanager
def holding(bootstrap: str, keys: int) -> Iterator[Instance]:
    """An app whose one agent process, `fill#0`, holds a table of so many int keys."""
    with site(bootstrap, KEYS.replace("STEP", str(STEP))) as bench:
        events = f"{bench.app}-events"
        make_topics(bootstrap, events)
        out = Producer({"bootstrap.servers": bootstrap})
        for start in range(0, keys, STEP):
            out.produce(events, b"%d" % start, partition=start // STEP % 4)
        out.flush(30)
        bench.command("start")
        pids = bench.pids()
        page = Page(pids["fill#0"], pids["master"])
        page.wait("all keys", lambda settled: settled >= keys // STEP)
        time.sleep(REST_S)
        yield bench


def resident_bytes(bench: Instance) -> int:
    """Memory of the process that holds the table."""
    statm = Path(f"/proc/{bench.pids()['fill#0']}/statm").read_text()
    return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")


def recoveries(bench: Instance, trials: int, *, stored: bool) -> list[tuple[float, float]]:
    """From a process's start until it has its table: seconds, and of those CPU of its own.

    Args:
        stored: With its local stores; else from the changelog alone.
    """
    took = []
    for _ in range(trials):
        if not stored:
            for file in bench.folder.glob("*-data/store/*"):
                file.unlink()
        bench.command("restart", "fill#0")
        log = next(bench.folder.glob("*-data/streamd.log")).read_text()
        seconds = float(RUNNING.findall(log)[-1])
        took.append((seconds, cpu_of(bench.pids()["fill#0"])))
    return sorted(took)
