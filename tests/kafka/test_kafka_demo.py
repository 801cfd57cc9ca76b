"""`streamd demo --kafka`, on a broker that is named and on one of its own."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient
from kafka_app import REPOSITORY, eventually

from streamd.demo import text


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="k-"))
    (path / "tmp").mkdir()
    yield path
    shutil.rmtree(path)


def demo(place: Path, out: Path, *words: str) -> "subprocess.Popen[bytes]":
    """A demo that writes to `out`."""
    environment = {
        **{name: value for name, value in os.environ.items() if "STREAMD_" not in name},
        "PYTHONPATH": str(REPOSITORY),
        "STREAMD_RUNTIME_DIR": str(place / "run"),
        "TMPDIR": str(place / "tmp"),
    }
    with out.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "streamd", "demo", "--kafka", "-p", "0", *words],
            env=environment, stdout=output, stderr=output,
        )  # fmt: skip


def test_on_a_named_broker_it_counts_exactly_and_deletes_what_it_made(
    kafka: str, place: Path
) -> None:
    out = place / "out"
    with demo(place, out, "--once", "--broker", f"kafka://{kafka}") as running:
        code = running.wait(120)

    told = out.read_text()
    right = Counter(text.words())
    assert code == 0, told
    assert f"exact: {right.total():,} words, {len(right):,} distinct" in told
    [id] = re.findall(r"as (demo-\w+)\.", told)
    admin = AdminClient({"bootstrap.servers": kafka})
    eventually(lambda: not [t for t in admin.list_topics(timeout=10).topics if id in t])
    groups = admin.list_consumer_groups(request_timeout=10).result().valid
    assert [each.group_id for each in groups if id in each.group_id] == []


def test_a_broker_of_its_own_ends_with_it_also_where_it_is_killed(place: Path) -> None:
    out = place / "out"
    running = demo(place, out)
    try:
        eventually(lambda: "Stats page" in out.read_text(), 300)
    finally:
        running.kill()
        running.wait()

    [port] = re.findall(r"On kafka://127.0.0.1:(\d+),", out.read_text())

    def is_gone() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", int(port))) != 0

    eventually(is_gone)
    eventually(lambda: not list((place / "tmp").glob("streamd-kafka-*/*-demo-*/")))
