"""Word count: one agent takes posts apart, another counts the words in a table.

`count_words` gets each word with the word as its key, so all of one word's events are in one
partition, and its count is in one process. The page asks that process.
"""

import asyncio
import itertools
import os
import time

import streamd
from streamd.demo import text
from streamd.web import Request, Response, Web

# How fast the text is read; 0: not at all. `streamd demo` sets it.
POSTS_PER_S = float(os.environ.get("DEMO_POSTS_PER_S", "200"))
POSTS_EACH_S = 0.05

# On a cluster that others use, `streamd demo` gives each run names of its own.
ID = os.environ.get("DEMO_ID", "demo")

app = streamd.App(ID, topic_partitions=4)

# Read posts are of no use any more: the log would grow for as long as the demo runs.
posts_topic = app.topic(f"{ID}-posts", value_type=str, retention=60.0)

word_counts = app.Table("word_counts", default=int, help="How often each word was seen.")


@app.agent(posts_topic)
async def shuffle_words(posts: streamd.Stream[str]) -> None:
    """Take posts apart and send each word to where it is counted."""
    async for post in posts:
        for word in post.split():
            await count_words.send(key=word, value=word)


@app.agent(value_type=str, processes=2)
async def count_words(words: streamd.Stream[str]) -> None:
    """Count words."""
    async for word in words:
        word_counts[word] += 1


@app.page("/count/{word}/")
@app.table_route(table=word_counts, match_info="word")
async def get_count(web: Web, request: Request, word: str) -> Response:
    """How often a word was seen."""
    return web.json({word: word_counts[word]})


@app.task
async def read_text() -> None:
    """Send the posts of the text, again and again, POSTS_PER_S of them each second."""
    if POSTS_PER_S <= 0:
        return
    endless = itertools.cycle(text.posts())
    began, sent = time.monotonic(), 0
    while True:
        due = int((time.monotonic() - began) * POSTS_PER_S)
        for post in itertools.islice(endless, due - sent):
            await posts_topic.send(value=post)
        sent = due
        await asyncio.sleep(POSTS_EACH_S)
