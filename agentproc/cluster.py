"""The process `log` of an instance on Kafka: it keeps the app's topics and serves the outside.

    python -m streamd.agentproc.cluster LINK_FD DATADIR ADDRESS

What `streamd.agentproc.log` is on the embedded log: it appends and reads for whoever has no
session, the command line and the app's commands. It makes topics, tells how far behind the
groups are, and trims. It runs no user code and keeps nothing, so it may end at any time. TERM
ends with 0, QUIT at once with 3, the end of the link to the master with 70.
"""

import asyncio
import logging
import os
import socket
from pathlib import Path

from streamd.agentproc.broker.kafka import KafkaBroker
from streamd.agentproc.kafka.client import KafkaLog
from streamd.agentproc.kafka.installation import installation
from streamd.agentproc.kafka.keeping import Keeper
from streamd.agentproc.standalone import begin, ends_with_master, obey_signals
from streamd.config import Settings
from streamd.errors import BrokerError, StreamdError, WireError
from streamd.link import Answer, Link, adopt, serve
from streamd.wire import (
    Append,
    Appended,
    Declare,
    Describe,
    Done,
    Failing,
    Fetch,
    Fetched,
    Lag,
    LagRow,
    Lags,
    LogState,
    LogTopics,
    LogTopicsReply,
    Message,
    Ready,
)

log = logging.getLogger(__name__)

TICK_S = 1.0
PATIENCE_S = 5.0  # of who asks from outside


class Cluster:
    """What the process knows once the master has declared the app."""

    link: Link

    def __init__(self, datadir: Path) -> None:
        self._datadir = datadir
        self._log: KafkaLog | None = None
        self._keeper: Keeper | None = None
        self._loop = asyncio.get_running_loop()

    async def answer_master(self, link: Link, message: Message) -> Answer:
        """Answer what comes over the link to the master."""
        if isinstance(message, Declare):
            await self._declare(message)
            return Done()
        return await self.answer(link, message)

    async def answer(self, link: Link, message: Message) -> Answer:
        """Answer a client."""
        if self._log is None:
            raise BrokerError("the app is not known yet", remedy="try again when it runs")
        match message:
            case Append():
                return Appended(await self._log.append(message.records))
            case Fetch():
                records = await self._log.fetch(
                    message.topic, message.partition, message.offset, message.limit,
                    message.wait_s, message.index,
                )  # fmt: skip
                return Fetched(records)
            case LogTopics():
                return LogTopicsReply(await self._log.topics())
            case Lag():
                return Lags(await self._log.lag())
            case Describe():
                broker = self._log.broker
                group = f"{broker.settings.id}.{message.group}"
                return await asyncio.to_thread(broker.roster.ask, group)
        raise WireError(f"unexpected {type(message).__name__} on {link.name}")

    async def _declare(self, declared: Declare) -> None:
        settings, here = Settings.of_plain(declared.settings), installation(self._datadir)
        await self.close()
        # Who asks from outside is told that the cluster is away; the app waits for it, however
        # long: who needs a topic waits, not the start of this process.
        asked = KafkaBroker(settings, declared.topics, here, PATIENCE_S)
        self._log = KafkaLog(asked, declared.groups)
        broker = KafkaBroker(settings, declared.topics, here)
        self._keeper = Keeper(broker, declared, self._tell, self._failed)
        self._keeper.start()

    def _tell(self, rows: list[LagRow]) -> None:
        self._loop.call_soon_threadsafe(self.link.send, Lags(rows))

    def _failed(self, error: StreamdError) -> None:
        self._loop.call_soon_threadsafe(self._end, error)

    def _end(self, error: StreamdError) -> None:
        log.error("%s", error)
        self.link.send(Failing(str(error), error.seen, error.remedy, error.exit_code))
        self.link.flush()
        os._exit(error.exit_code)

    async def close(self) -> None:
        """Let go of the connections."""
        if self._keeper is not None:
            self._keeper.end()
        if self._log is not None:
            await self._log.close()


async def _run(end: socket.socket, datadir: Path, address: Path) -> int:
    stopping = obey_signals()
    cluster = Cluster(datadir)
    link = cluster.link = await adopt(
        end, "master", cluster.answer_master, on_lost=ends_with_master(stopping)
    )
    server = await serve(address, "log client", cluster.answer)
    link.send(Ready([]))
    while not stopping.is_set():
        link.send(LogState(0, 0))
        try:
            async with asyncio.timeout(TICK_S):
                await stopping.wait()
        except TimeoutError:
            continue
    server.close()
    await cluster.close()
    link.close()
    return 0


def main() -> None:
    """Run the process that the arguments describe."""
    arguments = begin()
    loop = asyncio.new_event_loop()
    code = loop.run_until_complete(_run(*arguments))
    # The loop is not closed: it would wait for threads that wait for the cluster.
    os._exit(code)


if __name__ == "__main__":
    main()
