"""What a broker is made of: its jars in the cache, and a Java to run them."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import kafka_java
import pytest
from kafka_jars import cache_folder, jars

SMALL = "org.slf4j:slf4j-simple:1.7.36"
own = pytest.mark.skipif("STREAMD_TEST_KAFKA" in os.environ, reason="needs its own Kafka")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache_folder()


@own
def test_jars_are_fetched_once_and_anew_where_they_are_damaged(
    cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = jars(SMALL, label="small")
    assert "small: 2 of 2 jars" in capfd.readouterr().err
    assert jars(SMALL, label="small") == first
    assert capfd.readouterr().err == ""
    whole = first[0].read_bytes()

    first[0].write_bytes(whole[:-1000])
    again = jars(SMALL, label="small")

    assert "damaged" in capfd.readouterr().err
    assert again[0].read_bytes() == whole


@own
def test_half_a_download_of_a_process_that_was_killed_is_not_used(cache: Path) -> None:
    key = hashlib.sha256(SMALL.encode()).hexdigest()[:16]
    path = "repository/org/slf4j/slf4j-simple/1.7.36/slf4j-simple-1.7.36.jar"
    half = cache / f"{key}.new" / path
    half.parent.mkdir(parents=True)
    half.write_bytes(b"PK half")

    found = jars(SMALL, label="small")

    assert found[0].stat().st_size > 1000
    assert not half.exists()


def test_no_network_is_one_sentence(cache: Path) -> None:
    script = "import kafka_jars as k; k.jars(k.BROKER, label='Kafka')"
    nowhere = {name: "http://127.0.0.1:9" for name in ("HTTPS_PROXY", "https_proxy")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, cwd=Path(__file__).parent, timeout=60,
        env=os.environ | nowhere | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip

    assert done.returncode == 1
    assert "StreamdError: Kafka cannot be fetched from Maven Central" in done.stderr
    assert list(cache.glob("*.new")) == []


def test_a_java_that_is_too_old_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "bin" / "java"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\" 2019-01-15' >&2\n")
    old.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))

    assert kafka_java.version_of(old) == 11
    assert kafka_java.version_of(tmp_path / "none") == 0
    assert kafka_java.version_of(kafka_java.java()) >= 17
