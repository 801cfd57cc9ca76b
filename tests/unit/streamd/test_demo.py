"""The demo: its text, its command, and what it leaves behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import streamd
from streamd.demo import text
from streamd.demo.show import _judge
from streamd.instance import Folder

ROOT = Path(streamd.__file__).parent.parent


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="demo-"))
    (path / "tmp").mkdir()
    yield path
    shutil.rmtree(path)


def _environment(place: Path) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if name[:8] != "STREAMD_"},
        "PYTHONPATH": str(ROOT),
        "STREAMD_RUNTIME_DIR": str(place / "run"),
        "TMPDIR": str(place / "tmp"),
    }


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "streamd", "demo", "-p", "0", *words]


def _eventually(is_so: Callable[[], Any], within_s: float = 20.0) -> Any:
    deadline = time.monotonic() + within_s
    while not (result := is_so()):
        assert time.monotonic() < deadline, f"not so after {within_s} s"
        time.sleep(0.02)
    return result


def _is_free(place: Path) -> bool:
    """True when no process of the tree is left: one that lives holds the lock."""
    lock = Folder(place / "run" / "demo").try_lock()
    if lock is not None:
        os.close(lock)
    return lock is not None


def test_the_text_is_real_and_has_a_word_in_each_post() -> None:
    assert len(text.words()) > 50_000
    assert all(post.split() for post in text.posts())
    assert Counter(text.words()).most_common(1)[0][0] == "the"


def test_a_wrong_count_is_told_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    right = Counter(a=2, b=1)

    code = _judge(Counter(a=2, c=1), right, 0.1)

    told = capsys.readouterr().out
    assert code == 1
    assert "'b' was counted 0 times" in told and "'c' was counted 1 times" in told


def test_once_counts_exactly_and_leaves_nothing(place: Path) -> None:
    done = subprocess.run(
        _command("--once"), env=_environment(place), capture_output=True, timeout=90
    )

    told = done.stdout.decode()
    right = Counter(text.words())
    assert done.returncode == 0, told + done.stderr.decode()
    assert f"exact: {right.total():,} words, {len(right):,} distinct" in told
    assert f"{right['the']:,}  the" in told
    assert list((place / "tmp").iterdir()) == []
    assert _is_free(place)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_runs_until_a_signal_and_ends_cleanly(place: Path, number: int) -> None:
    with (place / "out").open("wb") as out:
        demo = subprocess.Popen(
            _command(), env=_environment(place), stdout=out, stderr=out, start_new_session=True
        )
    try:
        found = _eventually(
            lambda: re.search(r"curl (http\S+/count/)the/", (place / "out").read_text())
        )
        _eventually(lambda: "words/s" in (place / "out").read_text())

        def counted() -> int:
            with urllib.request.urlopen(found[1] + "the/", timeout=5) as page:
                return int(json.load(page)["the"])

        _eventually(lambda: counted() > 10)
        demo.send_signal(number)
        code = demo.wait(20)
    finally:
        demo.kill()

    assert code == 0
    assert list((place / "tmp").iterdir()) == []
    assert _is_free(place)


def test_a_killed_demo_takes_its_tree_along(place: Path) -> None:
    with (place / "out").open("wb") as out:
        demo = subprocess.Popen(_command(), env=_environment(place), stdout=out, stderr=out)
    _eventually(lambda: "Stats page" in (place / "out").read_text())

    demo.kill()
    demo.wait()

    _eventually(lambda: _is_free(place))


def test_a_taken_port_is_told_with_the_tree_s_exit_code(place: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1"],
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as other:  # fmt: skip
        try:
            assert other.stdout is not None
            port = re.findall(rb"port (\d+)", other.stdout.readline())[0].decode()
            done = subprocess.run(
                _command("--once", "-p", port),
                env=_environment(place), capture_output=True, timeout=60,
            )  # fmt: skip
        finally:
            other.kill()

    assert done.returncode == 75
    assert port in done.stderr.decode()


def test_kafka_and_another_broker_contradict_each_other(place: Path) -> None:
    done = subprocess.run(
        [*_command("--kafka"), "--broker", "embedded://"],
        env=_environment(place), capture_output=True, timeout=60,
    )  # fmt: skip

    assert done.returncode == 78
    assert "contradict each other" in done.stderr.decode()
    assert list((place / "tmp").iterdir()) == []
