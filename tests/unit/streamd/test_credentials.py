"""Who an app is to its cluster, however it is said."""

import ssl
from typing import Any

import pytest

from streamd import OAuthCredentials, SASLCredentials, SSLCredentials
from streamd.config import Settings, resolve
from streamd.credentials import security, token_of
from streamd.errors import ConfigError
from streamd.secrets import mask

PASSWORD = 'it\'s "so", ok;'


class Tokens:
    async def token(self) -> str:
        return "x"


def settled(environ: dict[str, str] | None = None, **app: Any) -> Settings:
    return resolve({"id": "proj", "broker": "kafka://a", **app}, environ or {}, None, {})


def told(settings: Settings) -> dict[str, Any]:
    """What librdkafka is told, by a process that knows the settings from a frame."""
    there = Settings.of_plain(settings.plain())
    return security(there.broker, there.broker_credentials, there.broker_options)


PLAIN = {
    "sasl.mechanism": "PLAIN",
    "sasl.username": "ann",
    "sasl.password": PASSWORD,
    "security.protocol": "sasl_plaintext",
}
SCRAM_TLS = {
    **PLAIN,
    "sasl.mechanism": "SCRAM-SHA-512",
    "security.protocol": "sasl_ssl",
    "ssl.ca.location": "/ca.pem",
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"broker": "kafka+ssl://a"}, {"security.protocol": "ssl"}),
        ({"broker": "kafka://ann:it%27s%20%22so%22%2c%20ok%3b@a;b"}, PLAIN),
        ({"broker_credentials": {"username": "ann", "password": PASSWORD}}, PLAIN),
        ({"broker_options": {"sasl.username": "ann", "sasl.password": PASSWORD}}, PLAIN),
        ({"broker_credentials": SASLCredentials(username="ann", password=PASSWORD)}, PLAIN),
        (
            {"broker_credentials": SASLCredentials(
                username="ann", password=PASSWORD, mechanism="scram_sha_512",
                ssl_context=SSLCredentials(cafile="/ca.pem"),
            )},
            SCRAM_TLS,
        ),
        (
            {"broker_credentials": {"username": "ann", "password": PASSWORD,
                                    "mechanism": "SCRAM-SHA-512", "cafile": "/ca.pem"}},
            SCRAM_TLS,
        ),
        (
            {"broker": "kafka+ssl://ann:it%27s%20%22so%22%2c%20ok%3b@a",
             "broker_options": {"sasl.mechanisms": "SCRAM-SHA-512",
                                "ssl.ca.location": "/ca.pem"}},
            SCRAM_TLS,
        ),
        (
            {"broker_credentials": SSLCredentials(
                certfile="/me.pem", keyfile="/me.key", key_password="sesame"
            )},
            {"security.protocol": "ssl", "ssl.certificate.location": "/me.pem",
             "ssl.key.location": "/me.key", "ssl.key.password": "sesame"},
        ),
    ],
)  # fmt: skip
def test_however_it_is_said_librdkafka_is_told_the_same(
    given: dict[str, Any], expected: dict[str, Any]
) -> None:
    settings = settled(**given)

    assert told(settings) == expected
    shown = " ".join(f"{row.name}={row.value}" for row in settings.shown())
    assert "it's" not in shown and "it%27s" not in shown and "sesame" not in shown
    assert "it's" not in repr(settings.broker_credentials)


def test_the_environment_says_credentials_and_options_in_one_text() -> None:
    settings = settled(
        {
            "STREAMD_BROKER_CREDENTIALS": "username=ann,password=abc,tls=true",
            "STREAMD_BROKER_OPTIONS": '{"linger.ms": 3}',
        }
    )

    assert told(settings)["security.protocol"] == "sasl_ssl"
    assert settings.broker_options == {"linger.ms": 3}


def test_a_context_gives_its_certificates_and_checks() -> None:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE

    for given in ({"ssl_context": context}, {"broker_credentials": SSLCredentials(context)}):
        options = told(settled(**given))

        assert options["security.protocol"] == "ssl"
        assert options["enable.ssl.certificate.verification"] is False
        assert options["ssl.endpoint.identification.algorithm"] == "none"


def test_who_gives_tokens_is_found_again_by_name() -> None:
    settings = settled(broker_credentials=OAuthCredentials(oauth_cb=Tokens))

    assert told(settings)["sasl.mechanism"] == "OAUTHBEARER"
    there = Settings.of_plain(settings.plain()).broker_credentials
    assert there is not None
    assert token_of(there.oauth_cb).__self__.__class__ is Tokens  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="cannot be imported"):
        token_of("no_such_module:token")
    with pytest.raises(ValueError, match="no other process can import"):
        OAuthCredentials(oauth_cb=lambda: "x")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"broker_credentials": {"usrname": "x"}}, "did you mean username"),
        ({"broker_credentials": {"mechanism": "SCRAM-SHA-511"}}, "did you mean SCRAM-SHA-512"),
        ({"broker_credentials": {"pasword": "sesame"}}, "{'pasword': '***'}"),
        ({"broker_credentials": "pasword=sesame"}, "'pasword' is nothing"),
        ({"broker_credentials": "sesame"}, "expected SASLCredentials"),
        (
            {"broker": "kafka://u:sesame@a", "broker_options": {"sasl.username": "x"}},
            "in the broker's URL and in broker_options",
        ),
        ({"broker": "kafka://u:sesame@a;v:sesame@b"}, "different users or passwords"),
    ],
)
def test_what_cannot_be_is_told_without_the_secret(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        settled(**given)

    text = f"{refused.value} {refused.value.seen} {refused.value.remedy}"
    assert message in text
    assert "sesame" not in mask(text) or given["broker_credentials"] == "sesame"
