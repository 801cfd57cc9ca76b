"""The log for whoever is outside the tree: `send`, `consume`, `topics`, the app's commands.

While a master lives, the process `log` does the work, over its socket. Otherwise the file is
opened here, under the data directory's lock, which a master would hold.
"""

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from streamd.agentproc.broker.condition import check_log, refuse_network_folder
from streamd.agentproc.broker.embedded import EmbeddedBroker
from streamd.agentproc.broker.placing import Placing, placed
from streamd.agentproc.broker.reader import Reader
from streamd.agentproc.broker.wal import Checkpointer
from streamd.agentproc.broker.writer import Writer
from streamd.errors import BrokerError, Busy, NotPermitted
from streamd.instance import Folder
from streamd.link import Link, LinkLost, connect
from streamd.wire import (
    Append,
    Appended,
    Fetch,
    Fetched,
    FetchedRecord,
    Lag,
    LagRow,
    Lags,
    LogTopic,
    LogTopics,
    LogTopicsReply,
    OutRecord,
)

# A master that starts has the lock before its log listens.
START_S = 5.0
_RETRY_S = 0.05
_FETCH_POLL_S = 0.05
_MAX_FETCH_BYTES = 4 * 1024 * 1024
_MAX_APPEND_BYTES = 4 * 1024 * 1024
_RECORD_BYTES = 64


class LogClient(Protocol):
    """What can be done from outside. Every call may raise BrokerError."""

    async def append(self, records: list[OutRecord]) -> list[tuple[int, int]]:
        """Append; partition and offset of each, once all survive a loss of power."""

    async def fetch(
        self,
        topic: str,
        partition: int,
        offset: int,
        limit: int,
        wait_s: float,
        index: int = 0,
    ) -> list[FetchedRecord]:
        """Up to `limit` records from `offset`, `index` on; waits up to `wait_s` for one."""

    async def topics(self) -> list[LogTopic]:
        """Every topic with its ends and its size, by name."""

    async def lag(self) -> list[LagRow]:
        """How far each agent is, by topic and partition."""


@contextlib.asynccontextmanager
async def open_log(folder: Folder, datadir: Path) -> AsyncIterator[LogClient]:
    """The log of an instance, by whichever way is open.

    Raises:
        Busy: The data directory is locked, and nobody answers at the log's socket.
        LogDamaged: The log cannot be trusted.
        BrokerError: It cannot be opened.
    """
    deadline = time.monotonic() + START_S
    while True:
        try:
            link = await connect(folder.log_path, "log")
        except LinkLost:
            pass
        else:
            with contextlib.closing(link):
                yield _RemoteLog(link)
            return
        try:
            with locked(datadir):
                async with _opened_here(datadir) as here:
                    yield here
                return
        except _Locked as error:
            if time.monotonic() > deadline:
                raise Busy(str(error), remedy=error.remedy) from None
        await asyncio.sleep(_RETRY_S)


@contextlib.asynccontextmanager
async def remote_log(folder: Folder) -> AsyncIterator[LogClient]:
    """The log through the process `log` of a running instance.

    Raises:
        LinkLost: None runs.
    """
    with contextlib.closing(await connect(folder.log_path, "log")) as link:
        yield _RemoteLog(link)


class _Locked(Busy):
    """The data directory's lock is held."""


@contextlib.contextmanager
def locked(datadir: Path) -> Iterator[None]:
    """Hold `DATADIR/lock`, which the master of an instance holds while it lives.

    Raises:
        Busy: Another process holds it.
        NotPermitted: The data directory cannot be made or written.
    """
    try:
        datadir.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(datadir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NotPermitted(
            f"the data directory {datadir} cannot be used: {error.strerror}",
            remedy="choose a folder of yours with --datadir",
        ) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _Locked(
                f"the data directory {datadir} is in use by another process",
                remedy="stop the instance that uses it, or choose another --datadir",
            ) from None
        yield
    finally:
        os.close(fd)


def describe_topics(reader: Reader) -> list[LogTopic]:
    """Every topic of the log, by name."""
    ends = reader.extents()
    return [
        LogTopic(
            topic.name,
            [(low, end) for low, end, _ in _of(ends, topic.first_tp, topic.partitions)],
            sum(size for _, _, size in _of(ends, topic.first_tp, topic.partitions)),
            topic.owned,
        )
        for topic in sorted(reader.catalog.topics.values(), key=lambda topic: topic.name)
    ]


def describe_lag(reader: Reader) -> list[LagRow]:
    """How far each agent is in each partition that it reads, by name."""
    extents = reader.extents()
    positions = reader.positions()
    rows = []
    for agent, name in reader.readers():
        topic = reader.catalog.topics[name]
        for tp_id in range(topic.first_tp, topic.first_tp + topic.partitions):
            low, end, _ = extents[tp_id]
            at = positions.get((agent, tp_id))
            behind = end - max(low, at or 0)
            rows.append(LagRow(agent, name, tp_id - topic.first_tp, at, end, behind))
    return rows


def _of(
    ends: dict[int, tuple[int, int, int]], first: int, count: int
) -> list[tuple[int, int, int]]:
    return [ends[tp_id] for tp_id in range(first, first + count)]


async def fetch_from(
    reader: Reader, topic: str, partition: int, offset: int, limit: int, wait_s: float
) -> list[FetchedRecord]:
    """Up to `limit` records of the log that `reader` reads; waits for the first.

    Raises:
        BrokerError: The log has no such partition.
    """
    deadline = time.monotonic() + wait_s
    while True:
        batch = reader.fetch(topic, partition, max(0, offset), max(1, limit), _MAX_FETCH_BYTES)
        if batch is not None:
            headers = batch.headers or [[]] * len(batch.values)
            columns = zip(
                batch.positions,
                batch.keys,
                batch.values,
                batch.timestamps,
                headers,
                strict=True,
            )
            return [FetchedRecord(*row) for row, _ in zip(columns, range(limit), strict=False)]
        if time.monotonic() >= deadline:
            return []
        await asyncio.sleep(min(_FETCH_POLL_S, max(0.0, deadline - time.monotonic())))


class _RemoteLog:
    """The log through the socket of the process `log`."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def append(self, records: list[OutRecord]) -> list[tuple[int, int]]:
        placed: list[tuple[int, int]] = []
        for part in _parts(records):
            answer = await self._link.request(Append(part))
            assert isinstance(answer, Appended)
            placed += answer.placed
        return placed

    async def fetch(
        self,
        topic: str,
        partition: int,
        offset: int,
        limit: int,
        wait_s: float,
        index: int = 0,
    ) -> list[FetchedRecord]:
        asked = Fetch(topic, partition, offset, limit, wait_s, index)
        answer = await self._link.request(asked)
        assert isinstance(answer, Fetched)
        return answer.records

    async def topics(self) -> list[LogTopic]:
        answer = await self._link.request(LogTopics())
        assert isinstance(answer, LogTopicsReply)
        return answer.topics

    async def lag(self) -> list[LagRow]:
        answer = await self._link.request(Lag())
        assert isinstance(answer, Lags)
        return answer.rows


def _parts(records: Sequence[OutRecord]) -> Iterator[list[OutRecord]]:
    """Cut records so that each part fits a frame."""
    part: list[OutRecord] = []
    size = 0
    for record in records:
        headers = sum(len(name) + len(value) for name, value in record.headers)
        own = len(record.key or b"") + len(record.value or b"") + headers + _RECORD_BYTES
        if part and size + own > _MAX_APPEND_BYTES:
            yield part
            part, size = [], 0
        part.append(record)
        size += own
    if part:
        yield part


class _LocalLog:
    """The log in this process."""

    def __init__(self, broker: EmbeddedBroker) -> None:
        self._broker = broker
        self._placing = Placing(broker.partitions_of)

    async def append(self, records: list[OutRecord]) -> list[tuple[int, int]]:
        outputs, places = self._placing.outputs(records, time.time())
        firsts = await self._broker.write(Writer.append, outputs, True)
        return placed(outputs, firsts, places)

    async def fetch(
        self,
        topic: str,
        partition: int,
        offset: int,
        limit: int,
        wait_s: float,
        index: int = 0,
    ) -> list[FetchedRecord]:
        start = offset + index
        return await fetch_from(self._broker.reader, topic, partition, start, limit, wait_s)

    async def topics(self) -> list[LogTopic]:
        return describe_topics(self._broker.reader)

    async def lag(self) -> list[LagRow]:
        return describe_lag(self._broker.reader)


@contextlib.asynccontextmanager
async def _opened_here(datadir: Path) -> AsyncIterator[_LocalLog]:
    refuse_network_folder(datadir)
    broker = EmbeddedBroker(datadir, datadir)
    checkpointer = Checkpointer(datadir)
    try:
        check_log(broker.reader.db, datadir)
        yield _LocalLog(broker)
        with contextlib.suppress(BrokerError):
            checkpointer.truncate()
    finally:
        checkpointer.close()
        await broker.close()
