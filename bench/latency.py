"""From an event's append to its result in the log, at 1,000 events a second, one agent."""

import asyncio
import time
from collections.abc import Iterator

from instance import Instance, instance
from probe import ECHO, probe, receive, send

EVENTS = 5000
INTERVAL_S = 0.001


async def measure(bench: Instance, first: int) -> list[float]:
    sent_at: dict[int, float] = {}
    took_s: list[float] = []

    async with probe(bench) as sender, probe(bench) as reader:

        async def read() -> None:
            while len(took_s) < EVENTS:
                numbers = [number for number in await receive(reader) if number in sent_at]
                now = time.monotonic()
                took_s.extend(now - sent_at[number] for number in numbers)

        reading = asyncio.create_task(read())
        due = time.monotonic()
        for number in range(first, first + EVENTS):
            due += INTERVAL_S
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            sent_at[number] = time.monotonic()
            await send(sender, number)
        await asyncio.wait_for(reading, 30)
    return sorted(took_s)


def run() -> Iterator[str]:
    """Lines of the report."""
    yield f"event to result, {EVENTS} events at {1 / INTERVAL_S:.0f} a second, three rounds"
    with instance("bench", ECHO) as bench:
        bench.command("start")
        for round in range(3):
            took_s = asyncio.run(measure(bench, round * EVENTS))
            p50, p99 = (took_s[int(len(took_s) * q)] * 1000 for q in (0.5, 0.99))
            yield f"  p50 {p50:6.2f} ms   p99 {p99:6.2f} ms   max {took_s[-1] * 1000:6.1f} ms"
