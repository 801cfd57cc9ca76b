"""Log lines: parsing, cutting, keeping, repeating, following."""

import asyncio
import json
import os
import time
from pathlib import Path

import pytest

from streamd.logpipe import pipe_line
from streamd.supervisor.logfile import LogFile
from streamd.supervisor.logpipe import MAX_LINE_BYTES, TOO_LONG, LogPipe, parse
from streamd.supervisor.logs import FOLLOWER_LINES, RING_LINES, Line, Logs
from streamd.supervisor.logstream import LogStream


def logs_to(path: Path, style: str = "text", level: str = "INFO") -> Logs:
    return Logs(LogFile(str(path)), style=style, level=level)


def line(text: str, *, level: str = "INFO", process: str = "count#0", t: float = 0.0) -> Line:
    return Line(t or time.time(), process, 7, level, text)


def test_a_record_of_the_formatter_is_understood() -> None:
    data = pipe_line(12.5, "WARNING", "proj", "two\nlines").encode()

    assert parse(data, "count#0", 7) == Line(12.5, "count#0", 7, "WARNING", "two\nlines")


@pytest.mark.parametrize("data", [b"a print", b"\x1enot json", b'\x1e{"t":1}', b"\xff\xfe"])
def test_anything_else_is_a_print(data: bytes) -> None:
    parsed = parse(data, "count#0", 7)

    assert parsed.level == "INFO"
    assert parsed.text == data.removeprefix(b"\x1e").decode(errors="backslashreplace")


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

    kept = logs.select(lambda line: True, lines=10, since=0.0)
    assert [each.text for each in kept] == ["yes"]


def test_the_last_lines_of_some_processes_from_a_moment_on(tmp_path: Path) -> None:
    logs = logs_to(tmp_path / "log")
    for number in range(20):
        logs.put(line(str(number), process=f"p#{number % 2}", t=1000.0 + number))

    logs.put(line("late", process="p#0", t=1.0))

    kept = logs.select(lambda line: line.process == "p#1", lines=3, since=1014.0)

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
        output = LogStream(writer)
        for _ in range(6000):
            output.write(b"x" * 999 + b"\n", 1)
        assert os.get_blocking(writer)
        received = b""
        os.set_blocking(reader, False)
        deadline = time.monotonic() + 10
        while b"log lines were lost here" not in received and time.monotonic() < deadline:
            try:
                received += os.read(reader, 1 << 20)
            except BlockingIOError:
                output.write(b"more\n", 1)
            await asyncio.sleep(0)
        assert b"log lines were lost here" in received

    asyncio.run(flood())
    os.close(reader)
    os.close(writer)


def test_what_is_written_after_the_log_into_the_same_file_stands_behind_it(
    tmp_path: Path,
) -> None:
    with open(tmp_path / "log", "wb") as file:
        output = LogStream(file.fileno())
        output.write(b"a line of the log\n", 1)
        os.write(file.fileno(), b"a line of the script's\n")

    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == ["a line of the log", "a line of the script's"]


def read_pipe(tmp_path: Path, *pieces: bytes) -> list[str]:
    """The lines that a pipe gives for what is written into it piece by piece."""
    logs = logs_to(tmp_path / "log")

    async def run() -> None:
        pipe = LogPipe("count#0", logs)
        for piece in pieces:
            os.write(pipe.write_end, piece)
            pipe.drain()
        pipe.let_go()
        pipe.close()

    asyncio.run(run())
    return [each.text for each in logs.select(lambda line: True, lines=100, since=0.0)]


def test_lines_are_put_together_from_pieces_and_empty_ones_left_out(tmp_path: Path) -> None:
    texts = read_pipe(tmp_path, b"on", b"e\ntwo\r\n\nth", b"ree", "\N{SNOWMAN}".encode()[:2])

    assert texts == ["one", "two", "three\\xe2\\x98"]


@pytest.mark.parametrize("step", [1000, 65_536, 300_000])
@pytest.mark.parametrize("letter", ["x", "\N{SNOWMAN}"])
def test_a_line_longer_than_the_limit_is_cut_and_says_so(
    tmp_path: Path, step: int, letter: str
) -> None:
    data = (letter * 150_000).encode() + b"\nnext\n"

    texts = read_pipe(tmp_path, *(data[i : i + step] for i in range(0, len(data), step)))

    long, after = texts
    kept = long.removesuffix(TOO_LONG)
    assert kept == letter * (MAX_LINE_BYTES // len(letter.encode()))
    assert after == "next"


def test_a_record_behind_a_print_without_end_is_a_line_of_its_own(tmp_path: Path) -> None:
    record = pipe_line(12.5, "WARNING", "proj", "said").encode()

    assert read_pipe(tmp_path, b"50 %" + record + b"\n") == ["50 %", "said"]


def test_secrets_in_prints_are_masked(tmp_path: Path) -> None:
    assert read_pipe(tmp_path, b"go\nto kafka://a:pass", b"word@b:9092\n") == [
        "go",
        "to kafka://a:***@b:9092",
    ]


def test_a_line_that_repeats_is_shown_once_and_counted(tmp_path: Path) -> None:
    logs = logs_to(tmp_path / "log")
    for number in range(100):
        logs.put(line("again", t=1000.0 + number / 50))
        logs.put(line(f"other {number}", process="p#1", t=1000.0))
    logs.put(line("else", t=1003.0))
    logs.put(line("else", t=1004.0))
    logs.put(line("done", t=1005.0))

    kept = logs.select(lambda line: line.process == "count#0", lines=100, since=0.0)
    assert [(each.t, each.text) for each in kept] == [
        (1000.0, "again"),
        (1001.98, "last line repeated 99 times in 2.0 s"),
        (1003.0, "else"),
        (1004.0, "else"),
        (1005.0, "done"),
    ]


def test_a_repetition_that_goes_on_is_told_of_now_and_then(tmp_path: Path) -> None:
    logs = logs_to(tmp_path / "log")
    for tenth in range(200):
        logs.put(line("again", t=1000.0 + tenth / 10))
        logs.tell_repeats(1000.0 + tenth / 10)
    logs.flush(0.0)
    logs.put(line("again", t=1100.0))

    kept = [each.text for each in logs.select(lambda line: True, lines=100, since=0.0)]
    counts = [int(text.split()[3]) for text in kept if text.startswith("last line")]
    assert kept[0] == kept[-1] == "again"
    assert len(counts) == 4 and sum(counts) == 199


def test_what_each_run_of_a_process_says_is_shown(tmp_path: Path) -> None:
    logs = logs_to(tmp_path / "log")

    async def run() -> None:
        for _ in range(2):
            pipe = LogPipe("count#0", logs)
            os.write(pipe.write_end, b"no\nno\nno\n")
            pipe.let_go()
            pipe.close()

    asyncio.run(run())
    texts = [each.text for each in logs.select(lambda line: True, lines=9, since=0.0)]
    assert [text.split(" in ")[0] for text in texts] == ["no", "last line repeated 2 times"] * 2


def test_what_is_kept_is_bounded_by_number_and_by_size(tmp_path: Path) -> None:
    logs = logs_to(tmp_path / "log")
    logs.put_all([line(str(number)) for number in range(RING_LINES + 5)])
    assert logs.select(lambda line: True, lines=10**6, since=0.0)[0].text == "5"

    logs.put_all([line(f"{number} " + "x" * 60_000) for number in range(1000)])

    kept = logs.select(lambda line: True, lines=10**6, since=0.0)
    assert 50 < len(kept) < 150
    assert kept[-1].text.startswith("999 ")


def test_a_slow_follower_misses_lines_and_is_told(tmp_path: Path) -> None:
    logs = logs_to(tmp_path / "log")

    async def run() -> list[Line]:
        with logs.followed(lambda line: line.process == "p#1") as follower:
            for number in range(FOLLOWER_LINES + 7):
                logs.put(line(str(number), process="p#1"))
                logs.put(line(str(number), process="p#2"))
            return await follower.get()

    *lines, notice = asyncio.run(run())
    assert [each.text for each in lines] == [str(n) for n in range(FOLLOWER_LINES)]
    assert (notice.process, notice.level) == ("master", "WARNING")
    assert notice.text == "7 log lines were left out here: the reader was too slow"


def test_a_pipe_is_read_until_the_last_who_holds_it_has_ended(tmp_path: Path) -> None:
    logs = logs_to(tmp_path / "log")

    async def run() -> None:
        pipe = LogPipe("count#0", logs)
        of_a_child = os.dup(pipe.write_end)
        os.write(pipe.write_end, b"last words")
        pipe.let_go()
        os.write(of_a_child, b"mine\n")
        os.close(of_a_child)
        async with asyncio.timeout(10.0):
            while pipe._fd >= 0:
                await asyncio.sleep(0.001)

    asyncio.run(run())
    kept = logs.select(lambda line: True, lines=9, since=0.0)
    assert [each.text for each in kept] == ["last words", "mine"]
