"""Private memory of one more agent process."""

from collections.abc import Iterator

from instance import instance, private_bytes

AGENTS = 20
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
"""


def run() -> Iterator[str]:
    """Lines of the report."""
    yield f"memory, {AGENTS} idle agents in a process each"
    with instance("bench", APP % AGENTS) as bench:
        bench.command("start")
        pids = bench.pids()
        agents = sorted(
            private_bytes(pid) for name, pid in pids.items() if name.startswith("agent")
        )
        median = agents[len(agents) // 2]
        yield f"  one more agent process {median / 2**20:5.1f} MiB private (median)"
        for name in ("guardian", "master", "zygote", "log", "web"):
            yield f"  {name:22} {private_bytes(pids[name]) / 2**20:5.1f} MiB private"
