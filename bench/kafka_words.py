"""The word count on Kafka by streamd: two groups of a process each, as the loops by hand."""

import json
import time
from collections import Counter

from instance import cpu_of
from kafka_by_hand import check, counted
from kafka_site import Page, last_marker_at, site

# With `word.send(...)` the words travel in a topic by name, which is plain: a record a word.
APP = """
import streamd

app = streamd.App(SETTINGS, web_enabled=False)
posts = app.topic("POSTS", value_type=str)
words = app.topic("ID-words", key_type=str, value_type=str)
word_counts = app.Table("word_counts", default=int)


@app.agent(posts)
async def split(posts):
    async for post in posts:
        for word in post.split():
            await WORDS.send(key=word, value=word)


@app.agent(READS)
async def count(words):
    async for word in words:
        word_counts[word] += 1
"""
PACKED = {"WORDS": "count", "READS": "value_type=str"}
PLAIN = {"WORDS": "words", "READS": "words"}
STAMP_BYTES = 12  # before a changelog's value
SETTLE_S = 0.5  # for the last checkpoint


def measure(
    bootstrap: str, posts: str, expected: Counter[str], guarantee: str, packed: bool
) -> tuple[float, dict[str, float]]:
    """Seconds, and seconds of CPU of each process, from the first post to the last marker."""
    total = sum(expected.values())
    source = APP.replace("POSTS", posts)
    for name, text in (PACKED if packed else PLAIN).items():
        source = source.replace(name, text)
    with site(bootstrap, source, guarantee) as bench:
        bench.command("start")
        pids = bench.pids()
        split, count = (Page(pids[name], pids["master"]) for name in ("split#0", "count#0"))
        began_at = split.wait("the first post", lambda settled: settled > 0)
        before = {name: cpu_of(pid) for name, pid in pids.items()}
        count.wait("all words", lambda settled: settled >= total)
        time.sleep(SETTLE_S)
        cpu_s = {name: cpu_of(pid) - before[name] for name, pid in pids.items()}
        took_s = last_marker_at(bootstrap, f"{bench.app}-count-markers") - began_at
        bench.command("stop")
        changelog = f"{bench.app}-word_counts-changes"
        found = counted(bootstrap, changelog, lambda data: int(data[STAMP_BYTES:]), json.loads)
        check(f"streamd, {guarantee}", found, expected)
    return took_s, cpu_s
