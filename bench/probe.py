"""Sends events into a running instance's log and reads results, as its own agents do."""

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from instance import Instance

from streamd.agentproc.broker import TP, Output, Session, Subscription
from streamd.agentproc.broker.embedded import EmbeddedBroker

ECHO = """
import streamd

app = streamd.App("bench")
events = app.topic("events", value_type=int, partitions=1)
results = app.topic("results", value_type=int, partitions=1)


@app.agent(events)
async def echo(stream):
    async for value in stream:
        await results.send(value=value)
"""


@asynccontextmanager
async def probe(bench: Instance) -> AsyncIterator[Session]:
    """A session that reads `results` from its end on."""
    broker = EmbeddedBroker(bench.folder / "bench-data", bench.folder / "run" / "bench", 8)
    session = broker.session(
        Subscription(
            "bench",
            f"probe-{os.getpid()}-{time.monotonic_ns()}",
            0,
            1,
            {"probe": ["results"]},
            {},
        )
    )
    await session.open()
    try:
        yield session
    finally:
        await session.close()
        await broker.close()


async def send(session: Session, number: int) -> None:
    """Append one event."""
    await session.append([Output(TP("events", 0), [None], [b"%d" % number], [time.time()])])


async def receive(session: Session) -> list[int]:
    """The numbers of the results that came."""
    return [int(value or b"0") for batch in await session.poll(1000) for value in batch.values]
