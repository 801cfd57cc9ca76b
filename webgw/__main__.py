"""The web process: `python -m streamd.webgw LINK_FD LISTEN_FD`.

LINK_FD is its end of the link to the master, LISTEN_FD the listening socket. It serves from
the first `Site` on and then says `Ready`. TERM, or the end of the link, ends it: status 0, or
70 when the master went away. It keeps nothing: it may be killed at any time.
"""

import asyncio
import faulthandler
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import uvloop

from streamd.instance import Folder
from streamd.link import Answer, Link, adopt, serve
from streamd.log import setup_child_logging
from streamd.webgw.fleet import Fleet
from streamd.webgw.gateway import Gateway
from streamd.webgw.guard import Guard
from streamd.webgw.http import serve_http
from streamd.webgw.live import Hub
from streamd.webgw.pages import Pages
from streamd.wire import Message, Note, Owners, Ready, Site, Snapshot

log = logging.getLogger(__name__)

EXIT_MASTER_GONE = 70


async def run(link_fd: int, listen_fd: int) -> int:
    """Serve until told to end; the exit status."""
    fleet = Fleet()
    hub = Hub()
    pages = Pages(fleet, hub)
    stop = asyncio.Event()

    servers: list[asyncio.Server] = []

    async def serve_agents(site: Site) -> None:
        """Take look-ups of this host's agents for what other hosts have."""
        if fleet.hosts.are_there and not servers:
            address = Folder(Path(site.runtime_dir)).gateway_path
            servers.append(await serve(address, "an agent process", pages.hops.from_agent))

    async def take(link: Link, message: Message) -> Answer:
        if isinstance(message, Site):
            fleet.take_site(message)
            await serve_agents(message)
        elif isinstance(message, Owners):
            fleet.take_owners(message)
        elif isinstance(message, Snapshot):
            fleet.take_snapshot(message)
            pages.publish()
        else:
            log.warning("the master sent a %s, which is not for us", type(message).__name__)
        return None

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    end = socket.socket(fileno=link_fd)
    end.setblocking(False)
    link = await adopt(end, "master", take, on_lost=lambda link: stop.set())
    fleet.hosts.tell = lambda text: link.send(Note("WARNING", text))
    await _first(fleet.told, stop)
    if not stop.is_set():
        link.send(Ready([]))
        await serve_http(
            Guard(Gateway(fleet, pages.app), lambda: fleet.options),
            listen_fd,
            stop,
            hub,
            access_log=fleet.options.access_log,
        )
    return EXIT_MASTER_GONE if link.closed.is_set() else 0


async def _first(*events: asyncio.Event) -> None:
    waits = [asyncio.create_task(event.wait(), name="wait") for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


def main() -> None:
    link_fd, listen_fd = int(sys.argv[1]), int(sys.argv[2])
    # Terminal and log signals are the master's to obey.
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    setup_child_logging("info")
    Path("/proc/self/comm").write_text("web")
    status = uvloop.run(run(link_fd, listen_fd))
    logging.shutdown()
    # Nothing here has to be tidied up, and a thread of a library must not hold the end back.
    os._exit(status)


if __name__ == "__main__":
    main()
