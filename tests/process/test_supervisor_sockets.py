"""Whatever comes over the control socket, the master goes on and answers others in time."""

import asyncio
import contextlib
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from supervisor_tree import Tree, eventually, tree_of

from streamd.errors import StreamdError
from streamd.link import Link, connect
from streamd.wire import Command, Document, encode_frame

SHORT_S = 0.25 * 5  # what `status` may take, whatever else there is


@pytest.fixture(scope="module")
def house() -> Iterator[Tree]:
    with tree_of() as house:
        yield house.run()


def asked_s(house: Tree) -> float:
    """How long a status takes."""
    began = time.monotonic()
    house.ask("status")
    return time.monotonic() - began


def typical_s(house: Tree) -> float:
    """How long a status takes as a rule: on a busy machine one of them may take any time."""
    return statistics.median(asked_s(house) for _ in range(7))


def dialled(house: Tree) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(house.folder.control_path))
    return client


def test_a_thousand_idle_clients_do_not_slow_the_status(house: Tree) -> None:
    master = house.pid("master")
    fds = len(os.listdir(f"/proc/{master}/fd"))
    with contextlib.ExitStack() as clients:
        for _ in range(1_000):
            clients.enter_context(dialled(house))

        assert typical_s(house) < SHORT_S
        assert len(os.listdir(f"/proc/{master}/fd")) < fds + 50
        # Nor do they keep the master from its work.
        agent, began = house.pid("app#0"), time.monotonic()
        os.kill(agent, signal.SIGKILL)
        eventually(lambda: house.process("app#0")["pid"] not in (None, agent), 10)
        assert time.monotonic() - began < 0.2 * 5


@pytest.mark.parametrize(
    "sent",
    [b"\0", b"\0\0\0", struct.pack(">I", 2**30), struct.pack(">I", 100) + b"half of it"],
    ids=["one byte", "three bytes", "a frame of 1 GiB", "half a frame"],
)
def test_who_sends_half_and_waits_does_not_slow_the_status(house: Tree, sent: bytes) -> None:
    master = house.pid("master")
    before = resident(master)
    with contextlib.ExitStack() as clients:
        for _ in range(20):
            clients.enter_context(dialled(house)).sendall(sent)

        assert typical_s(house) < SHORT_S
        assert resident(master) - before < 8 * 2**20


def test_who_never_reads_what_he_asks_for_costs_a_bounded_amount(house: Tree) -> None:
    master = house.pid("master")
    before = resident(master)
    with dialled(house) as client:
        client.setblocking(False)
        asks = b"".join(encode_frame(n, Command("status", {})) for n in range(1, 2_000))
        with contextlib.suppress(BlockingIOError):
            while asks:
                asks = asks[client.send(asks) :]

        assert typical_s(house) < SHORT_S
        assert resident(master) - before < 64 * 2**20


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def nested(depth: int) -> bytes:
    """msgpack of lists in lists."""
    return b"\x91" * depth + b"\x90"


garbage = st.binary(max_size=300)
frames = st.one_of(
    garbage,
    garbage.map(lambda data: struct.pack(">I", len(data)) + data),
    st.tuples(st.integers(0, 2**32 - 1), garbage).map(
        lambda both: struct.pack(">I", both[0]) + both[1]
    ),
    st.integers(1, 5_000).map(nested).map(lambda data: struct.pack(">I", len(data)) + data),
    st.tuples(
        st.integers(-(2**40), 2**40),
        st.lists(
            st.recursive(
                st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats()
                | st.text(max_size=20) | st.binary(max_size=20),
                lambda inner: st.lists(inner, max_size=3)
                | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                max_leaves=10,
            ),
            max_size=5,
        ),
        st.sampled_from(["Command", "Document", "Done", "Nothing", ""]),
    ).map(lambda part: msgspec.msgpack.encode([part[0], [part[2], *part[1]]])).map(
        lambda data: struct.pack(">I", len(data)) + data
    ),
    st.tuples(
        st.sampled_from(
            ["status", "ps", "logs", "events", "stacks", "restart", "scale", "owners", "tree",
             "hello", "__init__", "do_status", "nothing", ""]
        ),
        st.dictionaries(
            st.sampled_from(
                ["names", "lines", "since", "level", "follow", "group", "processes"]
            ),
            st.none() | st.integers(-5, 2**63) | st.floats() | st.text(max_size=8)
            | st.lists(st.text(max_size=5) | st.integers(0, 9), max_size=3),
            max_size=4,
        ),
        st.integers(0, 3),
    ).filter(lambda part: part[0] != "restart" or bool(part[1].get("names"))).map(
        lambda part: encode_frame(part[2], Command(part[0], part[1]))
    ),
)  # fmt: skip


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(frames, min_size=1, max_size=4), st.integers(0, 400))
def test_whatever_comes_over_the_control_socket_the_master_goes_on(
    house: Tree, sent: list[bytes], cut: int
) -> None:
    assert house.guardian is not None and house.guardian.poll() is None
    data = b"".join(sent)
    with dialled(house) as client:
        client.settimeout(5)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            # In two pieces, the second one perhaps never.
            client.sendall(data[:cut])
            client.sendall(data[cut : 2 * cut])

    assert asked_s(house) < SHORT_S or typical_s(house) < SHORT_S


def test_after_all_of_that_it_is_the_same_master_and_nothing_was_restarted(house: Tree) -> None:
    record = house.folder.read_record()
    assert record is not None and record.master.is_alive()

    killed_here = house.log.count("was ended by SIGKILL from outside")
    assert house.process("app#0")["restarts"] == killed_here
    assert "Traceback" not in house.log, house.log.partition("Traceback")[2][:3000]


def test_a_client_that_trickles_is_answered_in_the_end(house: Tree) -> None:
    frame = encode_frame(1, Command("tree", {}))

    async def trickle() -> Any:
        reader, writer = await asyncio.open_unix_connection(str(house.folder.control_path))
        for at in range(len(frame)):
            writer.write(frame[at : at + 1])
            await writer.drain()
            await asyncio.sleep(0.001)
        size = struct.unpack(">I", await reader.readexactly(4))[0]
        answer = await reader.readexactly(size)
        writer.close()
        return msgspec.msgpack.decode(answer)

    answer = asyncio.run(asyncio.wait_for(trickle(), 10))

    assert answer[1][0] == "Document"


def test_the_control_socket_is_for_its_user_alone(house: Tree) -> None:
    assert house.folder.control_path.stat().st_mode & 0o777 == 0o600
    assert house.folder.path.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_another_user_is_closed_before_his_first_byte_is_read(house: Tree) -> None:
    # The folder keeps others out; who got in all the same is known by the kernel, not by what
    # he says.
    house.folder.path.chmod(0o755)
    house.folder.path.parent.chmod(0o755)
    house.place.chmod(0o755)
    house.folder.control_path.chmod(0o666)
    script = (
        "import os, socket; os.setgroups([]); os.setgid(65534); os.setuid(65534); "
        f"s = socket.socket(socket.AF_UNIX); s.connect({str(house.folder.control_path)!r}); "
        "s.settimeout(5); print(s.recv(1))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False
    )

    assert done.stdout == "b''\n" or "ConnectionResetError" in done.stderr
    assert "a connection of uid 65534 was refused" in house.log


def test_two_that_ask_for_opposite_things_both_get_an_answer(house: Tree) -> None:
    async def last_answer(link: Link) -> Any:
        answers = [each async for each in link.stream(Command("restart", {"names": ["app"]}))]
        return answers[-1]

    async def both() -> list[Any]:
        links = [await connect(house.folder.control_path, "master") for _ in range(4)]
        try:
            return await asyncio.gather(*map(last_answer, links))
        finally:
            for link in links:
                link.close()

    answers = asyncio.run(asyncio.wait_for(both(), 30))

    assert all(isinstance(answer, Document) for answer in answers)
    assert house.process("app#0")["state"] == "RUNNING", house.log[-3000:]


@pytest.mark.parametrize(
    ("verb", "args", "text"),
    [
        ("logs", {"lines": "many"}, "lines is a number, not 'many'"),
        ("logs", {"since": float("nan")}, "since is a number, not nan"),
        ("logs", {"names": 7}, "names is a list of names, not 7"),
        ("stacks", {"names": [1]}, r"names is a list of names, not \[1\]"),
        ("events", {"since": []}, None),
        ("restart", {"names": {"a": 1}}, "names is a list of names, not"),
        ("restart", {"names": ["nobody"]}, "there is no process 'nobody'"),
        ("stop", {"mode": "lukewarm"}, "stop is warm or cold, not 'lukewarm'"),
        ("sing", {}, "no command 'sing': there is "),
    ],
)
def test_wrong_arguments_are_refused_with_what_is_expected(
    house: Tree, verb: str, args: dict[str, Any], text: str | None
) -> None:
    if text is None:
        house.ask(verb, **args)
        return
    with pytest.raises(StreamdError, match=text):
        house.ask(verb, **args)
