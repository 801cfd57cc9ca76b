"""Secrets are masked, by their form or their value, and nothing else is."""

from collections.abc import Iterator

import pytest

from streamd import secrets
from streamd.errors import StreamdError
from streamd.log import user_traceback
from streamd.secrets import hide, mask, may_hold_secrets, secrets_of


@pytest.fixture(autouse=True)
def _nothing_hidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(secrets, "_hidden", set())
    yield


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("kafka://ann:pass@a:9092;kafka://b:c@d", "kafka://ann:***@a:9092;kafka://b:***@d"),
        ("kafka://ann:pass@a:9092;b:c@d,e:f@g:1", "kafka://ann:***@a:9092;b:***@d,e:***@g:1"),
        ("kafka://ann:p@s/s:w@a:9092", "kafka://ann:***@a:9092"),
        ("pg://:only@a/db?x=1", "pg://:***@a/db?x=1"),
        ("STREAMD_WEB_TOKEN=abc next", "STREAMD_WEB_TOKEN=*** next"),
        ("{'web_token': 'abc'}", "{'web_token': '***'}"),
        ("--web-token abc", "--web-token ***"),
        ("sasl.password=abc,acks=1", "sasl.password=***,acks=1"),
        ("{'sasl.password': 'a b, c', 'acks': 1}", "{'sasl.password': '***', 'acks': 1}"),
        ('"sasl.oauthbearer.client.secret":"xyz"', '"sasl.oauthbearer.client.secret":"***"'),
        ("username='ann' password='open", "username='ann' password='***"),
        ("PGPASSWORD=abc", "PGPASSWORD=***"),
        ("got eyJhbGciOi.eyJzdWIi.x-1_ and", "got *** and"),
    ],
)
def test_secrets_are_masked(text: str, shown: str) -> None:
    assert may_hold_secrets(text)
    assert mask(text) == shown
    assert mask(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "kafka://a:9092",
        "http://a:6066/x@y",
        "see http://a/ or mail b:c@d",
        "//x:y@z",
        "the next token: the",
        "a password reset",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert mask(text) == text


def test_a_hidden_value_is_masked_wherever_it_stands() -> None:
    hide(["s3cr3t-value", "ab"])

    assert mask("got s3cr3t-value about") == "got *** about"


def test_the_secrets_of_settings_are_found_as_written_and_decoded() -> None:
    settings = {
        "broker": "kafka://a:p%40ss@h:1;b:other@h",
        "web_token": "t0ken",
        "env": ["DB=pg://u:inner@h"],
        "web_port": 1,
        "broker_options": {"ssl.key.password": "key", "ssl.key.pem": "pem", "debug": "all"},
    }

    found = set(secrets_of(settings))

    assert found == {"p%40ss", "p@ss", "other", "t0ken", "inner", "key", "pem"}


def test_errors_and_tracebacks_are_masked() -> None:
    error = StreamdError(
        "no kafka://a:pass@b", seen=["kafka://a:pass@b"], remedy="kafka://a:pass@b"
    )
    try:
        raise ValueError("no kafka://a:pass@b")
    except ValueError as raised:
        shown = user_traceback(raised)

    assert "pass" not in f"{error} {error.seen} {error.remedy}"
    assert "ValueError: no kafka://a:***@b" in shown
    assert ":pass@" not in shown
