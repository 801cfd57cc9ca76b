"""Agents whose sends are not the same each time, and one that notes what came."""

import asyncio
import os
import random

import streamd
from streamd import Stream

ID, PREFIX = os.environ.get("CHAOS_ID", "proj"), os.environ.get("CHAOS_PREFIX", "")
app = streamd.App(ID, topic_partitions=4)
numbers = app.topic(PREFIX + "numbers", value_type=int)
seen = app.Table("seen", default=int)


@app.agent(numbers, concurrency=4)
async def together(stream: Stream[int]) -> None:
    async for number in stream:
        await asyncio.sleep(random.random() * 0.002)
        await note.send(key=f"together {number}", value=number)


@app.agent(numbers, deterministic=False)
async def by_chance(stream: Stream[int]) -> None:
    async for number in stream:
        await note.send(key=f"chance {number}", value=number, partition=random.randrange(4))


@app.agent(value_type=int)
async def note(stream: Stream[int]) -> None:
    async for key, _ in stream.items():
        name = key.decode() if isinstance(key, bytes) else str(key)
        seen[name] += 1
