"""Reading the tables of other groups, from their owners.

`RemoteTables.get` waits and may be called in any thread, the loop's included; `get_soon` is the
same for code that can await. Both see what the owner has committed. An owner that is not there,
or recovers, is asked again until the deadline: a restart takes some hundredths of a second.
"""

import asyncio
import glob
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from streamd.agentproc.reads import read_address
from streamd.errors import StreamdError, TimedOut
from streamd.instance import Folder
from streamd.link import Link, LinkLost, connect
from streamd.tables import ScatteredError
from streamd.wire import (
    Found,
    FrameReader,
    Lookup,
    Message,
    Missing,
    Moved,
    Owner,
    Owners,
    Refusal,
    Unavailable,
    encode_frame,
)

DEADLINE_S = 1.0
RETRY_S = 0.01


class RemoteTables:
    """The tables of the app that other processes own."""

    def __init__(
        self,
        runtime_dir: str,
        groups: Mapping[str, int],
        tables: Mapping[str, str],
        *,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """Know the app; owners are told later, by `know`.

        Args:
            groups: How many processes each group has, until owners are known.
            tables: The group of each table.
        """
        self._runtime_dir = Path(runtime_dir)
        # There only where other hosts may have what no process here has.
        self._gateway = Folder(self._runtime_dir).gateway_path
        self._groups = groups
        self._tables = tables
        self._deadline_s = deadline_s
        self._owners: tuple[Owner, ...] = ()  # replaced whole: other threads read it
        self._scattered: frozenset[str] = frozenset()  # tables; replaced whole
        self._lock = threading.Lock()
        self._idle: dict[str, list[_Connection]] = {}  # address -> not in use
        self._links: dict[str, asyncio.Task[Link]] = {}  # address -> connected or on its way

    def know(self, owners: Owners) -> None:
        """Take over who has what."""
        self._owners = tuple(owners.owners)
        self._scattered = frozenset(
            table for owner in owners.owners for table in owner.scattered
        )

    def owners_of(self, table: str, partition: int) -> list[Owner]:
        """Whom to ask for a key of `partition`; -1: every process that has a part of `table`.

        While the owners of a group are not known, these are the processes that will be.
        """
        group = self._tables[table]
        told = {owner.slot: owner for owner in self._owners if owner.group == group}
        slots = max((owner.slots for owner in told.values()), default=self._groups[group])
        known = [told.get(slot) or self._expected(group, slot, slots) for slot in range(slots)]
        if partition < 0:
            return known
        having = [owner for owner in known if partition in (*owner.active, *owner.recovering)]
        # Between two owners, or before the first: the slot that gets it by the usual share.
        return having[:1] or [owner for owner in known if partition % owner.slots == owner.slot]

    def get(self, table: str, key: bytes, partition: int) -> bytes | None:
        """The committed value of `key`, or None.

        Waits, up to the deadline. With a partition of -1, or where the table has keys outside
        of the partition they hash to, every owner is asked.

        Raises:
            TimedOut: An owner did not answer in time; the text names it.
            ScatteredError: Several partitions have the key.
            StreamdError: The owner refused.
        """
        deadline = time.monotonic() + self._deadline_s
        partition = -1 if table in self._scattered else partition
        answers = [
            self._ask(owner, Lookup(table, key, partition), deadline)
            for owner in self._asked(table, partition)
        ]
        return _only(answers, table, key)

    async def get_soon(self, table: str, key: bytes, partition: int) -> bytes | None:
        """The same as `get` for code that awaits; the loop goes on meanwhile."""
        deadline = time.monotonic() + self._deadline_s
        partition = -1 if table in self._scattered else partition
        answers = await asyncio.gather(
            *(
                self._ask_awaiting(owner, Lookup(table, key, partition), deadline)
                for owner in self._asked(table, partition)
            )
        )
        return _only(answers, table, key)

    def close(self) -> None:
        """Close the connections that were kept."""
        with self._lock:
            for connections in self._idle.values():
                for connection in connections:
                    connection.close()
            self._idle.clear()
        for link in self._links.values():
            if link.done() and not link.cancelled() and link.exception() is None:
                link.result().close()

    def _expected(self, group: str, slot: int, slots: int) -> Owner:
        process = f"{group}#{slot}"
        address = str(self._runtime_dir / f"{process}.sock")
        return Owner(group, process, address, slot, slots, [], [])

    def _asked(self, table: str, partition: int) -> list[Owner]:
        owners = self.owners_of(table, partition)
        if not owners:
            raise TimedOut(f"no process has {table}[{partition}]", remedy="streamd status")
        if partition < 0 and self._has_gateway():
            # It knows whether other hosts have a part of the table.
            gateway = str(self._gateway)
            owners.append(Owner(self._tables[table], "the gateway", gateway, -1, 0, [], []))
        return owners

    def _ask(self, owner: Owner, request: Lookup, deadline: float) -> Message:
        state = "is not there"
        for address in self._addresses(owner, request):
            if (left_s := deadline - time.monotonic()) <= 0:
                break
            connection = None
            try:
                connection = self._take(address, left_s)
                answer = connection.ask(request, deadline)
            except TimeoutError:
                state = "did not answer"
            except OSError:
                # Not there, or a kept connection whose other end was replaced.
                state = "is not there"
            else:
                self._put_back(address, connection)
                connection = None
                if not isinstance(answer, Unavailable | Moved):
                    return answer
                state = _reason(answer)
            finally:
                if connection is not None:
                    connection.close()
            time.sleep(max(0.0, min(RETRY_S, deadline - time.monotonic())))
        raise self._timed_out(owner, request, state)

    async def _ask_awaiting(self, owner: Owner, request: Lookup, deadline: float) -> Message:
        state = "is not there"
        for address in self._addresses(owner, request):
            if (left_s := deadline - time.monotonic()) <= 0:
                break
            try:
                async with asyncio.timeout(left_s):
                    link = await self._link(address)
                    answer = await link.request(request)
            except TimeoutError:
                state = "did not answer"
            except LinkLost:
                state = "is not there"
            else:
                if not isinstance(answer, Unavailable | Moved):
                    return answer
                state = _reason(answer)
            await asyncio.sleep(max(0.0, min(RETRY_S, deadline - time.monotonic())))
        raise self._timed_out(owner, request, state)

    def _addresses(self, owner: Owner, request: Lookup) -> Iterator[str]:
        """Where to ask, again and again: the owner, then the others of its group.

        The group may have got another number of processes, and word of it may not have come:
        not to a loop that waits for this answer. Who does not have the partition says so. What
        nobody here is known to have may be on another host, which the gateway asks.
        """
        others = f"{glob.escape(owner.group)}#*.sock"
        gateway = str(self._gateway)
        if request.partition < 0:
            while True:
                yield gateway if owner.address == gateway else read_address(owner.address)
        if request.partition not in (*owner.active, *owner.recovering) and self._has_gateway():
            yield gateway
        while True:
            yield read_address(owner.address)
            for path in sorted(self._runtime_dir.glob(others)):
                yield read_address(str(path))
            if self._has_gateway():
                yield gateway

    def _has_gateway(self) -> bool:
        return self._gateway.exists()

    async def _link(self, address: str) -> Link:
        connecting = self._links.get(address)
        if connecting is None or (
            connecting.done()
            and (connecting.exception() is not None or connecting.result().closed.is_set())
        ):
            connecting = asyncio.create_task(
                connect(address, f"the owner at {address}"), name=f"connect {address}"
            )
            self._links[address] = connecting
        # Shielded: others wait for the same connection.
        return await asyncio.shield(connecting)

    def _timed_out(self, owner: Owner, request: Lookup, state: str) -> TimedOut:
        return TimedOut(
            f"{owner.process}, which has the table {request.table}, {state}; "
            f"waited {self._deadline_s:g} s for a key",
            remedy="streamd status, or streamd stacks " + owner.process,
        )

    def _take(self, address: str, timeout_s: float) -> "_Connection":
        with self._lock:
            if idle := self._idle.get(address):
                return idle.pop()
        return _Connection(address, timeout_s)

    def _put_back(self, address: str, connection: "_Connection") -> None:
        with self._lock:
            self._idle.setdefault(address, []).append(connection)


class _Connection:
    """One blocking connection; one request at a time."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._reader = FrameReader()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(address)
        except OSError:
            self._socket.close()
            raise

    def ask(self, request: Message, deadline: float) -> Message:
        """Send `request` and wait for its answer.

        Raises:
            OSError: The other end is gone, or (TimeoutError) did not answer.
        """
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        self._socket.sendall(encode_frame(1, request))
        while True:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            if not (data := self._socket.recv(65536)):
                raise ConnectionResetError
            for _, answer in self._reader.feed(data):
                return answer

    def close(self) -> None:
        """Close it; an answer that is still on its way is lost with it."""
        self._socket.close()


def _reason(answer: Unavailable | Moved) -> str:
    if isinstance(answer, Unavailable):
        return f"is not ready ({answer.reason})"
    return "does not own this key any more"


def _only(answers: Iterable[Message], table: str, key: bytes) -> bytes | None:
    found = []
    for answer in answers:
        if isinstance(answer, Found):
            found.append(answer)
        elif isinstance(answer, Refusal):
            raise StreamdError(answer.message, seen=answer.seen, remedy=answer.remedy)
        elif not isinstance(answer, Missing):
            raise StreamdError(f"a look-up was answered by {type(answer).__name__}")
    if len(found) > 1:
        raise ScatteredError(table, key)
    return found[0].value if found else None
