"""The process `log` of an instance: it keeps the embedded log's file in order and serves it.

    python -m streamd.agentproc.log LINK_FD DATADIR ADDRESS

At start it sees that the file can be trusted. Then it alone checkpoints the WAL and trims, and
it appends and reads for whoever has no session: the command line, the app's commands. It runs
no user code. TERM empties the WAL and ends with 0, QUIT ends at once with 3, the end of the
link to the master with 70.
"""

import asyncio
import contextlib
import functools
import logging
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from streamd.agentproc.broker import Output
from streamd.agentproc.broker.ballast import Ballast
from streamd.agentproc.broker.client import describe_lag, describe_topics, fetch_from
from streamd.agentproc.broker.condition import check_log, refuse_network_folder
from streamd.agentproc.broker.embedded import EmbeddedBroker
from streamd.agentproc.broker.placing import Placing, placed
from streamd.agentproc.broker.retention import trim_step
from streamd.agentproc.broker.schema import log_path
from streamd.agentproc.broker.turnstile import Turnstile
from streamd.agentproc.broker.wal import Checkpointer
from streamd.agentproc.broker.writer import Writer
from streamd.agentproc.standalone import begin, ends_with_master, obey_signals
from streamd.errors import BrokerError, LogDamaged, StreamdError, WireError
from streamd.link import Answer, Link, adopt, serve
from streamd.wire import (
    Append,
    Appended,
    Declare,
    Done,
    Failing,
    Fetch,
    Fetched,
    Lag,
    Lags,
    LogState,
    LogTopics,
    LogTopicsReply,
    Message,
    Note,
    OutRecord,
    Ready,
)

log = logging.getLogger(__name__)

TICK_S = 1.0
# With less, SQLite soon fails in the middle of something.
LOW_DISK_BYTES = 2 * 1024 * 1024


_InThread = Callable[[Callable[[], object]], Awaitable[object]]
_Answers = asyncio.Future[list[tuple[int, int]]]


class LogProcess:
    """The parts of the process, from their opening to their closing."""

    def __init__(self, datadir: Path, address: Path, link: Link) -> None:
        self._datadir = datadir
        self._address = address
        self._link = link
        self._broker = EmbeddedBroker(datadir, address.parent)
        self._ballast = Ballast(datadir)
        self._placing = Placing(self._broker.partitions_of)
        self._pending: list[tuple[list[OutRecord], _Answers]] = []
        self._appending: asyncio.Task[None] | None = None
        self._in_trouble = ""  # what was told last
        self._closing = False
        self._kept_s: float | None = None  # by topics that name no retention; None: for ever

    async def run(self, stopping: asyncio.Event) -> None:
        """Open, serve until `stopping`, close with an empty WAL.

        Raises:
            StreamdError: The data directory cannot be used, or not any more.
        """
        refuse_network_folder(self._datadir)
        with (
            self._opened() as (turnstile, checkpointer),
            ThreadPoolExecutor(1, thread_name_prefix="checkpoint") as thread,
        ):
            loop = asyncio.get_running_loop()
            self._ballast.take()
            server = await serve(self._address, "log client", self._answer)
            self._link.send(Ready([]))
            # A task of its own: who has the turn is told while the housekeeping waits for it.
            telling = asyncio.create_task(self._tell(turnstile, checkpointer), name="tell")
            while not stopping.is_set():
                await self._keep_house(
                    functools.partial(loop.run_in_executor, thread), checkpointer
                )
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stopping.wait(), TICK_S)
            server.close()
            # Clients that are connected already may still ask.
            self._closing = True
            telling.cancel()
            if self._appending is not None:
                await self._appending
            await loop.run_in_executor(thread, checkpointer.truncate)
        await self._broker.close()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[Turnstile, Checkpointer]]:
        reader = self._broker.reader
        turnstile = Turnstile(self._datadir)
        checkpointer = Checkpointer(self._datadir)
        try:
            check_log(reader.db, self._datadir)
            yield turnstile, checkpointer
        finally:
            checkpointer.close()
            turnstile.close()

    # Requests.

    async def answer_master(self, link: Link, message: Message) -> Answer:
        """Answer what comes over the link to the master."""
        if isinstance(message, Declare):
            await self._broker.declare(message.topics, message.tables, message.groups)
            self._kept_s = message.retention_s
            return Done()
        return await self._answer(link, message)

    async def _answer(self, link: Link, message: Message) -> Answer:
        if self._closing:
            raise BrokerError("the log is being closed", remedy="try again when it runs")
        match message:
            case Append():
                return Appended(await self._append(message.records))
            case Fetch():
                records = await fetch_from(
                    self._broker.reader,
                    message.topic,
                    message.partition,
                    message.offset + message.index,
                    message.limit,
                    message.wait_s,
                )
                return Fetched(records)
            case LogTopics():
                return LogTopicsReply(describe_topics(self._broker.reader))
            case Lag():
                return Lags(describe_lag(self._broker.reader))
        raise WireError(f"unexpected {type(message).__name__} on {link.name}")

    # Appends: all that came while the last transaction was synced go into the next one.

    async def _append(self, records: list[OutRecord]) -> list[tuple[int, int]]:
        if not records:
            return []
        done: _Answers = asyncio.get_running_loop().create_future()
        self._pending.append((records, done))
        if self._appending is None:
            self._appending = asyncio.create_task(self._append_pending(), name="append")
        return await done

    async def _append_pending(self) -> None:
        try:
            while self._pending:
                pending, self._pending = self._pending, []
                try:
                    await self._append_together(pending)
                except BaseException as error:
                    for _, done in pending:
                        _settle(done, error)
                    raise
        finally:
            self._appending = None

    async def _append_together(self, pending: list[tuple[list[OutRecord], _Answers]]) -> None:
        outputs: list[Output] = []
        answers = []
        now = time.time()
        for records, done in pending:
            try:
                own, places = self._placing.outputs(records, now)
            except StreamdError as error:
                _settle(done, error)
                continue
            answers.append((done, len(outputs), own, places))
            outputs += own
        try:
            firsts = await self._broker.write(Writer.append, outputs, True) if outputs else []
        except StreamdError as error:
            for done, _, _, _ in answers:
                _settle(done, error)
            return
        for done, start, own, places in answers:
            _settle(done, placed(own, firsts[start : start + len(own)], places))

    # Once a second.

    async def _keep_house(self, run: _InThread, checkpointer: Checkpointer) -> None:
        self._watch_disk()
        try:
            await run(checkpointer.step)
            while await self._broker.write(trim_step, time.time(), self._kept_s):
                await asyncio.sleep(0)
            self._recovered()
        except LogDamaged:
            raise
        except BrokerError as error:
            self._trouble(str(error))

    def _watch_disk(self) -> None:
        ballast = self._ballast
        free = ballast.free_bytes()
        if free < LOW_DISK_BYTES and ballast.held_bytes:
            given = ballast.give_up()
            self._trouble(
                f"the disk of {self._datadir} is full: {free} bytes were free; "
                f"{given} bytes kept for this were given up"
            )

    def _trouble(self, text: str) -> None:
        if text != self._in_trouble:
            log.error("%s", text)
            self._link.send(Note("ERROR", text))
        self._in_trouble = text

    def _recovered(self) -> None:
        if self._in_trouble and self._ballast.free_bytes() > 2 * LOW_DISK_BYTES:
            self._ballast.take()
            self._in_trouble = ""
            log.info("the log can be written again")
            self._link.send(Note("INFO", "the log can be written again"))

    async def _tell(self, turnstile: Turnstile, checkpointer: Checkpointer) -> None:
        last: tuple[int, int] | None = None
        since = 0.0
        while True:
            now = time.monotonic()
            if (turn := turnstile.turn()) != last:
                last, since = turn, now
            size = log_path(self._datadir).stat().st_size
            holder, held_s = (turn[0], now - since) if turn is not None else (0, 0.0)
            self._link.send(LogState(checkpointer.wal_bytes, size, holder, held_s))
            await asyncio.sleep(TICK_S)


def _settle(done: _Answers, answer: list[tuple[int, int]] | BaseException) -> None:
    if done.done():
        return
    if isinstance(answer, BaseException):
        done.set_exception(answer)
    else:
        done.set_result(answer)


async def _run(end: socket.socket, datadir: Path, address: Path) -> int:
    loop = asyncio.get_running_loop()
    stopping = obey_signals()
    requests: asyncio.Future[LogProcess] = loop.create_future()

    async def answer(link: Link, message: Message) -> Answer:
        return await (await requests).answer_master(link, message)

    link = await adopt(end, "master", answer, on_lost=ends_with_master(stopping))
    process = LogProcess(datadir, address, link)
    requests.set_result(process)
    try:
        await process.run(stopping)
    except StreamdError as error:
        log.error("%s", error)
        stopping.set()
        link.send(Failing(str(error), error.seen, error.remedy, error.exit_code))
        link.close()
        await link.closed.wait()
        return error.exit_code
    link.close()
    return 0


def main() -> None:
    """Run the process that the arguments describe."""
    arguments = begin()
    sys.exit(asyncio.run(_run(*arguments)))


if __name__ == "__main__":
    main()
