"""A thread that answers look-ups while the loop works.

An agent that reads another group's table waits for the answer and its loop with it. If that
table's process waits in the same way for the first one, both would wait for ever, were the
answers given by the loops. This thread needs no loop: it reads what is committed, and only
that. It listens beside the process's own socket, at `read_address`.
"""

import heapq
import logging
import os
import selectors
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from streamd.agentproc.routing import place_text
from streamd.app import App
from streamd.codecs import codec_for
from streamd.errors import EncodeError, StreamdError, WireError
from streamd.link import listen
from streamd.tables import Held, ScatteredError, Table
from streamd.wire import (
    Found,
    FrameReader,
    Lookup,
    LookupText,
    Message,
    Missing,
    Moved,
    Refusal,
    RoutedKey,
    RouteKey,
    Scan,
    Scanned,
    Unavailable,
    encode_frame,
)

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1.0
MAX_SCAN_ROWS = 10_000

# A client that does not take its answer in this time loses its connection: the others wait.
_WRITE_TIMEOUT_S = 0.2


def read_address(address: str) -> str:
    """Where the process that listens at `address` answers look-ups."""
    return f"{address}.r"


class ReadServer:
    """Answers requests, one after another, in a thread of its own.

    `answer` is called in that thread; a StreamdError that it raises becomes a `Refusal`.
    """

    def __init__(self, address: str, answer: Callable[[Message], Message]) -> None:
        """Listen at `read_address(address)`; requests wait until `start`.

        Raises:
            NotPermitted: The path is longer than a Unix socket's may be.
        """
        self._answer = answer
        self._listener = listen(read_address(address))
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._readers: dict[socket.socket, FrameReader] = {}
        self._thread = threading.Thread(target=self._run, name="streamd reads", daemon=True)

    def start(self) -> None:
        """Serve from now on."""
        # A signal that this thread took would not interrupt what the main thread waits for.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._thread.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        """Stop serving; requests that were not answered lose their connection."""
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        for connection in (self._listener, *self._readers):
            connection.close()
        os.close(self._wake)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj == self._wake:
                        return
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    elif isinstance(key.fileobj, socket.socket):
                        self._serve(selector, key.fileobj)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            log.warning("a look-up's connection was not accepted: %s", error.strerror)
            return
        connection.settimeout(_WRITE_TIMEOUT_S)
        self._readers[connection] = FrameReader()
        selector.register(connection, selectors.EVENT_READ)

    def _serve(self, selector: selectors.BaseSelector, connection: socket.socket) -> None:
        try:
            data = connection.recv(65536)
            for id, message in self._readers[connection].feed(data):
                connection.sendall(encode_frame(-id, self._answered(message)))
        except (OSError, WireError) as error:
            log.debug("a look-up's connection is closed: %s", error)
            data = b""
        if not data:
            selector.unregister(connection)
            del self._readers[connection]
            connection.close()

    def _answered(self, message: Message) -> Message:
        try:
            return self._answer(message)
        except StreamdError as error:
            return Refusal(str(error), error.seen, error.remedy, error.exit_code)
        except Exception as error:
            log.exception("a %s failed", type(message).__name__)
            return Refusal(f"{type(error).__name__}: {error}", exit_code=70)


class CommittedTables:
    """Answers questions about the tables that this process holds; from any thread.

    `generations` holds, for each group that runs here, the epoch of its partitions, or None
    while it recovers. `is_sure` says of a group whether this process still has what it has.
    """

    def __init__(
        self,
        app: App,
        generations: Mapping[str, int | None],
        is_sure: Callable[[str], bool] = lambda group: True,
    ) -> None:
        self._app = app
        self._generations = generations
        self._is_sure = is_sure

    def answer(self, request: Message) -> Message:
        """The reply to a `Lookup`, `LookupText`, `Scan` or `RouteKey`.

        Raises:
            StreamdError: There is no such table, or the text is no key of it.
            WireError: The message is not one of these.
        """
        match request:
            case RouteKey(name, text):
                return RoutedKey(place_text(self._app, self._table(name), text))
            case Lookup(name, data, partition):
                table = self._table(name)
                return self._refused(table, partition) or _look_up(
                    table, [table.decode_key(data)], partition, bytes
                )
            case LookupText(name, text, partition):
                table = self._table(name)
                return self._refused(table, partition) or _look_up(
                    table, table.key_codec.readings(text), partition, as_json(table)
                )
            case Scan(name, prefix, limit):
                table = self._table(name)
                return self._refused(table, -1) or scan(table, prefix, limit)
            case _:
                raise WireError(f"a {type(request).__name__} came where look-ups are answered")

    def _table(self, name: str) -> Table:
        try:
            return self._app.tables[name]
        except KeyError:
            raise StreamdError(
                f"there is no table {name!r}", seen=sorted(self._app.tables)
            ) from None

    def _refused(self, table: Table, partition: int) -> Message | None:
        if table.group not in self._generations:
            return Moved(0)
        generation = self._generations[table.group]
        if generation is None or not isinstance(table, Held):
            return Unavailable("recovering", RETRY_AFTER_S)
        if not self._is_sure(table.group):
            return Unavailable("it is not known whether it still has it", RETRY_AFTER_S)
        if partition >= 0 and partition not in table.held_partitions():
            return Moved(generation)
        return None


def as_json(table: Table) -> Callable[[bytes], bytes]:
    """What turns the stored bytes of a value of `table` into JSON."""

    def convert(data: bytes) -> bytes:
        return to_json(table.value_codec.decode(data))

    return convert


def to_json(value: Any) -> bytes:
    """JSON of any key or value; what has none is shown as text."""
    try:
        return _JSON.encode(value)
    except (EncodeError, TypeError, ValueError, RecursionError):
        return _JSON.encode(value.decode(errors="backslashreplace")
                            if isinstance(value, bytes) else repr(value))  # fmt: skip


def scan(table: Table, prefix: str, limit: int) -> Scanned:
    """The first keys, in text order, that begin with `prefix`; all of them are counted.

    Takes about a second for a million keys, in which other threads take turns.
    """
    total = 0

    def rows() -> Iterable[tuple[str, int, Any, bytes]]:
        nonlocal total
        for key, data in table.committed_items():
            text = table.key_codec.to_text(key)
            if text.startswith(prefix):
                total += 1
                # The count keeps keys of one text apart: keys themselves may not compare.
                yield text, total, key, data

    first = heapq.nsmallest(min(max(limit, 1), MAX_SCAN_ROWS), rows())
    convert = as_json(table)
    return Scanned(
        [(to_json(key).decode(), convert(data).decode()) for _, _, key, data in first], total
    )


def _look_up(
    table: Table, keys: Iterable[Any], partition: int, convert: Callable[[bytes], bytes]
) -> Message:
    """The first of `keys` that has a committed value, in one partition or (-1) in any.

    Raises:
        ScatteredError: It has one in several.
    """
    for key in keys:
        found: list[Found] = []
        for held in table.held_partitions() if partition < 0 else [partition]:
            try:
                data = table.committed(key, held)
            except KeyError:
                return Moved(0)  # it went to another process just now
            if data is not None:
                found.append(Found(convert(data), held))
        if len(found) > 1:
            raise ScatteredError(table.name, key)
        if found:
            return found[0]
    default = None if table.default is None else table.value_codec.encode(table.default())
    return Missing(None if default is None else convert(default))


_JSON = codec_for("json", None, default="json")
