"""From the SIGKILL of an agent process to the first result of its replacement."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator

from instance import Instance, instance
from probe import ECHO, probe, receive, send

TRIALS = 20


async def measure(bench: Instance) -> list[float]:
    took_s = []
    async with probe(bench) as sender, probe(bench) as reader:
        for number in range(TRIALS):
            pid = (await asyncio.to_thread(bench.pids))["echo#0"]
            os.kill(pid, signal.SIGKILL)
            began_at = time.monotonic()
            await send(sender, number)
            while number not in await asyncio.wait_for(receive(reader), 10):
                continue
            took_s.append(time.monotonic() - began_at)
            # A process that has run for a while is replaced at once; so is one that got on.
            await asyncio.sleep(0.3)
    return sorted(took_s)


def run() -> Iterator[str]:
    """Lines of the report."""
    yield f"an agent process killed → its replacement has answered, {TRIALS} trials"
    with instance("bench", ECHO) as bench:
        bench.command("start")
        took_s = asyncio.run(measure(bench))
    p50, worst = took_s[len(took_s) // 2] * 1000, took_s[-1] * 1000
    yield f"  p50 {p50:6.1f} ms   max {worst:6.1f} ms   (sent, read, committed, read back)"
