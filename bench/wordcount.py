"""Words a second on the embedded log: split → repartition → count → table, two groups."""

import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import by_hand
from instance import Instance, instance
from text import posts

from streamd.agentproc.broker import TP, Output, Subscription
from streamd.agentproc.broker.embedded import EmbeddedBroker

APP = """
import streamd

app = streamd.App("bench")
posts = app.topic("posts", value_type=str)
word_counts = app.Table("word_counts", default=int)


@app.agent(posts)
async def split(posts):
    async for post in posts:
        for word in post.split():
            await count.send(key=word, value=word)


@app.agent(value_type=str)
async def count(words):
    async for word in words:
        word_counts[word] += 1
"""
ROUNDS = 3


async def fill(bench: Instance, made: list[str]) -> None:
    """Put the posts into the log of an instance that is stopped."""
    (bench.folder / "run" / "bench").mkdir(parents=True, exist_ok=True)
    broker = EmbeddedBroker(bench.folder / "bench-data", bench.folder / "run" / "bench", 8)
    session = broker.session(Subscription("bench", "fill", 0, 1, {}, {}))
    await session.open()
    for start in range(0, len(made), 1000):
        part = [json.dumps(post).encode() for post in made[start : start + 1000]]
        tp = TP("posts", start // 1000 % 8)
        await session.append([Output(tp, [None] * len(part), part, [time.time()] * len(part))])
    await session.close()
    await broker.close()


def counted(bench: Instance, words: int) -> bool:
    return any(
        agent["label"] == "count" and agent["events"] >= words
        for agent in bench.status()["agents"]
    )


def once(made: list[str], expected: Counter[str]) -> tuple[float, dict[str, float]]:
    """Seconds and seconds of CPU by process, from the first word to the last."""
    words = sum(expected.values())
    with instance("bench", APP) as bench:
        bench.command("start")
        bench.command("stop")
        asyncio.run(fill(bench, made))
        began_at = time.monotonic()
        bench.command("start")
        deadline = time.monotonic() + 120
        while not counted(bench, words):
            if time.monotonic() > deadline:
                raise SystemExit("not counted in 120 s")
            time.sleep(0.05)
        took_s = time.monotonic() - began_at
        cpu_s = bench.cpu_s()
        table = json.loads(
            bench.command("--json", "table", "word_counts", "--limit", "1000000")
        )
        found = {row["key"]: row["value"] for row in table["rows"]}
        if found != dict(expected):
            raise SystemExit(f"counted wrongly: {len(found)} words, {len(expected)} expected")
        return took_s, cpu_s


def run() -> Iterator[str]:
    """Lines of the report."""
    made, expected = posts(3_000_000)
    words = sum(expected.values())
    yield f"word count, {words} words in {len(made)} posts, {ROUNDS} rounds, interleaved"
    ours: list[tuple[float, dict[str, float]]] = []
    hand: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        ours.append(once(made, expected))
        with tempfile.TemporaryDirectory() as folder:
            hand.append(by_hand.run(Path(folder), made, expected))
    took_s, cpu_s = sorted(ours, key=lambda run: run[0])[ROUNDS // 2]
    hand_s, hand_cpu_s = sorted(hand)[ROUNDS // 2]
    ours_us = sum(cpu_s.values()) / words * 1e6
    yield f"  streamd   {words / took_s:10.0f} words/s   {ours_us:5.2f} µs of CPU a word:"
    for name in ("split#0", "count#0", "log", "master", "web", "zygote", "guardian", "app#0"):
        yield f"    {name:14} {cpu_s.get(name, 0.0) / words * 1e6:17.2f}"
    hand_us = hand_cpu_s / words * 1e6
    yield f"  by hand   {words / hand_s:10.0f} words/s   {hand_us:5.2f} µs"
    yield (
        f"  streamd / by hand: {hand_s / took_s:.2f} of the words/s, "
        f"{ours_us / hand_us:.2f} of the CPU; its start is included; both exact"
    )
