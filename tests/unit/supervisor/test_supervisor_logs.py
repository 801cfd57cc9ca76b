"""Log lines: parsing, cutting, keeping, writing."""

import asyncio
import json
import os
import time
from pathlib import Path

import pytest

from streamd.logpipe import pipe_line
from streamd.supervisor.logs import MAX_LINE_BYTES, Line, LogPipe, Logs, Output, parse


def logs_to(path: Path, style: str = "text", level: str = "INFO") -> Logs:
    return Logs(Output(str(path)), style=style, level=level)


def line(text: str, *, level: str = "INFO", process: str = "count#0", t: float = 0.0) -> Line:
    return Line(t or time.time(), process, 7, level, text)


def test_a_record_of_the_formatter_is_understood() -> None:
    data = pipe_line(12.5, "WARNING", "proj", "two\nlines").encode()

    assert parse(data, "count#0", 7) == Line(12.5, "count#0", 7, "WARNING", "two\nlines")


@pytest.mark.parametrize("data", [b"a print", b"\x1enot json", b'\x1e{"t":1}', b"\xff\xfe"])
def test_anything_else_is_a_print(data: bytes) -> None:
    parsed = parse(data, "count#0", 7)

    assert parsed.level == "INFO"
    assert parsed.text == data.removeprefix(b"\x1e").decode(errors="replace")


def test_text_lines_cannot_move_the_cursor_of_who_reads_them(tmp_path: Path) -> None:
    logs = logs_to(tmp_path / "log")

    logs.put(line("\x1b[2Jone\rtwo\x9b\nthree\tfour"))

    text = (tmp_path / "log").read_text()
    assert text.endswith(" INFO    count#0  \\x1b[2Jone\\x0dtwo\\x9b\n    three\tfour\n")


def test_json_lines_hold_every_field(tmp_path: Path) -> None:
    logs = logs_to(tmp_path / "log", style="json")

    logs.put(line("text \x1b", t=5.0))

    assert json.loads((tmp_path / "log").read_text()) == {
        "t": 5.0,
        "process": "count#0",
        "pid": 7,
        "level": "INFO",
        "text": "text \x1b",
    }


def test_lines_below_the_level_are_not_kept(tmp_path: Path) -> None:
    logs = logs_to(tmp_path / "log", level="warn")

    logs.put(line("no"))
    logs.put(line("yes", level="WARNING"))

    kept = logs.select(lambda name: True, lines=10, level="DEBUG", since=0.0)
    assert [each.text for each in kept] == ["yes"]


def test_the_last_lines_of_some_processes_from_a_moment_on(tmp_path: Path) -> None:
    logs = logs_to(tmp_path / "log")
    for number in range(20):
        logs.put(line(str(number), process=f"p#{number % 2}", t=1000.0 + number))

    kept = logs.select(lambda name: name == "p#1", lines=3, level="INFO", since=1014.0)

    assert [each.text for each in kept] == ["15", "17", "19"]


def test_a_reopened_file_is_a_new_one(tmp_path: Path) -> None:
    logs = logs_to(tmp_path / "log")
    logs.put(line("first"))
    (tmp_path / "log").rename(tmp_path / "log.1")

    logs.reopen()
    logs.put(line("second"))

    assert "first" in (tmp_path / "log.1").read_text()
    assert "second" in (tmp_path / "log").read_text()


def test_an_output_that_nobody_reads_does_not_block_and_counts_what_is_lost() -> None:
    reader, writer = os.pipe()

    async def flood() -> None:
        output = Output(None, writer)
        for _ in range(6000):
            output.write(b"x" * 999 + b"\n")
        assert os.get_blocking(writer)
        received = b""
        os.set_blocking(reader, False)
        deadline = time.monotonic() + 10
        while b"log lines were lost here" not in received and time.monotonic() < deadline:
            try:
                received += os.read(reader, 1 << 20)
            except BlockingIOError:
                output.write(b"more\n")
            await asyncio.sleep(0)
        assert b"log lines were lost here" in received

    asyncio.run(flood())
    os.close(reader)
    os.close(writer)


def read_pipe(*pieces: bytes) -> list[str]:
    """The lines that a pipe gives for what is written into it piece by piece."""
    taken: list[Line] = []

    async def run() -> None:
        pipe = LogPipe("count#0", taken.append)
        for piece in pieces:
            os.write(pipe.write_end, piece)
            await asyncio.sleep(0.01)
        pipe.drain()
        pipe.close()

    asyncio.run(run())
    return [each.text for each in taken]


def test_lines_are_put_together_from_pieces_and_empty_ones_left_out() -> None:
    assert read_pipe(b"on", b"e\ntwo\n\nth", b"ree") == ["one", "two", "three"]


def test_a_line_without_end_is_cut() -> None:
    texts = read_pipe(*[b"x" * 50_000] * 5)

    assert max(map(len, texts)) <= MAX_LINE_BYTES + 50_000
    assert sum(map(len, texts)) >= MAX_LINE_BYTES


def test_what_is_written_after_the_log_into_the_same_file_stands_behind_it(
    tmp_path: Path,
) -> None:
    with open(tmp_path / "log", "wb") as file:
        output = Output(None, file.fileno())
        output.write(b"a line of the log\n")
        os.write(file.fileno(), b"a line of the script's\n")

    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == ["a line of the log", "a line of the script's"]
