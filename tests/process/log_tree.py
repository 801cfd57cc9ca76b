"""What the tests of the log start: the process `log`, and processes that count words."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TypeVar

from streamd.agentproc.broker import TP, Checkpoint, Output, Subscription, TableChange
from streamd.agentproc.broker.embedded import EmbeddedBroker
from streamd.agentproc.broker.reader import Reader
from streamd.agentproc.broker.turnstile import Turnstile
from streamd.agentproc.broker.wal import Checkpointer
from streamd.agentproc.broker.writer import Writer
from streamd.errors import StreamdError
from streamd.instance import Folder
from streamd.link import Link, adopt
from streamd.wire import Failing, Message, Ready, TopicInfo

M = TypeVar("M", bound=Message)

PARTITIONS = 2
WORDS = "the quick brown fox jumps over the lazy dog and the cat".split()


class Log:
    """The process `log` and the master's end of its link."""

    def __init__(self, datadir: Path, folder: Folder) -> None:
        self.datadir = datadir
        self.folder = folder
        self.messages: list[Message] = []

    async def start(self, **environment: str) -> None:
        ours, its = socket.socketpair()
        command = [sys.executable, "-m", "streamd.agentproc.log", str(its.fileno())]
        self.process = subprocess.Popen(
            [*command, str(self.datadir), str(self.folder.log_path)],
            pass_fds=[its.fileno()],
            env=os.environ | environment,
            stderr=subprocess.DEVNULL,
        )
        its.close()
        self.messages.clear()
        self.link = await adopt(ours, "log", self._take)

    async def ready(self) -> None:
        await self.got(Ready)

    async def failed(self) -> Failing:
        """What it says when it cannot go on; it has ended then."""
        failing = await self.got(Failing)
        assert await self.ended() == failing.exit_code
        return failing

    async def got(self, kind: type[M], wanted: Callable[[M], bool] | None = None) -> M:
        """The first message of this kind that is as wanted, within 10 s."""
        async with asyncio.timeout(10):
            while True:
                for message in self.messages:
                    if isinstance(message, kind) and (wanted is None or wanted(message)):
                        return message
                await asyncio.sleep(0.01)

    async def ended(self) -> int:
        """Its exit status, within 10 s."""
        return await asyncio.to_thread(self.process.wait, 10)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    async def _take(self, link: Link, message: Message) -> None:
        self.messages.append(message)


@contextlib.asynccontextmanager
async def running_log(datadir: Path, folder: Folder, **environment: str) -> AsyncIterator[Log]:
    """A log that was started; killed at the end if it still runs."""
    log = Log(datadir, folder)
    await log.start(**environment)
    try:
        yield log
    finally:
        log.kill()
        log.link.close()
        await log.link.closed.wait()


# Counting words: what a group of agents does with a session, without the agents.


def fill(datadir: Path, count: int, pack: int = 100) -> list[list[bytes]]:
    """Make the topics and put `count` words into each partition; the words by partition.

    Args:
        pack: How many words a pack has, so the fewest that are counted at a time.
    """
    chance = random.Random(7)
    words = [[chance.choice(WORDS).encode() for _ in range(count)] for _ in range(PARTITIONS)]
    writer = Writer(datadir, default_partitions=PARTITIONS)
    topics = [TopicInfo(name, PARTITIONS, False, None, "", "") for name in ("words", "counts")]
    writer.declare(topics, [], [])
    for partition, those in enumerate(words):
        for start in range(0, count, pack):
            part: list[bytes | None] = [*those[start : start + pack]]
            tp = TP("words", partition)
            times = [time.time()] * len(part)
            writer.append([Output(tp, [None] * len(part), part, times)], False)
    writer.close()
    checkpointer = Checkpointer(datadir)
    checkpointer.truncate()
    checkpointer.close()
    return words


async def count_words(datadir: Path, slot: int, slots: int, chunk: int) -> None:
    """Count until nothing is left: the table and the topic of running counts."""
    broker = EmbeddedBroker(datadir, datadir, default_partitions=PARTITIONS)
    session = broker.session(
        Subscription("app", "count", slot, slots, {"count": ["words"]}, {"table": PARTITIONS})
    )
    await session.open()
    tables = {p: dict(await session.load("table", p)) for p in session.partitions}
    while session.behind()["count"]:
        checkpoint = Checkpoint()
        for batch in await session.poll(chunk):
            table = tables[batch.tp.partition]
            values: list[bytes | None] = []
            for word in batch.values:
                assert word is not None
                table[word] = b"%d" % (int(table.get(word, b"0")) + 1)
                values.append(table[word])
            count = len(values)
            to = TP("counts", batch.tp.partition)
            checkpoint.outputs.append(Output(to, batch.values, values, [1.0] * count))
            rows: list[tuple[bytes, bytes | None]] = [
                (word, table[word]) for word in set(batch.values) if word is not None
            ]
            checkpoint.changes.append(TableChange("table", batch.tp.partition, rows))
            checkpoint.positions["count", batch.tp] = batch.end
        await session.commit(checkpoint)
    await broker.close()


def start_counter(
    datadir: Path, slot: int = 0, slots: int = 1, chunk: int = 50, failpoint: str = ""
) -> subprocess.Popen[bytes]:
    """A process that counts words; 0: all are counted, 70: it was fenced."""
    return subprocess.Popen(
        [sys.executable, __file__, str(datadir), str(slot), str(slots), str(chunk)],
        env=os.environ | {"STREAMD_TEST": "1", "STREAMD_FAILPOINT": failpoint},
        stderr=subprocess.DEVNULL,
    )


def wrong_counts(datadir: Path, words: list[list[bytes]], *, whole: bool = True) -> list[str]:
    """What contradicts the words: in the table, in the running counts, between the two."""
    turnstile = Turnstile(datadir)
    reader = Reader(datadir, turnstile)
    wrong = []
    for partition, those in enumerate(words):
        table = {
            word: int(count)
            for word, count in reader.rows("table", partition, after=None, limit=1000)
        }
        settled = sum(table.values())
        if whole and settled != len(those):
            wrong.append(f"{settled} of {len(those)} words of partition {partition} counted")
        if table != Counter(those[:settled]):
            wrong.append(f"table of partition {partition}: {table}")
        seen: Counter[bytes | None] = Counter()
        position = 0
        while batch := reader.fetch("counts", partition, position, 1000, 1 << 20):
            for key, value in zip(batch.keys, batch.values, strict=True):
                seen[key] += 1
                if value != b"%d" % seen[key]:
                    wrong.append(f"counts[{partition}]: {key!r} {value!r}, not {seen[key]}")
            position = batch.end
        if seen != table:
            wrong.append(f"counts[{partition}] end at {seen}, the table at {table}")
    reader.close()
    turnstile.close()
    return wrong


def wait_until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    """Return once the condition holds.

    Raises:
        TimeoutError: It does not, in time.
    """
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.005)


@contextlib.contextmanager
def ended_at_last(*processes: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill what still runs at the end."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    datadir, slot, slots, chunk = sys.argv[1:5]
    try:
        asyncio.run(count_words(Path(datadir), int(slot), int(slots), int(chunk)))
    except StreamdError as error:
        sys.stderr.write(f"{error}\n")
        os._exit(error.exit_code)


if __name__ == "__main__":
    main()
