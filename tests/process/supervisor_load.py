"""A word count that works while its processes are exchanged, and is counted exactly."""

import asyncio
import threading
from collections import Counter

import msgspec
from supervisor_tree import Tree, eventually

from streamd.link import connect
from streamd.wire import Append, Appended, OutRecord, Scan, Scanned

WORDS = ("one", "two", "three", "four", "five", "six", "seven")

COUNT = """
import streamd
app = streamd.App("proj")
lines = app.topic("lines", value_type=str, partitions=4)
words = app.topic("words", value_type=str, partitions=4)
counts = app.Table("counts", default=int, key_type=str, value_type=int)

@app.agent(lines)
async def split(stream):
    async for line in stream:
        for word in line.split():
            await words.send(key=word, value=word)

@app.agent(words, processes=3)
async def count(stream):
    async for word in stream:
        counts[word] += 1
"""


class Feed:
    """Appends lines from a thread, in `with`, and knows what was appended."""

    def __init__(self, house: Tree, pause_s: float = 0.005) -> None:
        self._pause_s = pause_s
        self.sent: Counter[str] = Counter()
        self._house = house
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "Feed":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    async def _run(self) -> None:
        link = await connect(self._house.folder.log_path, "log")
        number = 0
        while not self._stop.is_set():
            records, sent = [], []
            for _ in range(20):
                number += 1
                chosen = [WORDS[number % 7], WORDS[number % 5]]
                records.append(OutRecord("lines", None, msgspec.json.encode(" ".join(chosen))))
                sent += chosen
            answer = await link.request(Append(records), 10.0)
            assert isinstance(answer, Appended)
            self.sent.update(sent)
            await asyncio.sleep(self._pause_s)
        link.close()


def counted(house: Tree) -> Counter[str]:
    """What the table holds, of all its owners; of what can be asked now."""
    owners = house.ask("owners")["owners"]

    async def ask() -> Counter[str]:
        counts: Counter[str] = Counter()
        for owner in owners:
            if owner["group"] == "count":
                link = await connect(f"{owner['address']}.r", owner["process"])
                answer = await link.request(Scan("counts", "", 1000), 5.0)
                link.close()
                assert isinstance(answer, Scanned)
                for key, value in answer.rows:
                    counts[msgspec.json.decode(key)] += int(value)
        return counts

    return asyncio.run(ask())


def wait_counted(house: Tree, sent: Counter[str], within_s: float = 20.0) -> None:
    """Wait until every word was counted, and see that none was counted twice."""
    eventually(lambda: counted(house).total() >= sent.total(), within_s)
    eventually(lambda: house.ask("status")["behind"] == 0, within_s)
    assert counted(house) == sent


def pids(house: Tree) -> dict[str, int]:
    """The pid of each agent process."""
    rows = house.ask("status")["processes"]
    return {row["name"]: row["pid"] for row in rows if row["kind"] == "agent"}
