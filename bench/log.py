"""What the embedded log takes and gives on this machine.

One process, one session, events of a key of 11 bytes and a value of 100; best of five.
"""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from streamd.agentproc.broker import TP, Checkpoint, Output, Subscription, TableChange
from streamd.agentproc.broker.embedded import EmbeddedBroker, EmbeddedSession

REPEATS = 5
POSTS = TP("posts", 0)


def output(count: int) -> Output:
    """Events for one partition."""
    keys: list[bytes | None] = [b"k%010d" % n for n in range(count)]
    return Output(POSTS, keys, [bytes(100)] * count, [1.0] * count)


async def best_s(work: Callable[[], Awaitable[None]]) -> float:
    """The shortest time of a few."""
    times_s = []
    for _ in range(REPEATS):
        at = time.perf_counter()
        await work()
        times_s.append(time.perf_counter() - at)
    return min(times_s)


async def measure_commits(session: EmbeddedSession, size: int, *, durable: bool) -> str:
    """Checkpoints of `size` events and their position."""
    commits = 50 if durable else max(20, min(2000, 100_000 // size))
    checkpoint = Checkpoint([output(size)], positions={("a", POSTS): 0}, durable=durable)

    async def work() -> None:
        for _ in range(commits):
            await session.commit(checkpoint)

    took_s = await best_s(work)
    kind = "FULL" if durable else "NORMAL"
    return (
        f"commit {kind:6} {size:5} events   {commits * size / took_s / 1e6:6.2f} M events/s"
        f"   {took_s / commits * 1e6:8.0f} us a commit"
    )


async def measure_rows(session: EmbeddedSession, count: int) -> str:
    """Checkpoints of `count` changed rows of a table of 20,000."""
    number = 0

    async def work() -> None:
        nonlocal number
        for _ in range(10):
            number += 1
            keys = [b"%08d" % ((n * 7919 + number * 31) % 20_000) for n in range(count)]
            rows: list[tuple[bytes, bytes | None]] = [(key, b"%d" % number) for key in keys]
            await session.commit(Checkpoint(changes=[TableChange("table", 0, rows)]))

    took_s = await best_s(work)
    return f"table {count:6} rows             {took_s / 10 / count * 1e6:6.2f} us a row"


async def measure_reading(session: EmbeddedSession) -> str:
    """All that was committed in packs of 1,000."""

    async def work() -> None:
        session.seek(POSTS, 0)
        left = 400_000
        while left > 0:
            left -= sum(len(batch.values) for batch in await session.poll(1000))

    took_s = await best_s(work)
    return f"read, packs of 1000             {took_s / 400_000 * 1e6:6.3f} us an event"


async def measure_latency(session: EmbeddedSession) -> str:
    """From append to the waiting poll of the same process, by wake-up."""
    session.seek(POSTS, session.behind()["a"] + session.positions["a", POSTS])
    times_s = []
    for _ in range(500):
        poll = asyncio.create_task(session.poll(10))
        await asyncio.sleep(0)
        at = time.perf_counter()
        await session.append([output(1)])
        await poll
        times_s.append(time.perf_counter() - at)
    times_s.sort()
    return (
        f"append to poll                  {times_s[250] * 1e6:6.0f} us p50"
        f"   {times_s[495] * 1e6:6.0f} us p99"
    )


def run() -> Iterator[str]:
    """Measure in a log of its own, below the temporary folder."""
    yield "the embedded log, one process, one session"
    with tempfile.TemporaryDirectory() as name:
        lines = asyncio.run(_measure(Path(name)))
    for line in lines:
        yield f"  {line}"


async def _measure(folder: Path) -> list[str]:
    broker = EmbeddedBroker(folder, folder, default_partitions=1)
    session = broker.session(Subscription("app", "g", 0, 1, {"a": ["posts"]}, {"table": 1}))
    await session.open()
    lines = [
        await measure_commits(session, 1000, durable=False),
        await measure_reading(session),
    ]
    lines += [await measure_commits(session, size, durable=False) for size in (1, 10, 100)]
    lines += [await measure_commits(session, size, durable=True) for size in (1, 100, 1000)]
    lines += [await measure_rows(session, count) for count in (100, 1000, 5000)]
    lines.append(await measure_latency(session))
    await broker.close()
    return lines
