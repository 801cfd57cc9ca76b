"""Trouble with the cluster: an app waits, says what it waits for, and goes on exactly."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kafka_broker import Cluster
from kafka_hosts import eventually, sooner
from kafka_trouble import EXACTLY_ONCE, app

SESSION_S = 3.0
OUTAGE_S = 3.5  # and until the broker is there again, which takes longer than a session
LONG_OUTAGE_S = 10.0


@pytest.fixture(autouse=True)
def with_cluster(kafka_node: Cluster) -> Iterator[None]:
    """Each test begins and ends with a broker that runs."""
    kafka_node.start()
    yield
    for node in kafka_node.nodes:
        node.resume()
    kafka_node.start()


def test_an_outage_is_told_once_and_costs_nothing(kafka_node: Cluster, tmp_path: Path) -> None:
    with app(kafka_node, tmp_path, STREAMD_BROKER_SESSION_TIMEOUT=str(SESSION_S)) as made:
        made.start()
        kafka_node.kill()
        ended_at = time.monotonic()
        waits = f"waits for the cluster at {kafka_node.bootstrap}: "
        waits += f"{kafka_node.bootstrap}: Connection refused"
        eventually(lambda: made.host.status().get("sentence") == f"count#0, count#1: {waits}.")
        assert made.host.state() == "degraded"
        eventually(lambda: made.not_ready().endswith(waits))
        eventually(lambda: time.monotonic() - ended_at > OUTAGE_S)
        # Each process has told it, and perhaps now and then that it lasts.
        told = [line.split(maxsplit=2)[2] for line in made.lines()]
        assert len(told) >= 2 and len(set(told)) == len(told), told
        kafka_node.start()
        made.flows()
        eventually(lambda: made.host.state() == "running")
        eventually(lambda: made.host.log().count("can be reached again after") in (2, 3))
        made.ends_exact()
        assert made.restarts() == 0, made.host.log()
        assert "%" not in made.host.log(), "librdkafka writes to stderr"


def test_an_outage_longer_than_a_transaction_may_last_costs_nothing_exactly_once(
    kafka_node: Cluster, tmp_path: Path
) -> None:
    with app(kafka_node, tmp_path, **EXACTLY_ONCE) as made:
        made.start()
        kafka_node.kill()
        ended_at = time.monotonic()
        eventually(lambda: time.monotonic() - ended_at > LONG_OUTAGE_S)
        kafka_node.start()
        made.flows()
        made.ends_exact()
        assert made.restarts() == 0, made.host.log()


def test_a_start_without_a_broker_waits_and_says_for_what(
    kafka_node: Cluster, tmp_path: Path
) -> None:
    with app(kafka_node, tmp_path, lines=sooner(health_SAY_AGAIN_S=2.0)) as made:
        kafka_node.kill()
        assert made.host.command("start --no-wait").returncode == 0
        eventually(lambda: "it waits for the cluster" in made.host.status().get("sentence", ""))
        status = made.host.status()
        assert status["state"] == "starting"
        assert f"waits for the cluster at {kafka_node.bootstrap}: " in status["sentence"]
        # It is told again, and nothing is restarted meanwhile.
        eventually(lambda: re.search(r"cannot be reached for \d+ s now", made.host.log()))
        kafka_node.start()
        made.start()
        eventually(lambda: made.host.state() == "running")
        made.ends_exact()
        assert made.restarts() == 0


@pytest.mark.parametrize("way", ["killed", "silent"])
def test_a_stop_during_an_outage_ends_in_time_and_loses_nothing(
    kafka_node: Cluster, tmp_path: Path, way: str
) -> None:
    grace_s = 3
    with app(kafka_node, tmp_path, STREAMD_GRACE=str(grace_s)) as made:
        made.start()
        if way == "killed":
            kafka_node.kill()
            eventually(made.waits_for)
        else:
            kafka_node.nodes[0].pause()
        asked_at = time.monotonic()
        stopped = made.host.command("stop")
        took_s = time.monotonic() - asked_at
        kafka_node.nodes[0].resume()
        kafka_node.start()
        made.host.start()
        made.ends_exact()
    assert stopped.returncode == 0, stopped.stderr
    assert took_s < grace_s + 10
