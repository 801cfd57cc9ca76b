"""Waking the sessions that wait for events: one datagram, which may be lost.

A session listens at a socket in the runtime folder and notes it in the log, in the transaction
that claims its partitions. Whoever committed events sends a datagram to those that read them.
A full queue, a dead session, a lost datagram cost a wait of the session's safety poll.
"""

import contextlib
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import apsw

from streamd.agentproc.broker import TP
from streamd.agentproc.broker.schema import query
from streamd.errors import NotPermitted
from streamd.link import MAX_ADDRESS_BYTES


class Listener(NamedTuple):
    """A session that reads a topic: it has each `slots`-th partition from `slot` on."""

    slot: int
    slots: int
    address: str


def listen(path: Path) -> socket.socket:
    """Bind a socket for datagrams at `path`; a stale file there is replaced.

    Raises:
        NotPermitted: The path is longer than a Unix socket's may be, or cannot be bound.
    """
    if len(os.fsencode(path)) > MAX_ADDRESS_BYTES:
        raise NotPermitted(
            f"the socket path {path} has {len(os.fsencode(path))} bytes, "
            f"a Unix socket takes {MAX_ADDRESS_BYTES}",
            remedy="set STREAMD_RUNTIME_DIR to a shorter folder",
        )
    bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    bell.setblocking(False)
    try:
        path.unlink(missing_ok=True)
        bell.bind(str(path))
    except OSError as error:
        bell.close()
        raise NotPermitted(
            f"the socket {path} cannot be made: {error.strerror}",
            remedy="set STREAMD_RUNTIME_DIR to a folder of yours",
        ) from error
    return bell


def drain(bell: socket.socket) -> None:
    """Take what came, without waiting."""
    with contextlib.suppress(BlockingIOError):
        while True:
            bell.recv(16)


class Ringer:
    """Sends the wake-ups of one process; used by the thread that commits."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._version = -1
        self._listeners: dict[str, list[Listener]] = {}  # topic -> who reads it

    def refresh(self, db: apsw.Connection, version: int) -> None:
        """Read who listens, unless `version` is the one that was read last."""
        if version == self._version:
            return
        self._listeners = {}
        for topic, slot, slots, address in query(
            db, "SELECT topic, slot, slots, address FROM bells"
        ):
            self._listeners.setdefault(topic, []).append(Listener(slot, slots, address))
        self._version = version

    def ring(self, partitions: Iterable[TP]) -> None:
        """Wake each session that reads one of `partitions`, once."""
        addresses = {
            listener.address
            for topic, partition in partitions
            for listener in self._listeners.get(topic, ())
            if partition % listener.slots == listener.slot
        }
        for address in addresses:
            with contextlib.suppress(OSError):
                self._socket.sendto(b"!", address)

    def close(self) -> None:
        self._socket.close()
