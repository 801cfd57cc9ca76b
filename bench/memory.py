"""Private memory of one more agent process: what it alone has, once it has worked and rests."""

import time
from collections.abc import Iterator

from instance import instance, private_bytes

AGENTS = 20
EVENTS = 100  # for each agent
REST_S = 2.0  # reports of the last events are over then
APP = """
import streamd

app = streamd.App("bench")


def make(number):
    async def agent(stream):
        async for _ in stream:
            await sink.send(value=number)

    agent.__name__ = f"agent{number}"
    return app.agent()(agent)


sink = app.topic("sink")
agents = [make(number) for number in range(%d)]


@app.task
async def feed():
    for event in range(%d):
        for agent in agents:
            await agent.cast(event)
"""


def run() -> Iterator[str]:
    """Lines of the report."""
    yield f"memory, {AGENTS} agents in a process each, idle after {EVENTS} events each"
    with instance("bench", APP % (AGENTS, EVENTS)) as bench:
        bench.command("start")
        bench.wait("all events", lambda status: status["events"] >= AGENTS * EVENTS, 60)
        time.sleep(REST_S)
        pids = bench.pids()
        agents = sorted(
            private_bytes(pid) for name, pid in pids.items() if name.startswith("agent")
        )
        median = agents[len(agents) // 2]
        yield f"  one more agent process {median / 2**20:5.2f} MiB private (median)"
        for name in ("guardian", "master", "zygote", "log", "web"):
            yield f"  {name:22} {private_bytes(pids[name]) / 2**20:5.1f} MiB private"
