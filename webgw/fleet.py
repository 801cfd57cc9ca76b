"""What the master told about the instance, and the kept links to its processes.

One connection a process, made when it is first needed; any number of requests share it.
"""

import asyncio
import logging
import time
from typing import Any

import msgspec

from streamd.errors import StreamdError, TimedOut
from streamd.link import Link, LinkLost, connect
from streamd.webgw.client import Unreachable
from streamd.webgw.hosts import SCHEME, Hosts
from streamd.webgw.options import WebOptions
from streamd.webgw.owners import OwnerMap
from streamd.webgw.routes import RouteTable
from streamd.wire import (
    Message,
    Owner,
    Owners,
    Refusal,
    RouteInfo,
    Site,
    Snapshot,
    TableInfo,
)

log = logging.getLogger(__name__)


class NotReached(LinkLost):
    """The process could not be asked: nothing was sent."""


class Fleet:
    """The instance, seen from its gateway."""

    def __init__(self) -> None:
        self.app_id = ""
        self.instance = ""
        self.options = WebOptions()
        self.routes = RouteTable()
        self.route_infos: list[RouteInfo] = []
        self.tables: dict[str, TableInfo] = {}
        self.owners = OwnerMap()
        self.hosts = Hosts(lambda: self.options.token)
        self.snapshot: dict[str, Any] | None = None
        self.snapshot_json = b""
        self.snapshot_at = 0.0  # monotonic
        self.told = asyncio.Event()  # set once `Site` came
        self._links: dict[str, Link] = {}  # address -> link
        self._connecting: dict[str, asyncio.Lock] = {}  # address -> one connect at a time
        self._owners_changed = asyncio.Event()

    # What the master says.

    def take_site(self, site: Site) -> None:
        """Serve these pages from now on. A site that cannot be read changes nothing."""
        routes = RouteTable(site.routes)
        self.options = WebOptions.of(site.settings)
        self.routes = routes
        self.route_infos = site.routes
        self.tables = {table.name: table for table in site.tables}
        self.app_id = site.app_id
        self.instance = site.instance
        self.hosts.take_site(site)
        self.told.set()

    def take_owners(self, owners: Owners) -> None:
        """Route by these owners from now on, unless they are older than what is known."""
        self.owners = self.owners.updated(owners)
        self._owners_changed.set()
        self._owners_changed = asyncio.Event()

    def take_snapshot(self, snapshot: Snapshot) -> None:
        self.snapshot = msgspec.json.decode(snapshot.data)
        self.snapshot_json = snapshot.data
        self.snapshot_at = time.monotonic()

    # What the gateway asks.

    async def wait_owners(self, known: OwnerMap, timeout_s: float) -> None:
        """Wait until the master has said something newer than `known`, or for `timeout_s`."""
        if self.owners is not known:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._owners_changed.wait()
        except TimeoutError:
            return

    async def ask(self, owner: Owner, message: Message, timeout_s: float | None) -> Message:
        """Ask a process of the fleet, or the gateway of another host.

        Raises:
            NotReached: Nobody listens at its address; the request was not sent.
            LinkLost: The process went away; whether it did what was asked is not known.
            TimedOut: No answer in `timeout_s`.
            StreamdError: It refused.
        """
        try:
            async with asyncio.timeout(timeout_s):
                if owner.address.startswith(SCHEME):
                    return await self._ask_host(owner, message)
                link = await self._link(owner)
                return await link.request(message)
        except TimeoutError:
            raise TimedOut(
                f"{owner.process} did not answer {type(message).__name__} in {timeout_s:g} s"
            ) from None

    async def _ask_host(self, owner: Owner, message: Message) -> Message:
        try:
            answer = await self.hosts.ask(owner, message)
        except Unreachable as error:
            raise NotReached(str(error)) from error
        if isinstance(answer, Refusal):
            raise StreamdError(answer.message, seen=answer.seen, remedy=answer.remedy)
        return answer

    async def _link(self, owner: Owner) -> Link:
        async with self._connecting.setdefault(owner.address, asyncio.Lock()):
            link = self._links.get(owner.address)
            if link is not None and not link.closed.is_set():
                return link
            try:
                link = await connect(owner.address, owner.process)
            except LinkLost as error:
                raise NotReached(str(error)) from error
            self._links[owner.address] = link
            return link
