"""Log files are exchanged by size and age, survive others' hands, and a full disk."""

import contextlib
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamd.supervisor.logfile import LogFile
from streamd.supervisor.logs import Line, Logs


def lines_of(path: Path) -> list[int]:
    """The numbers in a file of whole lines."""
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    assert all(len(line) == 99 for line in text.splitlines())
    return [int(line.split()[0]) for line in text.splitlines()]


def write(log: LogFile, *numbers: int) -> None:
    for number in numbers:
        log.write(f"{number} ".ljust(99, "x").encode() + b"\n", 1)


def files(path: Path) -> list[str]:
    return sorted(each.name for each in path.parent.iterdir())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_a_file_is_exchanged_before_it_gets_too_large_and_so_many_are_kept(path: Path) -> None:
    log = LogFile(str(path), max_size_bytes=1000, keep=3)

    write(log, *range(47))

    assert files(path) == ["log", "log.1", "log.2", "log.3"]
    assert lines_of(path) == list(range(40, 47))
    assert [len(lines_of(Path(f"{path}.{n}"))) for n in (1, 2, 3)] == [10, 10, 10]
    assert lines_of(Path(f"{path}.3")) == list(range(10, 20))


def test_with_none_to_keep_the_file_is_emptied(path: Path) -> None:
    log = LogFile(str(path), max_size_bytes=1000, keep=0)

    write(log, *range(15))

    assert files(path) == ["log"]
    assert lines_of(path) == list(range(10, 15))


def test_fewer_to_keep_than_before_removes_the_others(path: Path) -> None:
    write(LogFile(str(path), max_size_bytes=100, keep=5), *range(9))
    assert len(files(path)) == 6

    write(LogFile(str(path), max_size_bytes=100, keep=2), 9)

    assert files(path) == ["log", "log.1", "log.2"]


def test_a_size_counts_what_was_there_before(path: Path) -> None:
    write(LogFile(str(path)), *range(9))

    write(LogFile(str(path), max_size_bytes=1000, keep=1), 9, 10)

    assert lines_of(path) == [10]


@pytest.mark.parametrize("style", ["text", "json"])
def test_age_is_that_of_the_first_line_also_over_a_restart(path: Path, style: str) -> None:
    def logs() -> Logs:
        return Logs(LogFile(str(path), max_age_s=3600.0, keep=2), style=style, level="info")

    now = time.time()
    logs().put(Line(now - 3000.0, "p", 1, "INFO", "first"))
    logs().put(Line(now, "p", 1, "INFO", "second"))
    assert files(path) == ["log"]
    path.write_bytes(b"")
    logs().put(Line(now - 3700.0, "p", 1, "INFO", "first"))
    logs().put(Line(now, "p", 1, "INFO", "second"))

    assert files(path) == ["log", "log.1"]
    assert "second" in path.read_text()


def test_a_file_that_was_moved_away_or_cut_is_left_to_who_did_it(path: Path) -> None:
    log = LogFile(str(path), max_size_bytes=1000, keep=3)
    write(log, *range(10))
    path.rename(path.with_name("mine"))
    write(log, 10)
    assert files(path) == ["log", "mine"]
    assert lines_of(path.with_name("mine")) == list(range(10))

    write(log, *range(11, 20))
    os.truncate(path, 0)
    write(log, 20)

    assert files(path) == ["log", "mine"]
    assert lines_of(path) == [20]


def test_a_folder_that_takes_no_files_lets_the_file_grow_and_says_so(path: Path) -> None:
    log = LogFile(str(path), max_size_bytes=1000, keep=1)
    # A folder of the name cannot be replaced by a file.
    Path(f"{path}.1").mkdir()

    write(log, *range(25))

    assert lines_of(path) == list(range(25))
    assert "cannot be exchanged" in str(log.problem) and "it grows on" in str(log.problem)


@contextlib.contextmanager
def a_full_disk(size_bytes: int) -> Iterator[None]:
    """Let no file become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_what_the_disk_does_not_take_is_counted_and_no_line_is_torn(path: Path) -> None:
    log = LogFile(str(path))
    with a_full_disk(1050):
        write(log, *range(13))
        assert "cannot be written: File too large" in str(log.problem)
    assert path.stat().st_size == 1000

    write(log, 13)

    assert log.problem is None
    *_, notice, last = path.read_text().splitlines()
    assert notice == "(3 log lines were lost here: File too large)"
    assert last.startswith("13 ")


def test_a_file_that_cannot_be_opened_anew_is_written_on(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    log = LogFile(str(folder / "log"))
    folder.rename(tmp_path / "moved")

    with pytest.raises(FileNotFoundError):
        log.reopen()
    write(log, 1)

    assert lines_of(tmp_path / "moved" / "log") == [1]
