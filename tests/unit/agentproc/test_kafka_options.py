"""What Kafka's clients are told, by settings of every kind."""

import importlib
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from confluent_kafka import Producer

from streamd.agentproc.kafka import options
from streamd.config import resolve
from streamd.errors import ConfigError


def reach(**app: Any) -> options.Reach:
    given = {"id": "proj", "broker": "kafka://a", **app}
    return options.connection(resolve(given, {}, None, {}))


@pytest.mark.parametrize(
    ("client", "setting", "value", "option", "told"),
    [
        ("all", "broker_client_id", "us", "client.id", "us"),
        ("all", "broker_request_timeout", "9s", "socket.timeout.ms", 9000),
        ("all", "broker_options", {"linger.ms": 7}, "linger.ms", 7),
        ("member", "broker_session_timeout", "20s", "session.timeout.ms", 20_000),
        ("member", "broker_heartbeat_interval", "2s", "heartbeat.interval.ms", 2000),
        ("member", "broker_max_poll_interval", "1m", "max.poll.interval.ms", 60_000),
        ("member", "broker_check_crcs", True, "check.crcs", True),
        ("reader", "broker_check_crcs", True, "check.crcs", True),
        ("member", "consumer_max_fetch_size", "2MiB", "max.partition.fetch.bytes", 2 << 20),
        ("reader", "broker_consumer_options", {"fetch.min.bytes": 5}, "fetch.min.bytes", 5),
        ("producer", "producer_compression_type", "zstd", "compression.type", "zstd"),
        ("producer", "producer_linger", "20ms", "linger.ms", 20),
        ("producer", "producer_linger", 0, "linger.ms", 0),
        ("producer", "producer_max_batch_size", "2MB", "batch.size", 2_000_000),
        ("producer", "producer_request_timeout", "3s", "request.timeout.ms", 3000),
        ("producer", "broker_producer_options", {"linger.ms": 7}, "linger.ms", 7),
    ],
)
def test_a_setting_is_an_option_of_kafkas_client(
    client: str, setting: str, value: Any, option: str, told: Any
) -> None:
    given = reach(**{setting: value})
    clients = {
        "member": options.member(given, "g", "us", "us/1", together=False),
        "reader": options.reader(given, "g"),
        "producer": options.producer(given, transactional_id=None),
        "admin": given.admin,
    }

    for name in clients if client == "all" else [client]:
        assert clients[name][option] == told, name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"broker_options": {"group.id": "x"}}, "'group.id' cannot be given: streamd names"),
        ({"broker_producer_options": {"acks": 1}}, "'acks' cannot be given: another value"),
        ({"broker_options": "client.id=x"}, "the setting broker_client_id says it"),
        ({"broker_options": {"error_cb": "x"}}, "'error_cb' cannot be given: it is a function"),
        ({"broker_options": {"no.such": 1}}, 'No such configuration property: "no.such"'),
        ({"broker_options": {"debug": "x"}}, 'Invalid value "x" for configuration property'),
        ({"broker_options": {"ssl.ca.location": "/no/ca"}}, "ssl.ca.location is '/no/ca'"),
        ({"broker_heartbeat_interval": "10s"}, "the session that it keeps alive ends after"),
        ({"broker_max_poll_interval": "1s"}, "less than broker_session_timeout"),
    ],
    ids=str,
)
def test_options_that_streamd_or_librdkafka_refuse_are_told(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        reach(**given)

    assert message in str(refused.value)
    assert refused.value.remedy


def test_nobody_is_asked_for_a_token_to_see_whether_options_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "given_tokens.py").write_text(
        "asked = []\ndef token():\n    asked.append(1)\n    return 'a.b.c'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    given = reach(broker_credentials={"oauth_cb": "given_tokens:token"})

    assert given.admin["oauth_cb"]("") == ("a.b.c", ANY, "", {})
    assert importlib.import_module("given_tokens").asked == [1]


def test_librdkafka_takes_what_a_transactional_producer_is_told() -> None:
    given = reach(broker_request_timeout="60s", broker_session_timeout="6s")
    told = options.producer(given, transactional_id="us/1")

    producer = Producer({**told, "bootstrap.servers": "", "error_cb": lambda error: None})

    assert len(producer) == 0
    assert told["socket.timeout.ms"] == 6000


def test_what_comes_before_the_last_transaction_is_over_is_soon_tried_again() -> None:
    # By librdkafka's own 100 ms, each of many transactions in a row takes as long.
    assert options.producer(reach(), transactional_id="us/1")["retry.backoff.ms"] < 10

    given = reach(broker_producer_options={"retry.backoff.ms": 50})
    assert options.producer(given, transactional_id="us/1")["retry.backoff.ms"] == 50


def test_a_table_of_the_file_has_options_with_their_own_names(tmp_path: Path) -> None:
    file = tmp_path / "streamd.toml"
    file.write_text("web_port = 1\n[broker_options]\n'linger.ms' = 7\n")

    settings = resolve({"id": "proj"}, {}, file, {})

    assert settings.broker_options == {"linger.ms": 7}
    assert settings.origin("broker_options") == "streamd.toml:2"
