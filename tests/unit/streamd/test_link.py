"""A link's last words: what the other end said before it went away."""

import asyncio
import contextlib
import socket
from pathlib import Path

from streamd.link import Answer, Link, adopt, connect
from streamd.wire import Draining, Message, encode_frame

TOLD = [Draining(["one"]), Draining(["two"])]


async def taking(end: socket.socket) -> tuple[Link, list[Message]]:
    """A link of one end, and what its handler gets."""
    taken: list[Message] = []

    async def take(link: Link, message: Message) -> Answer:
        taken.append(message)
        return None

    return await adopt(end, "the other", take), taken


def test_last_words_are_heard_though_a_write_finds_the_other_end_closed() -> None:
    async def run() -> list[Message]:
        ours, theirs = socket.socketpair()
        link, taken = await taking(ours)
        theirs.sendall(b"".join(encode_frame(0, message) for message in TOLD))
        theirs.close()

        # Before the loop has read anything.
        link.send(Draining([]))
        link.flush()
        await link.closed.wait()
        await link.drain()
        return taken

    assert asyncio.run(run()) == TOLD


def test_a_drain_takes_what_has_arrived_without_the_loops_help() -> None:
    async def run() -> list[Message]:
        ours, theirs = socket.socketpair()
        link, taken = await taking(ours)
        theirs.sendall(encode_frame(0, TOLD[0]) + encode_frame(0, TOLD[1])[:5])

        await link.drain()
        before = list(taken)
        theirs.sendall(encode_frame(0, TOLD[1])[5:])
        await link.drain()
        assert before == TOLD[:1]
        link.close()
        theirs.close()
        return taken

    assert asyncio.run(run()) == TOLD


def test_a_connection_waits_where_the_queue_of_who_listens_is_full(tmp_path: Path) -> None:
    address = str(tmp_path / "busy.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(0)
    waiting = []
    with contextlib.suppress(BlockingIOError):
        for _ in range(64):
            end = socket.socket(socket.AF_UNIX)
            waiting.append(end)
            end.setblocking(False)
            end.connect(address)
    assert len(waiting) < 64, "the queue has no end"

    async def run() -> None:
        connecting = asyncio.create_task(connect(address, "the busy one"))
        await asyncio.sleep(0.05)
        assert not connecting.done()
        for _ in waiting[:-1]:  # the last one was told to try again
            accepted.append(listener.accept()[0])
        link = await connecting
        assert not link.closed.is_set()
        link.close()

    accepted: list[socket.socket] = []
    asyncio.run(run())

    for end in (*waiting, *accepted, listener):
        end.close()
