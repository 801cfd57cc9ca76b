"""A link: one connection between two processes that speaks frames, on asyncio.

Either end may send one-way messages and requests. Requests are matched to replies by id, so
any number of them may be under way at once.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import cast

from streamd.errors import NotPermitted, StreamdError, TimedOut, WireError
from streamd.wire import (
    MAX_FRAME_BYTES,
    End,
    FrameReader,
    Message,
    Refusal,
    encode_frame,
)

log = logging.getLogger(__name__)

CONNECT_S = 2.0
CONNECT_AGAIN_S = 0.005
DRAIN_BYTES = 65536
# Longest path that fits sun_path with its closing zero byte.
MAX_ADDRESS_BYTES = 107

Answer = Message | AsyncIterator[Message] | None
Handler = Callable[["Link", Message], Awaitable[Answer]]


class LinkLost(StreamdError):
    """The other end of a link is gone."""


async def refuse_everything(link: "Link", message: Message) -> Answer:
    """The handler of an end that expects only replies."""
    raise WireError(f"unexpected {type(message).__name__} on {link.name}")


class Link(asyncio.Protocol):
    """One end of a connection.

    `handler` is awaited in a task of its own for each incoming message that is not a reply.
    What it returns answers a request: a message, or an async iterator of messages, which is
    sent as a stream. A StreamdError that it raises becomes a `Refusal`.
    """

    def __init__(
        self,
        name: str,
        handler: Handler = refuse_everything,
        *,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        on_lost: Callable[["Link"], None] | None = None,
    ) -> None:
        self.name = name
        self.closed = asyncio.Event()
        self._handler = handler
        self._on_lost = on_lost
        self._reader = FrameReader(max_frame_bytes)
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Queue[Message | None]] = {}  # id -> answers
        self._requests: set[asyncio.Task[None]] = set()
        self._heard: set[asyncio.Task[None]] = set()  # of one-way messages
        self._writable = asyncio.Event()
        self._writable.set()

    # What a user of the link calls.

    @property
    def pending_bytes(self) -> int:
        """Bytes that the other end has not taken yet."""
        held = sum(map(len, self._out))
        return held + (self._transport.get_write_buffer_size() if self._transport else 0)

    def send(self, message: Message) -> None:
        """Send a one-way message. Never blocks; on a lost link it does nothing."""
        self._write(0, message)

    async def request(self, message: Message, timeout_s: float | None = None) -> Message:
        """Send a request and wait for its answer.

        Raises:
            LinkLost: The other end went away first.
            TimedOut: No answer in `timeout_s`.
            StreamdError: The other end refused; text, remedy and exit code are its own.
        """
        id, answers = self._begin(message)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await answers.get()
        except TimeoutError:
            raise TimedOut(
                f"{self.name} did not answer {type(message).__name__} in {timeout_s:g} s"
            ) from None
        finally:
            del self._waiting[id]
        return self._checked(answer)

    async def stream(self, message: Message) -> AsyncIterator[Message]:
        """Send a request and yield its answers until the last."""
        id, answers = self._begin(message)
        try:
            while not isinstance(answer := self._checked(await answers.get()), End):
                yield answer
        finally:
            del self._waiting[id]

    def close(self) -> None:
        """Write what is buffered, then close; answers that are under way are cancelled."""
        self.flush()
        if self._transport is not None:
            self._transport.close()

    def flush(self) -> None:
        """Write at once what was sent: before a signal, say, that is to come after it."""
        if self._out and self._transport is not None:
            self._transport.write(b"".join(self._out))
        self._out.clear()

    async def wait_writable(self) -> None:
        """Wait until the other end has taken most of what was sent."""
        await self._writable.wait()

    async def drain(self) -> None:
        """Take all that has arrived by now: the last words of a process that has ended.

        Waits for nothing. One-way messages whose handlers do not wait are dealt with when it
        returns.
        """
        if self._transport is not None and not self._transport.is_closing():
            # The loop may be far behind: what it has not read yet is read here.
            self._read_rest(self._transport)
        await asyncio.sleep(0)

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        try:
            for id, message in self._reader.feed(data):
                self._take(id, message)
        except WireError as error:
            log.warning("%s: %s; the connection is closed", self.name, error)
            if self._transport is not None:
                self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None and isinstance(self._transport, asyncio.Transport):
            # A write that finds the other end closed stops the reading, too, although its last
            # words are still here. (uvloop has given the descriptor back by now.)
            self._read_rest(self._transport)
        self._transport = None
        self._writable.set()
        for answers in self._waiting.values():
            answers.put_nowait(None)
        for task in self._requests:
            task.cancel()
        self.closed.set()
        if self._on_lost is not None:
            self._on_lost(self)

    # Inside.

    def _read_rest(self, transport: asyncio.Transport) -> None:
        fd = transport.get_extra_info("socket").fileno()
        with contextlib.suppress(OSError):  # there is no more, or it is reset after the rest
            while fd >= 0 and (data := os.read(fd, DRAIN_BYTES)):
                self.data_received(data)

    def _begin(self, message: Message) -> tuple[int, asyncio.Queue[Message | None]]:
        if self._transport is None or self._transport.is_closing():
            raise LinkLost(f"{self.name} is not connected")
        id = next(self._ids)
        answers: asyncio.Queue[Message | None] = asyncio.Queue()
        self._waiting[id] = answers
        self._write(id, message)
        return id, answers

    def _checked(self, answer: Message | None) -> Message:
        if answer is None:
            raise LinkLost(f"{self.name} closed the connection before it answered")
        if isinstance(answer, Refusal):
            error = StreamdError(answer.message, seen=answer.seen, remedy=answer.remedy)
            error.exit_code = answer.exit_code
            raise error
        return answer

    def _take(self, id: int, message: Message) -> None:
        if id < 0:
            if answers := self._waiting.get(-id):
                answers.put_nowait(message)
            return
        task = asyncio.get_running_loop().create_task(
            self._handle(id, message), name=f"{self.name} {type(message).__name__}"
        )
        # Held by the link until they are done; what was said one way is heard to its end.
        tasks = self._requests if id else self._heard
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def _handle(self, id: int, message: Message) -> None:
        try:
            answer = await self._handler(self, message)
            if id == 0 or answer is None:
                return
            if isinstance(answer, Message):
                self._write(-id, answer)
                return
            async for part in answer:
                self._write(-id, part)
                await self._writable.wait()
            self._write(-id, End())
        except StreamdError as error:
            if id == 0:
                log.warning("%s: %s", self.name, error)
            self._write(-id, Refusal(str(error), error.seen, error.remedy, error.exit_code))
        except Exception as error:
            log.exception("%s: a %s failed", self.name, type(message).__name__)
            self._write(-id, Refusal(f"{type(error).__name__}: {error}", exit_code=70))

    def _write(self, id: int, message: Message) -> None:
        if self._transport is None:
            return
        self._out.append(encode_frame(id, message))
        # Frames of one turn of the loop leave in one write.
        if len(self._out) == 1:
            asyncio.get_running_loop().call_soon(self.flush)


class _Accepted(Link):
    """The server's end of a connection; lets in only who may come."""

    def __init__(
        self,
        name: str,
        handler: Handler,
        max_frame_bytes: int,
        allowed_uids: frozenset[int] | None,
        on_connect: Callable[[Link], bool] | None,
    ) -> None:
        super().__init__(name, handler, max_frame_bytes=max_frame_bytes)
        self._allowed_uids = allowed_uids
        self._on_connect = on_connect

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        connection = cast(asyncio.Transport, transport)
        peer = connection.get_extra_info("socket")
        _, uid, _ = struct.unpack(
            "3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
        if self._allowed_uids is not None and uid not in self._allowed_uids:
            log.warning("%s: a connection of uid %d was refused", self.name, uid)
            connection.abort()
        elif self._on_connect is not None and not self._on_connect(self):
            connection.abort()


async def connect(address: str | Path, name: str, handler: Handler = refuse_everything) -> Link:
    """Connect to the Unix socket at `address`; waits `CONNECT_S` for one that is besieged.

    Raises:
        LinkLost: Nobody listens there, or takes no more.
    """
    loop = asyncio.get_running_loop()
    try:
        end = await _dial(str(address))
        _, link = await loop.create_connection(lambda: Link(name, handler), sock=end)
    except (OSError, TimeoutError) as error:
        raise LinkLost(f"{name} cannot be reached at {address}: {error}") from error
    return link


async def _dial(address: str) -> socket.socket:
    """A connected socket.

    By hand: where the queue of who listens is full, the kernel says "try again", which asyncio
    takes for a connection that is being made, and tells one that is none.
    """
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        end.setblocking(False)
        async with asyncio.timeout(CONNECT_S):
            while True:
                try:
                    end.connect(address)
                except BlockingIOError:
                    await asyncio.sleep(CONNECT_AGAIN_S)
                else:
                    return end
    except BaseException:
        end.close()
        raise


async def adopt(
    end: socket.socket,
    name: str,
    handler: Handler = refuse_everything,
    *,
    on_lost: Callable[[Link], None] | None = None,
) -> Link:
    """Make a link of one end of a connected socket pair; the link owns it from now on."""
    loop = asyncio.get_running_loop()
    _, link = await loop.create_connection(
        lambda: Link(name, handler, on_lost=on_lost), sock=end
    )
    return link


async def serve(
    address: str | Path,
    name: str,
    handler: Handler,
    *,
    max_frame_bytes: int = MAX_FRAME_BYTES,
    allowed_uids: frozenset[int] | None = None,
    on_connect: Callable[[Link], bool] | None = None,
) -> asyncio.Server:
    """Listen at `address` (mode 0600; a stale file there is replaced).

    Args:
        allowed_uids: Peers of other users are closed before their first byte is read.
        on_connect: Called with each new link; False closes it.

    Raises:
        NotPermitted: The path is longer than a Unix socket's may be.
    """

    def accepted() -> Link:
        return _Accepted(name, handler, max_frame_bytes, allowed_uids, on_connect)

    listener = listen(address)
    return await asyncio.get_running_loop().create_unix_server(accepted, sock=listener)


def listen(address: str | Path) -> socket.socket:
    """A non-blocking Unix socket that listens at `address` (mode 0600; replaces a stale file).

    Raises:
        NotPermitted: The path is longer than a Unix socket's may be.
    """
    path = str(address)
    if len(os.fsencode(path)) > MAX_ADDRESS_BYTES:
        raise NotPermitted(
            f"the socket path {path} has {len(os.fsencode(path))} bytes, "
            f"a Unix socket takes {MAX_ADDRESS_BYTES}",
            remedy="set STREAMD_RUNTIME_DIR to a shorter folder",
        )
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    # Bound under another name and renamed: the file never exists with a wider mode,
    # and a client never meets a socket that does not listen.
    staging = f"{path[: MAX_ADDRESS_BYTES - 4]}.new"
    before = os.umask(0o177)
    try:
        if os.path.lexists(staging):
            os.unlink(staging)
        listener.bind(staging)
    finally:
        os.umask(before)
    listener.listen(256)
    os.rename(staging, path)
    listener.setblocking(False)
    return listener
