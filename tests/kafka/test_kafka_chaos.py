"""Whoever is killed, stopped or moved at any step of the work on Kafka: all stays exact.

The short form of `scripts/chaos kafka`.
"""

import itertools

import pytest
from chaos_kafka_kills import SETTINGS, run_on_kafka
from chaos_oracle import drain, problems
from chaos_tree import Load, complaints, eventually, instance
from kafka_broker import Cluster

from streamd.failpoints import FAILPOINTS

RECOVERY = ("before-restore", "before-repair", "before-claim", "after-claim")
TRANSACTION = (
    "before-begin", "after-begin", "after-outputs", "before-offsets", "before-commit",
    "after-commit",
)  # fmt: skip
MARKERS = (
    "before-outputs", "after-outputs", "before-flush", "before-markers",
    "before-marker-flush", "after-markers",
)  # fmt: skip
GUARANTEES = {"at_least_once": MARKERS, "exactly_once": TRANSACTION}


def test_every_failpoint_of_kafka_is_tried_here() -> None:
    tried = {f"kafka.{name}" for name in (*RECOVERY, *TRANSACTION, *MARKERS)}

    assert tried == {name for name in FAILPOINTS if name.startswith("kafka.")}


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_a_kill_at_each_failpoint_costs_nothing_and_doubles_nothing(
    kafka: str, guarantee: str
) -> None:
    names = [f"kafka.{name}" for name in (*GUARANTEES[guarantee], *RECOVERY)]
    nth = itertools.cycle((1, 2, 3))
    parts = [f"{name}:{1 if name.endswith(RECOVERY) else next(nth)}:kill" for name in names]
    settings = {**SETTINGS, "STREAMD_PROCESSING_GUARANTEE": guarantee}
    with instance(kafka, settings) as made:
        made.start(STREAMD_TEST="1", STREAMD_FAILPOINT=",".join(parts))
        with Load(made, seed=1, pause_s=0.04) as load:
            load.spoil("once")
            for name in names:
                eventually(lambda: made.fired(name), name, 60.0)  # noqa: B023
            batches = load.batches
            eventually(lambda: load.batches > batches + 5, "events flow in the end", 60.0)
        drain(made)
        made.stop()

        assert problems(made, load.acked) == []
        assert complaints(made) == []


@pytest.mark.parametrize(("guarantee", "seed"), [("at_least_once", 1), ("exactly_once", 2)])
def test_attacks_on_processes_and_hosts_leave_everything_exact(
    kafka_node: Cluster, guarantee: str, seed: int
) -> None:
    report = run_on_kafka(kafka_node, 15, seed, guarantee)

    assert report.problems == [], report
    assert report.complaints == [], report
    assert report.events > 200, report
