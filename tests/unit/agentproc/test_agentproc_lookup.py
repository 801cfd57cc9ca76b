"""Reading another process's tables: whom to ask, answers, deadlines; over real sockets."""

import asyncio
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from streamd.agentproc.lookup import RemoteTables
from streamd.agentproc.reads import ReadServer, read_address
from streamd.errors import StreamdError, TimedOut
from streamd.tables import ScatteredError
from streamd.wire import (
    Found,
    Message,
    Missing,
    Moved,
    Owner,
    Owners,
    Refusal,
    Unavailable,
)

Serve = Callable[[str, Callable[[Message], Message]], ReadServer]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sd-") as path:
        yield Path(path)


@pytest.fixture
def serve(folder: Path) -> Iterator[Serve]:
    servers: list[ReadServer] = []

    def serve_at(process: str, answer: Callable[[Message], Message]) -> ReadServer:
        server = ReadServer(str(folder / f"{process}.sock"), answer)
        servers.append(server)
        server.start()
        return server

    yield serve_at
    for server in servers:
        server.close()


@pytest.fixture
def remote(folder: Path) -> Iterator[RemoteTables]:
    tables = RemoteTables(
        str(folder), {"count": 2, "other": 1}, {"counts": "count"}, deadline_s=0.3
    )
    yield tables
    tables.close()


def owner(folder: Path, slot: int, slots: int, active: list[int]) -> Owner:
    address = str(folder / f"count#{slot}.sock")
    return Owner("count", f"count#{slot}", address, slot, slots, active, [])


def found(value: bytes, partition: int = 0) -> Callable[[Message], Message]:
    return lambda request: Found(value, partition)


def test_owner_of_the_partition_is_asked(
    folder: Path, serve: Serve, remote: RemoteTables
) -> None:
    serve("count#0", found(b"zero"))
    serve("count#1", found(b"one"))
    remote.know(Owners(1, [owner(folder, 0, 2, [1]), owner(folder, 1, 2, [0])]))

    assert remote.get("counts", b"k", 0) == b"one"
    assert remote.get("counts", b"k", 1) == b"zero"


def test_process_that_will_have_the_partition_is_asked_before_owners_are_known(
    serve: Serve, remote: RemoteTables
) -> None:
    serve("count#1", found(b"one"))

    assert remote.get("counts", b"k", 3) == b"one"


def test_missing_key_is_none(serve: Serve, remote: RemoteTables) -> None:
    serve("count#0", lambda request: Missing(b"0"))

    assert remote.get("counts", b"k", 0) is None


def test_key_of_any_partition_is_asked_of_every_owner(
    serve: Serve, remote: RemoteTables
) -> None:
    serve("count#0", lambda request: Missing(None))
    serve("count#1", found(b"one", 1))

    assert remote.get("counts", b"k", -1) == b"one"


def test_key_in_several_partitions_is_an_error(serve: Serve, remote: RemoteTables) -> None:
    serve("count#0", found(b"zero", 0))
    serve("count#1", found(b"one", 1))

    with pytest.raises(ScatteredError, match="several partitions"):
        remote.get("counts", b"k", -1)


def test_every_owner_of_a_scattered_table_is_asked_whatever_the_key_hashes_to(
    folder: Path, serve: Serve, remote: RemoteTables
) -> None:
    serve("count#0", lambda request: Missing(None))
    serve("count#1", found(b"one", 1))
    scattered = msgspec.structs.replace(owner(folder, 1, 2, [1]), scattered=["counts"])
    remote.know(Owners(1, [owner(folder, 0, 2, [0]), scattered]))

    assert remote.get("counts", b"k", 0) == b"one"


def test_awaited_look_up_of_a_scattered_table_asks_every_owner(
    folder: Path, serve: Serve, remote: RemoteTables
) -> None:
    serve("count#0", lambda request: Missing(None))
    serve("count#1", found(b"one", 1))
    scattered = msgspec.structs.replace(owner(folder, 1, 2, [1]), scattered=["counts"])
    remote.know(Owners(1, [owner(folder, 0, 2, [0]), scattered]))

    async def look_up() -> bytes | None:
        value = await remote.get_soon("counts", b"k", 0)
        remote.close()
        await asyncio.sleep(0)
        return value

    assert asyncio.run(look_up()) == b"one"


def test_absent_owner_is_waited_for_until_the_deadline_and_named(remote: RemoteTables) -> None:
    at = time.monotonic()

    with pytest.raises(TimedOut, match="count#1.*is not there"):
        remote.get("counts", b"k", 1)

    assert 0.25 < time.monotonic() - at < 1.0


def test_owner_that_restarts_within_the_deadline_answers_in_the_end(
    serve: Serve, remote: RemoteTables
) -> None:
    first = serve("count#0", found(b"before"))
    assert remote.get("counts", b"k", 0) == b"before"
    first.close = lambda: None  # type: ignore[method-assign]
    ReadServer.close(first)
    later = threading.Timer(0.1, lambda: serve("count#0", found(b"after")))
    later.start()

    assert remote.get("counts", b"k", 0) == b"after"
    later.join()


@pytest.mark.parametrize("answer", [Unavailable("recovering", 1.0), Moved(3)])
def test_owner_that_is_not_ready_is_asked_again(
    serve: Serve, remote: RemoteTables, answer: Message
) -> None:
    answers = [answer, answer, Found(b"v", 0)]
    serve("count#0", lambda request: answers.pop(0))

    assert remote.get("counts", b"k", 0) == b"v"


def test_owner_that_never_gets_ready_is_named_with_its_reason(
    serve: Serve, remote: RemoteTables
) -> None:
    serve("count#0", lambda request: Unavailable("recovering", 1.0))

    with pytest.raises(TimedOut, match=r"count#0.*not ready \(recovering\)"):
        remote.get("counts", b"k", 0)


def test_owner_that_accepts_and_says_nothing_is_given_up(
    folder: Path, remote: RemoteTables
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(read_address(str(folder / "count#0.sock")))
        listener.listen()

        with pytest.raises(TimedOut, match=r"count#0.*did not answer"):
            remote.get("counts", b"k", 0)


def test_refusal_is_raised_with_its_words(serve: Serve, remote: RemoteTables) -> None:
    serve("count#0", lambda request: Refusal("no such table", ["a", "b"]))

    with pytest.raises(StreamdError, match="no such table") as caught:
        remote.get("counts", b"k", 0)
    assert caught.value.seen == ["a", "b"]


def test_connections_are_kept_and_shared_by_threads(serve: Serve, remote: RemoteTables) -> None:
    serve("count#0", lambda request: Found(getattr(request, "key", b""), 0))
    wrong: list[tuple[bytes, bytes | None]] = []

    def read(number: int) -> None:
        for index in range(100):
            key = f"{number}-{index}".encode()
            if (value := remote.get("counts", key, 0)) != key:
                wrong.append((key, value))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []
    assert sum(len(kept) for kept in remote._idle.values()) <= 4


def test_awaited_look_ups_share_a_connection_and_survive_a_restart(
    serve: Serve, remote: RemoteTables
) -> None:
    first = serve("count#0", lambda request: Found(getattr(request, "key", b""), 0))

    async def look_up() -> None:
        keys = [str(number).encode() for number in range(50)]
        values = await asyncio.gather(*(remote.get_soon("counts", key, 0) for key in keys))
        assert values == keys
        ReadServer.close(first)
        first.close = lambda: None  # type: ignore[method-assign]
        serve("count#0", found(b"after"))
        assert await remote.get_soon("counts", b"k", 0) == b"after"
        remote.close()

    asyncio.run(look_up())


def test_awaited_look_up_gives_up_at_the_deadline_while_the_loop_turns(
    remote: RemoteTables,
) -> None:
    turns = 0

    async def look_up() -> None:
        nonlocal turns
        asking = asyncio.create_task(remote.get_soon("counts", b"k", 0))
        while not asking.done():
            turns += 1
            await asyncio.sleep(0.01)
        with pytest.raises(TimedOut, match="count#0"):
            await asking

    asyncio.run(look_up())

    assert turns > 5


def test_reading_thread_drops_what_is_no_frame_and_serves_the_others(
    folder: Path, serve: Serve, remote: RemoteTables
) -> None:
    serve("count#0", found(b"v"))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(read_address(str(folder / "count#0.sock")))
        client.sendall(b"\xff\xff\xff\xff nonsense")
        assert client.recv(100) == b""

    assert remote.get("counts", b"k", 0) == b"v"


def test_answer_that_raises_is_a_refusal_and_the_thread_goes_on(
    serve: Serve, remote: RemoteTables, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[Callable[[], Message]] = [
        lambda: Found(b"v", 0),
        lambda: Found(bytes(int("x")), 0),
    ]
    serve("count#0", lambda request: answers.pop()())

    with pytest.raises(StreamdError, match="ValueError"):
        remote.get("counts", b"k", 0)
    assert remote.get("counts", b"k", 0) == b"v"
    assert "a Lookup failed" in caplog.text
