import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamd import log
from streamd.errors import ConfigError
from streamd.instance import instance_name
from streamd.log import PipeFormatter, setup_child_logging, user_traceback
from streamd.logpipe import RECORD_START, PipeHandler


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield reader, writer
    os.close(reader)
    os.close(writer)


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    level = root.level
    yield root
    for handler in list(root.handlers):
        if isinstance(handler, PipeHandler):
            root.removeHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(False)


def lines_of(data: bytes) -> list[dict[str, Any]]:
    lines = data.decode().removesuffix("\n").split("\n")
    assert all(line.startswith(RECORD_START) for line in lines)
    return [json.loads(line[1:]) for line in lines]


def record(text: str, *args: object, error: BaseException | None = None) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("proj.mod", logging.INFO, "mod.py", 1, text, args, info)


def test_a_record_becomes_one_line_whatever_its_text() -> None:
    line = PipeFormatter().format(record("a\nb %s", "\x1e\udc80"))

    assert "\n" not in line
    fields = json.loads(line[1:])
    assert (fields["l"], fields["n"], fields["m"]) == ("INFO", "proj.mod", "a\nb \x1e\\udc80")
    assert isinstance(fields["t"], float)


def test_a_wrong_format_string_is_logged_all_the_same() -> None:
    fields = json.loads(PipeFormatter().format(record("%d words", "many"))[1:])

    assert fields["m"].startswith("%d words ('many',)")


def test_a_traceback_is_part_of_the_text() -> None:
    try:
        dict[str, int]()["word"]
    except KeyError as error:
        fields = json.loads(PipeFormatter().format(record("failed", error=error))[1:])

    assert fields["m"].startswith("failed\nTraceback")
    assert fields["m"].endswith("KeyError: 'word'")


def test_an_error_of_streamds_own_is_cut_to_the_users_frames() -> None:
    try:
        instance_name("x", "a/b")
    except ConfigError as error:
        text = user_traceback(error)

    assert "test_log.py" in text
    assert "instance.py" not in text


def test_a_fault_inside_streamd_keeps_its_innermost_frames() -> None:
    try:
        setup_child_logging("loud")
    except KeyError as error:
        text = user_traceback(error)

    assert "test_log.py" in text
    assert log.__file__ in text


def test_a_cyclic_chain_of_causes_ends() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first

    assert "first" in user_traceback(first)


def test_setup_twice_writes_once_and_takes_warnings(
    pipe: tuple[int, int], root_logger: logging.Logger
) -> None:
    setup_child_logging("info", pipe[1])
    setup_child_logging("info", pipe[1])

    logging.getLogger("proj").info("once")
    logging.getLogger("proj").debug("never")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("look out", stacklevel=1)

    lines = lines_of(os.read(pipe[0], 65536))
    assert [line["n"] for line in lines] == ["proj", "py.warnings"]
    assert "look out" in lines[1]["m"]


def test_a_process_logs_to_its_stderr_and_prints_beside() -> None:
    code = (
        "import logging, sys; from streamd.log import setup_child_logging;"
        "setup_child_logging('info'); print('plain', file=sys.stderr, flush=True);"
        "logging.getLogger('proj').warning('said')"
    )
    root = Path(log.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=root)

    plain, line = done.stderr.decode().removesuffix("\n").split("\n")
    assert plain == "plain"
    assert json.loads(line[1:])["l"] == "WARNING"
