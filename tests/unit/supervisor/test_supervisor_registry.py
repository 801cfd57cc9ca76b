"""What the registry keeps, and how it is read where no master lives."""

import os
from pathlib import Path

import pytest

from streamd.errors import StreamdError
from streamd.instance import identify
from streamd.supervisor.registry import Registry, read_history


def test_history_is_read_while_a_master_writes_and_after_it(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    registry = Registry()
    registry.started("zygote", identify(os.getpid()), 0)
    registry.note("INFO", "start", "started by start")
    registry.open(path)
    registry.ended("count#0", "exited with 5")
    registry.note("WARNING", "restart", "count#0 exited with 5; restarted at once", "count#0")
    registry.close(5.0)
    again = Registry()
    again.open(path)

    read = read_history(path)

    again.close(5.0)
    assert read == read_history(path)
    assert [(event["n"], event["kind"], event["process"]) for event in read.events] == [
        (1, "start", ""),
        (2, "restart", "count#0"),
    ]
    # Written before the data directory was known.
    assert read.starts["zygote"]["pid"] == os.getpid()
    assert read.exits["count#0"]["how"] == "exited with 5"
    assert again.events == read.events


def test_events_of_a_new_life_are_numbered_after_those_of_the_last_one(tmp_path: Path) -> None:
    for _ in range(2):
        registry = Registry()
        registry.note("INFO", "start", "started")
        registry.open(tmp_path / "registry.db")
        registry.note("INFO", "stop", "ended")
        registry.close(5.0)

    assert [event["n"] for event in registry.events] == [1, 2, 3, 4]


def test_no_history_and_a_damaged_one_are_told_and_left_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    with pytest.raises(StreamdError, match="there is no history at"):
        read_history(path)
    assert not path.exists()

    path.write_bytes(b"garbage" * 1000)
    with pytest.raises(StreamdError, match="cannot be read"):
        read_history(path)
    assert path.read_bytes() == b"garbage" * 1000
