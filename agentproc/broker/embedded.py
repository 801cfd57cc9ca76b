"""The embedded log as the engine's broker: sessions over one file, `DATADIR/log.db`.

Reading is done on the loop, in short transactions. Writing, which may wait for its turn, is
done by the one thread of the process that writes; the loop turns meanwhile. Nothing is opened
before the first session opens, so a broker may be made before its process forks.
"""

import asyncio
import functools
import logging
import socket
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from streamd.agentproc.broker import (
    TP,
    Batch,
    Checkpoint,
    Holder,
    Output,
    SoleHost,
    Subscription,
)
from streamd.agentproc.broker.bell import drain, listen
from streamd.agentproc.broker.reader import Reader
from streamd.agentproc.broker.writer import Claim, Writer
from streamd.failpoints import failpoint
from streamd.wire import GroupInfo, StandbyRow, TableInfo, TopicInfo

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

SAFETY_POLL_S = 0.5  # a writer that dies between its commit and the bell rings nobody
MAX_CHUNK_BYTES = 4 * 1024 * 1024
LOAD_ROWS = 10_000
SLOW_TURN_S = 2.0

# A loop that is busy, but looks at its sockets every 50 µs, lets go of the interpreter so
# briefly that the writing thread gets it by luck alone, and too often for the thread to ask for
# it: commits were seen to take seconds, with the log's turn. So while something is written a
# busy loop pauses once in each of its turns, for as short as the kernel can, about 60 µs.
# Between pauses that are longer apart the thread asks, after this interval instead of 5 ms.
_SWITCH_INTERVAL_S = 0.0001
_PAUSE_S = 0.000001
# A turn of the loop that is shorter did nothing: the loop waits, and the interpreter is free.
_IDLE_TURN_S = 0.00001
_LOOK_AGAIN_S = 0.001


class EmbeddedBroker:
    """The log of one data directory, as one process uses it.

    Args:
        datadir: The folder that holds `log.db`; it must be there.
        runtime_dir: The folder for the sockets of sessions; it must be there.
        default_partitions: For topics that nobody declared.
    """

    def __init__(self, datadir: Path, runtime_dir: Path, default_partitions: int = 8) -> None:
        self.datadir = datadir
        self.runtime_dir = runtime_dir
        self.default_partitions = default_partitions
        self._thread: ThreadPoolExecutor | None = None
        self._writer: Writer | None = None
        self._reader: Reader | None = None
        self._open: set[EmbeddedSession] = set()
        self._writing = 0  # writes that the thread has or will get
        self._normal_interval_s = 0.0
        self._pausing = False  # the loop has a call of _pause

    traces = False
    installation = ""
    waits_for = ""

    def client_figures(self) -> dict[str, float]:
        """See `streamd.agentproc.broker.Broker`."""
        return {}

    def standby(self) -> list[StandbyRow]:
        """See `streamd.agentproc.broker.Broker`."""
        return []

    def session(
        self, subscription: Subscription, holder: Holder | None = None
    ) -> "EmbeddedSession":
        """A session that is not open yet; its partitions stay with it."""
        return EmbeddedSession(self, subscription)

    async def lead(self, group: str, tell: Callable[[bool], None]) -> SoleHost:
        """See `streamd.agentproc.broker.Broker`."""
        tell(True)
        return SoleHost()

    async def declare(
        self, topics: list[TopicInfo], tables: list[TableInfo], groups: list[GroupInfo]
    ) -> None:
        """Make what an app names.

        Raises:
            ConfigError: A topic or table is there with another number of partitions.
        """
        await self.write(Writer.declare, topics, tables, groups)

    async def close(self) -> None:
        """Close the sessions and the connections; what was committed stays."""
        for session in list(self._open):
            await session.close()
        if self._reader is not None:
            self._reader.close()
        if self._thread is not None:
            if self._writer is not None:
                await self.write(Writer.close)
            self._thread.shutdown()
        self._reader = self._writer = self._thread = None

    def opened(self, session: "EmbeddedSession") -> None:
        """Close this session too when the broker is closed."""
        self._open.add(session)

    def closed(self, session: "EmbeddedSession") -> None:
        """The session let go of what it had."""
        self._open.discard(session)

    @property
    def reader(self) -> Reader:
        """The loop's connection, opened at first use."""
        if self._reader is None:
            self._reader = Reader(self.datadir, self.writer.turnstile)
        return self._reader

    @property
    def writer(self) -> Writer:
        """The thread's connection, opened at first use; only the thread may write with it."""
        if self._writer is None:
            self._writer = self._submit(Writer, self.datadir, self.default_partitions)
        return self._writer

    async def write(
        self, work: Callable[..., T], *args: object, done: Callable[[], None] | None = None
    ) -> T:
        """Run `work(writer, *args)` in the thread. Cancelling leaves it running to its end.

        Args:
            done: Called on the loop once the work succeeded, even if the caller was cancelled.
        """
        loop = asyncio.get_running_loop()
        writer = self.writer
        assert self._thread is not None
        self._begin_writing(loop)
        future = loop.run_in_executor(self._thread, functools.partial(work, writer, *args))
        report = loop.call_later(SLOW_TURN_S, self._report_wait, writer)

        def finished(future: asyncio.Future[T]) -> None:
            report.cancel()
            self._end_writing()
            if done is not None and not future.cancelled() and future.exception() is None:
                done()

        future.add_done_callback(finished)
        return await asyncio.shield(future)

    def partitions_of(self, topic: str) -> int:
        """How many partitions a topic has; made with the default number if it is not there."""
        reader = self.reader
        if topic not in reader.catalog.topics:
            reader.catalog.load(reader.db)
        if topic not in reader.catalog.topics:
            self._submit(Writer.make_topic, self.writer, topic)
            reader.catalog.load(reader.db)
        return reader.catalog.topics[topic].partitions

    def _submit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="log")
        return self._thread.submit(work, *args, **kwargs).result()

    def _begin_writing(self, loop: asyncio.AbstractEventLoop) -> None:
        self._writing += 1
        if self._writing == 1:
            self._normal_interval_s = sys.getswitchinterval()
            sys.setswitchinterval(_SWITCH_INTERVAL_S)
        if not self._pausing:
            self._pausing = True
            loop.call_soon(self._pause, loop, 0.0)

    def _end_writing(self) -> None:
        self._writing -= 1
        if self._writing == 0:
            sys.setswitchinterval(self._normal_interval_s)

    def _pause(self, loop: asyncio.AbstractEventLoop, turned_at: float) -> None:
        """Be called in each turn of the loop while something is written.

        Args:
            turned_at: When the turn before this one was here; 0: it was not.
        """
        if self._writing == 0:
            self._pausing = False
            return
        if turned_at and time.perf_counter() - turned_at < _IDLE_TURN_S:
            loop.call_later(_LOOK_AGAIN_S, self._pause, loop, 0.0)
            return
        if turned_at:
            time.sleep(_PAUSE_S)
        loop.call_soon(self._pause, loop, time.perf_counter())

    def _report_wait(self, writer: Writer) -> None:
        log.warning(
            "a write to the log has waited for %.0f s; pid %d has the turn",
            SLOW_TURN_S,
            writer.turnstile.last_holder(),
        )


class EmbeddedSession:
    """One slot of a group on the embedded log; `streamd.agentproc.broker.Session`."""

    def __init__(self, broker: EmbeddedBroker, subscription: Subscription) -> None:
        self.positions: dict[tuple[str, TP], int] = {}
        self.partitions: list[int] = []
        self.recovering: list[int] = []
        self.generation = 0
        self.topic_limits: dict[str, int] = {}
        self.table_limits: dict[str, int] = {}
        self._broker = broker
        self._subscription = subscription
        self._claim: Claim | None = None
        self._bell: socket.socket | None = None
        self._tp_ids: dict[TP, int] = {}
        self._next: dict[TP, int] = {}  # partition -> the position to read next
        self._turn_of: list[TP] = []  # who is served first comes first
        self._waiter: asyncio.Future[None] | None = None
        self._rung = False

    async def open(self) -> None:
        broker, subscription = self._broker, self._subscription
        address = broker.runtime_dir / f"{_short(subscription)}.bell"
        bell = self._bell = listen(address)
        broker.opened(self)
        asyncio.get_running_loop().add_reader(bell, self._ring, bell)
        claim = await broker.write(Writer.claim, subscription, str(address))
        reader = broker.reader
        reader.catalog.load(reader.db)
        self._claim = claim
        self.positions = claim.positions
        self.partitions = claim.partitions
        self.generation = claim.epoch
        for (_, tp), position in claim.positions.items():
            self._next[tp] = min(position, self._next.get(tp, position))
        for tp in self._next:
            topic = reader.catalog.topics[tp.topic]
            self._tp_ids[tp] = topic.first_tp + tp.partition
        self._turn_of = list(self._next)

    async def load(self, table: str, partition: int) -> list[tuple[bytes, bytes]]:
        failpoint("load.before-read")
        rows: list[tuple[bytes, bytes]] = []
        # In slices, so that the loop turns. Nobody else writes these rows after the claim.
        while part := self._broker.reader.rows(
            table, partition, after=rows[-1][0] if rows else None, limit=LOAD_ROWS
        ):
            rows += part
            await asyncio.sleep(0)
        failpoint("load.after-read")
        return rows

    async def poll(self, max_events: int) -> list[Batch]:
        while True:
            self._rung = False
            if batches := self._read(max_events):
                return batches
            await self._wait_ring()

    def seek(self, tp: TP, position: int) -> None:
        self._next[tp] = position
        self._wake()

    async def commit(self, checkpoint: Checkpoint) -> None:
        if not checkpoint:
            return
        assert self._claim is not None, "the session is not open"
        positions = dict(checkpoint.positions)
        await self._broker.write(
            Writer.commit,
            checkpoint,
            self._claim,
            done=lambda: self.positions.update(positions),
        )

    async def append(self, outputs: list[Output], *, durable: bool = False) -> list[int]:
        return await self._broker.write(Writer.append, outputs, durable)

    def partitions_of(self, topic: str) -> int:
        return self._broker.partitions_of(topic)

    async def most_bytes(self, topic: str) -> int:
        return sys.maxsize

    def is_sure(self) -> bool:
        return True

    def behind(self) -> dict[str, int]:
        ends = self._broker.reader.ends(list(self._tp_ids.values()))
        behind = dict.fromkeys(self._subscription.agents, 0)
        for (agent, tp), position in self.positions.items():
            behind[agent] += max(0, ends[self._tp_ids[tp]] - position)
        return behind

    async def close(self, *, leave: bool = False) -> None:
        self._claim = None
        if self._bell is not None:
            asyncio.get_running_loop().remove_reader(self._bell)
            self._bell.close()
            self._bell = None
        self._broker.closed(self)

    def _read(self, max_events: int) -> list[Batch]:
        reader = self._broker.reader
        ends = reader.ends(list(self._tp_ids.values()))
        ready = [tp for tp in self._turn_of if ends[self._tp_ids[tp]] > self._next[tp]]
        batches: list[Batch] = []
        events_left, bytes_left = max_events, MAX_CHUNK_BYTES
        for index, tp in enumerate(ready):
            share = max(1, events_left // (len(ready) - index))
            batch = reader.read(tp, self._tp_ids[tp], self._next[tp], share, bytes_left)
            if batch is None:
                continue
            batches.append(batch)
            self._next[tp] = batch.end
            events_left -= len(batch.values)
            bytes_left -= sum(map(len, filter(None, batch.values)))
            if events_left <= 0 or bytes_left <= 0:
                # The next chunk begins with the partition that had to wait.
                place = self._turn_of.index(tp) + 1
                self._turn_of = self._turn_of[place:] + self._turn_of[:place]
                break
        return batches

    async def _wait_ring(self) -> None:
        if self._rung:
            return
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        safety = loop.call_later(SAFETY_POLL_S, self._wake)
        try:
            await self._waiter
        finally:
            safety.cancel()
            self._waiter = None

    def _ring(self, bell: socket.socket) -> None:
        drain(bell)
        self._rung = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _short(subscription: Subscription) -> str:
    # The path of a Unix socket is short; the checksum tells long names apart.
    group = subscription.group
    readable = group[:20].replace("/", "_")
    return f"{readable}-{zlib.crc32(group.encode()):08x}#{subscription.slot}"
