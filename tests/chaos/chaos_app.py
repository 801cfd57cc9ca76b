"""The app under test: words counted in two groups, and a bank whose agent fails on purpose."""

import ctypes
import os
from typing import Any

import streamd
from streamd import Record, Stream
from streamd.errors import TableError

# On a Kafka that others use as well, everything has names of its own.
ID, PREFIX = os.environ.get("CHAOS_ID", "proj"), os.environ.get("CHAOS_PREFIX", "")

app = streamd.App(ID, topic_partitions=4, retry_backoff=0.02, retries=2, hang_limit=3.0)

posts = app.topic(PREFIX + "posts", value_type=str)
results = app.topic(PREFIX + "results", value_type=int)
word_counts = app.Table("word_counts", default=int, partitions=4)


@app.agent(posts)
async def split(stream: Stream[Any]) -> None:
    async for post in stream:
        for word in post.split():
            await count.send(key=word, value=word)


@app.agent(value_type=str, processes=2)
async def count(words: Stream[str]) -> None:
    async for word in words:
        word_counts[word] += 1
        await results.send(key=word, value=word_counts[word])


class Transfer(Record):
    number: int
    source: str
    target: str
    amount: int
    how: str = ""  # what goes wrong: "once" "always" "exit" "segfault"


class Booked(Record):
    number: int
    done: bool
    balance: int


transfers = app.topic(PREFIX + "transfers", value_type=Transfer, partitions=2)
deposits = app.topic(PREFIX + "deposits", value_type=int, key_type=str, partitions=2)
ledger = app.topic(PREFIX + "ledger", value_type=Booked, partitions=2)
scratch = app.topic(PREFIX + "scratch", value_type=int, partitions=1, retention=1.0)
tick_log = app.topic(PREFIX + "tick_log", value_type=int, partitions=1)
accounts = app.Table("accounts", default=lambda: 100, partitions=2)
deposited = app.Table("deposited", default=int, partitions=2)
failed_once: set[int] = set()


class Planned(Exception):
    """What the bank raises on purpose."""


@app.agent(transfers, group="bank")
async def bank(stream: Stream[Any]) -> None:
    async for transfer in stream:
        done = accounts[transfer.source] >= transfer.amount
        if done:
            accounts[transfer.source] -= transfer.amount
        balance = accounts[transfer.source]
        await ledger.send(key=transfer.source, value=Booked(transfer.number, done, balance))
        go_wrong(transfer)
        if done:
            accounts[transfer.target] += transfer.amount


def go_wrong(transfer: Transfer) -> None:
    """Fail between the two writes, after the send."""
    match transfer.how:
        case "once" if transfer.number not in failed_once:
            failed_once.add(transfer.number)
            raise Planned(transfer.number)
        case "always":
            raise Planned(transfer.number)
        case "exit":
            os._exit(9)
        case "segfault":
            ctypes.string_at(0)


@app.agent(deposits, group="bank", concurrency=3)
async def deposit(stream: Stream[Any]) -> None:
    async for key, amount in stream.items():
        deposited[key] += amount
        await scratch.send(value=amount)


@app.timer(0.05)
async def tick() -> None:
    try:
        deposited["ticks"] += 1
    except TableError:
        return  # another host's process counts
    await tick_log.send(key="ticks", value=deposited["ticks"])
