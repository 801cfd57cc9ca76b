"""What people read of librdkafka's complaints."""

import pytest

from streamd.agentproc.kafka.health import reason_of


@pytest.mark.parametrize(
    ("said", "read"),
    [
        (
            "k1:9092/bootstrap: Connect to ipv4#10.0.0.1:9092 failed: Connection refused "
            "(after 0ms in state CONNECT)",
            "k1:9092: Connection refused",
        ),
        (
            "k1:9092/bootstrap: Failed to resolve 'k1:9092': Name or service not known "
            "(after 3ms in state CONNECT)",
            "k1:9092: Failed to resolve 'k1:9092': Name or service not known",
        ),
        (
            "sasl_ssl://k1:9092/2: SASL authentication error: Authentication failed "
            "(after 10ms in state AUTH_REQ, 2 identical error(s) suppressed)",
            "k1:9092: SASL authentication error: Authentication failed",
        ),
        (
            "Failed to get metadata: Local: Broker transport failure",
            "Broker transport failure",
        ),
    ],
)
def test_a_reason_names_the_broker_and_what_it_did(said: str, read: str) -> None:
    assert reason_of(said) == read
