"""The app as a client: sends, asks and look-ups from a command or a script.

What is sent is buffered and appended in order, many records at a time; leaving the client waits
until all of it is durable.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from streamd.agentproc.broker.client import LogClient, locked
from streamd.agentproc.broker.condition import refuse_network_folder
from streamd.agentproc.broker.embedded import EmbeddedBroker
from streamd.agentproc.broker.outside import log_of
from streamd.agentproc.lookup import RemoteTables
from streamd.agentproc.replying import take_reply
from streamd.agentproc.routing import place_of
from streamd.agents import Replies
from streamd.app import App
from streamd.cli.target import living
from streamd.config import broker_kind
from streamd.context import Record, RecordMetadata
from streamd.errors import Busy
from streamd.instance import Folder, folders, instance_name
from streamd.wire import OutRecord

BATCH_RECORDS = 2000
BUFFERED_RECORDS = 20_000  # a send waits above this
REPLY_WAIT_S = 5.0


class Pending:
    """The result of a send: awaiting it waits until the record is durable."""

    __slots__ = ("_future",)

    def __init__(self, future: "asyncio.Future[RecordMetadata]") -> None:
        self._future = future

    def __await__(self) -> Generator[Any, None, RecordMetadata]:
        return (yield from asyncio.shield(self._future).__await__())


class Client:
    """What `app.current_client` is inside `async with app.client():`."""

    def __init__(self, app: App, log: LogClient) -> None:
        self._app = app
        self._log = log
        self._buffer: list[tuple[OutRecord, asyncio.Future[RecordMetadata]]] = []
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._error: BaseException | None = None

    async def send(self, topic: str, record: Record) -> Pending:
        """Buffer one record; waits where very many are buffered.

        Raises:
            BrokerError: An earlier record could not be appended; neither was this one.
        """
        self._raise_error()
        future: asyncio.Future[RecordMetadata] = asyncio.get_running_loop().create_future()
        out = OutRecord(
            topic, record.key, record.value, record.partition, record.timestamp or 0.0,
            record.headers,
        )  # fmt: skip
        self._buffer.append((out, future))
        self._filled.set()
        while len(self._buffer) > BUFFERED_RECORDS:
            self._emptied.clear()
            await self._emptied.wait()
            self._raise_error()
        return Pending(future)

    async def send_now(self, topic: str, record: Record) -> RecordMetadata:
        """Append one record and wait until it is durable."""
        return await (await self.send(topic, record))

    async def flush(self) -> None:
        """Wait until everything that was sent is durable."""
        if self._buffer:
            await asyncio.wait([future for _, future in self._buffer])
        self._raise_error()

    async def append_buffered(self) -> None:
        """Append what is buffered, for ever. Runs as a task."""
        while True:
            await self._filled.wait()
            batch = self._buffer[:BATCH_RECORDS]
            try:
                placed = await self._log.append([out for out, _ in batch])
            except Exception as error:
                self._fail(error)
                return
            del self._buffer[: len(batch)]
            if not self._buffer:
                self._filled.clear()
            self._emptied.set()
            for (out, future), (partition, offset) in zip(batch, placed, strict=True):
                if not future.done():
                    future.set_result(
                        RecordMetadata(out.topic, partition, offset, out.timestamp)
                    )

    async def open_replies(self, tasks: set[asyncio.Task[None]]) -> Replies:
        """Begin to receive replies, on one topic that all clients of the app share."""
        topic = f"{self._app.id}-reply-clients"
        # The record says where the topic ends now, and makes it where it is not there.
        mark = OutRecord(topic, uuid.uuid4().bytes, None, partition=0)
        [(_, offset)] = await self._log.append([mark])
        replies = Replies(topic)

        async def take(position: int) -> None:
            index = 0
            while True:
                for record in await self._log.fetch(
                    topic, 0, position, 1000, REPLY_WAIT_S, index
                ):
                    position, index = record.offset, record.index + 1
                    if record.value is not None:
                        take_reply(replies, record.value)

        tasks.add(asyncio.create_task(take(offset + 1), name="replies"))
        return replies

    def _fail(self, error: Exception) -> None:
        self._error = error
        buffered, self._buffer = self._buffer, []
        for _, future in buffered:
            if not future.done():
                future.set_exception(error)
                future.exception()  # told to whoever sends or leaves next
        self._emptied.set()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


@asynccontextmanager
async def open_client(app: App) -> AsyncIterator[Client]:
    """Connect `app` to its running instance, or to its log where none runs.

    Raises:
        ConfigError: The broker is one that cannot be used from outside.
        BrokerError: It cannot be used now.
    """
    app.finalize()
    folder, datadir = _instance_of(app)
    _look_elsewhere(app, folder)
    if living(folder) is None and broker_kind(app.settings.broker) == "embedded":
        await _declare(app, datadir)
    tasks: set[asyncio.Task[None]] = set()
    async with log_of(app, folder, datadir) as log:
        client = Client(app, log)
        tasks.add(asyncio.create_task(client.append_buffered(), name="appends"))
        app.current_client = client
        app.open_replies = lambda: client.open_replies(tasks)
        try:
            yield client
        finally:
            try:
                await client.flush()
            finally:
                app.current_client, app.open_replies = None, None
                app.forget_replies()
                for task in tasks:
                    task.cancel()


async def _declare(app: App, datadir: Path) -> None:
    """Make the app's topics as the app says, for no master did it yet.

    A topic that is only sent to gets the default number of partitions, and the next start
    would refuse it.
    """
    refuse_network_folder(datadir)
    hello = app.hello("", alone=False)
    try:
        with locked(datadir):
            broker = EmbeddedBroker(datadir, datadir)
            try:
                await broker.declare(hello.topics, hello.tables, hello.groups)
            finally:
                await broker.close()
    except Busy:
        # A master that starts just now declares them itself.
        return


def _instance_of(app: App) -> tuple[Folder, Path]:
    """The runtime folder and data directory of the app's instance, whether it runs or not."""
    assert app.settings.datadir is not None
    datadir = app.settings.datadir.absolute()
    for folder in folders():
        record = folder.read_record()
        if record is not None and record.app_id == app.id and Path(record.datadir) == datadir:
            return folder, datadir
    return Folder.of(instance_name(app.module, None)), datadir


def _look_elsewhere(app: App, folder: Folder) -> None:
    remote = RemoteTables(
        str(folder.path),
        {group.name: group.processes for group in app.groups},
        {table.name: table.group for table in app.tables.values()},
    )
    for table in app.tables.values():
        table.look_elsewhere(remote, place_of(app, table))
