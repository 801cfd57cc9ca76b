"""What `/metrics` says, as a parser of the format reads it."""

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from streamd.webgw import metrics

CLIENT = {"records_read": 1200, "bytes_read": 9.5e9, "records_queued": 3, "round_trip_ms": 1.5}


def snapshot() -> dict[str, Any]:
    agent = {"name": "count#0", "group": "count", "state": "RUNNING", "restarts": 2,
             "checkpoints": 40, "client": CLIENT}  # fmt: skip
    lag = {"group": "count", "agent": "p.count", "topic": 'odd"\\\n', "partition": 3}
    return {
        "name": "p", "state": "running", "events": 12_345_678_901, "rate": 0.25,
        "processes": [agent, {"name": "master", "state": "RUNNING"}],
        "agents": [{"name": "p.count", "group": "count", "events": 7, "behind": 1}],
        "lag": [lag | {"behind": 9}],
    }  # fmt: skip


@pytest.fixture(scope="module")
def families() -> dict[str, Any]:
    text = metrics.render(snapshot(), 1).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families: dict[str, Any], name: str, **labels: str) -> float:
    """The one sample with these labels among its own."""
    samples = [
        sample.value
        for family in families.values()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(samples) == 1, samples
    return float(samples[0])


def test_a_parser_reads_numbers_of_any_size_exactly(families: dict[str, Any]) -> None:
    assert value(families, "streamd_events_total") == 12_345_678_901
    assert value(families, "streamd_event_rate") == 0.25


def test_lag_is_told_by_partition_also_where_names_are_odd(families: dict[str, Any]) -> None:
    labels = {"agent": "p.count", "topic": 'odd"\\\n', "partition": "3"}

    assert value(families, "streamd_lag_records", **labels) == 9


def test_what_the_kafka_clients_of_a_process_count_is_told(families: dict[str, Any]) -> None:
    of = {"process": "count#0", "group": "count"}

    assert value(families, "streamd_kafka_client_records_read_total", **of) == 1200
    assert value(families, "streamd_kafka_client_bytes_read_total", **of) == 9.5e9
    assert value(families, "streamd_kafka_client_round_trip_ms", **of) == 1.5
    assert value(families, "streamd_process_checkpoints_total", **of) == 40


def test_each_metric_has_a_help_and_a_type(families: dict[str, Any]) -> None:
    for family in families.values():
        assert family.documentation
        assert family.type in ("gauge", "counter")
