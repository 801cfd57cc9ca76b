"""The writing end of a log pipe: nothing waits, no line is cut, what is missing is told."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from streamd.logpipe import MAX_RECORD_BYTES, PipeWriter, pipe_line, prints_to


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield reader, writer
    os.close(reader)
    os.close(writer)


def read(reader: int) -> list[str]:
    """The lines in a pipe; of records their text."""
    data = b""
    try:
        while piece := os.read(reader, 1 << 20):
            data += piece
    except BlockingIOError:
        pass
    lines = data.decode().removesuffix("\n").split("\n") if data else []
    return [json.loads(line[1:])["m"] if line.startswith("\x1e") else line for line in lines]


def record(text: str) -> bytes:
    return pipe_line(0.0, "INFO", "proj", text).encode() + b"\n"


def told(dropped: int) -> str:
    return f"{dropped} log lines were dropped here: the log pipe was full"


def test_a_full_pipe_drops_lines_and_says_how_many(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    log = PipeWriter(writer)

    for number in range(200):
        log.write(record(f"line {number} {'x' * 200}"))
    before, dropped = read(reader), log.dropped
    log.write(record("after"))

    assert dropped == 200 - len(before) > 100
    assert read(reader) == [told(dropped), "after"]
    log.close()


def test_a_line_that_fits_in_part_is_finished_before_anything_else(
    pipe: tuple[int, int],
) -> None:
    reader, writer = pipe
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 8192)
    log = PipeWriter(writer)
    os.set_blocking(reader, True)
    data = b""

    log.write(record("long " + "x" * 20_000))
    log.write(record("dropped"))
    while not log.push():
        data += os.read(reader, 1 << 20)
    log.write(record("last"))

    data += os.read(reader, 1 << 20)
    texts = [json.loads(line[1:])["m"] for line in data.decode().removesuffix("\n").split("\n")]
    assert texts == ["long " + "x" * 20_000, told(1), "last"]
    log.close()


def a_socket() -> tuple[int, int]:
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


@pytest.mark.parametrize("make", [os.pipe, a_socket])
def test_prints_and_records_of_threads_do_not_cut_each_other(
    make: Callable[[], tuple[int, int]],
) -> None:
    reader, writer = make()
    log = PipeWriter(writer)
    prints = prints_to(log, 1)
    received: list[bytes] = []

    def collect() -> None:
        while data := os.read(reader, 1 << 20):
            received.append(data)

    def log_all(write: Callable[[str], Any], name: str) -> None:
        for number in range(2000):
            write(f"{name} {number} " + name * 290)

    writers = [
        threading.Thread(target=log_all, args=(lambda text: log.write(record(text)), "r")),
        threading.Thread(target=log_all, args=(lambda text: print(text, file=prints), "p")),
    ]
    collector = threading.Thread(target=collect)
    collector.start()
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert log.flush(5.0)
    log.close()
    os.close(writer)
    collector.join(10.0)
    os.close(reader)

    counts = {"r": 0, "p": 0, "missing": 0}
    for line in b"".join(received).decode().removesuffix("\n").split("\n"):
        text = json.loads(line[1:])["m"] if line.startswith("\x1e") else line
        if "were dropped here" in text:
            counts["missing"] += int(text.split()[0])
            continue
        name, _, rest = text.split(" ")
        assert rest == name * 290
        counts[name] += 1
    assert sum(counts.values()) == 4000


def test_a_print_without_an_end_is_not_mistaken_for_the_next(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    log = PipeWriter(writer)

    log.write(b"begun")
    while not log.dropped:
        log.write(b" and on" * 500)
    log.write(b" to its end\n")
    log.write(b"next\n")

    begun, *after = read(reader)
    assert begun.startswith("begun and on")
    assert after == [told(1), "next"]
    log.close()


def test_spawned_processes_still_wait_for_the_pipe(pipe: tuple[int, int]) -> None:
    log = PipeWriter(pipe[1])

    assert os.get_blocking(pipe[1])
    log.close()


def test_a_forked_child_begins_anew(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    code = (
        "import os, threading, time\n"
        "from streamd.logpipe import PipeWriter\n"
        f"log = PipeWriter({writer})\n"
        "held, done = threading.Event(), threading.Event()\n"
        "def hold():\n"
        "    with log._lock:\n"
        "        held.set(); done.wait()\n"
        "threading.Thread(target=hold).start()\n"
        "held.wait()\n"
        "if (pid := os.fork()) == 0:\n"
        "    log.write(b'of the child\\n'); os._exit(0)\n"
        "os.waitpid(pid, 0); done.set()\n"
    )
    subprocess.run([sys.executable, "-c", code], pass_fds=[writer], timeout=20, check=True)

    assert read(reader) == ["of the child"]


@pytest.mark.parametrize("letter", ["y", "\N{SNOWMAN}", "\0", "\U0001f40d"])
def test_a_very_long_text_is_cut_so_that_it_fits_a_pipe(letter: str) -> None:
    line = pipe_line(0.0, "INFO", "proj", letter * 500_000)

    assert MAX_RECORD_BYTES * 0.9 < len(line.encode()) <= MAX_RECORD_BYTES + 1
    text = json.loads(line[1:])["m"]
    kept = text.count(letter)
    assert text.endswith(f"({500_000 - kept} characters more)")
