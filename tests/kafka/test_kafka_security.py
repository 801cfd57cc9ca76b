"""TLS and logins on a real broker: each way works for a whole app, each failure is named."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import kafka_secure
import pytest
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)
from kafka_app import WORDS, Site, eventually, site
from kafka_clients import unique
from kafka_hosts import sooner
from kafka_secure import PASSWORD, USER, Secure

from streamd.agentproc.kafka import decisions
from streamd.agentproc.kafka.checking import Step, steps
from streamd.config import resolve

TOKENS = """
import base64, json, time

def part(**words):
    return base64.urlsafe_b64encode(json.dumps(words).encode()).rstrip(b"=").decode()

async def token():
    now = time.time()
    return part(alg="none") + "." + part(sub="ann", iat=now, exp=now + 3600) + "."
"""


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    broker = kafka_secure.start(tmp_path_factory.mktemp("secure"))
    yield broker
    broker.remove()


def login(mechanism: str, **more: str) -> dict[str, str]:
    return {"mechanism": mechanism, "username": USER, "password": PASSWORD, **more}


def ways(secure: Secure) -> dict[str, tuple[str, dict[str, Any]]]:
    """Listener and credentials."""
    tls = {"cafile": str(secure.ca)}
    own = {"certfile": str(secure.certificate), "keyfile": str(secure.key)}
    return {
        "PLAIN": ("LOGIN", login("PLAIN")),
        "SCRAM-SHA-256": ("LOGIN", login("SCRAM-SHA-256")),
        "SCRAM-SHA-512 by TLS": ("BOTH", login("SCRAM-SHA-512", **tls)),
        "OAUTHBEARER": ("LOGIN", {"oauth_cb": "tokens:token"}),
        "certificate": ("MUTUAL", {**tls, **own}),
        "TLS": ("TLS", tls),
        "wrong password": ("LOGIN", {**login("SCRAM-SHA-512"), "password": "wrong-word"}),
        "no login": ("LOGIN", {}),
        "no TLS": ("TLS", {}),
        "TLS on a listener without": ("LOGIN", login("PLAIN", **tls)),
        "unknown authority": ("TLS", {"tls": True}),
        "no certificate": ("MUTUAL", tls),
    }


def go(place: Site, secure: Secure, way: str) -> None:
    """Let the app go this way."""
    listener, credentials = ways(secure)[way]
    (place.place / "tokens.py").write_text(TOKENS)
    place.environment["STREAMD_BROKER"] = f"kafka://localhost:{secure.ports[listener]}"
    place.environment["STREAMD_BROKER_CREDENTIALS"] = json.dumps(credentials)


@pytest.mark.parametrize(
    "way", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512 by TLS", "OAUTHBEARER", "certificate"]
)
def test_an_app_runs_by_each_way(secure: Secure, way: str) -> None:
    with site(WORDS, unique("secure"), "localhost:1") as words:
        go(words, secure, way)
        words.do(["send", f"{words.id}-posts", "a b a"])
        words.do("start")
        eventually(lambda: words.count_of("a") == 2)
        shown = words.do("config") + words.do("status --json") + words.do("logs")

    assert PASSWORD not in shown and "sesame" not in shown and "eyJ" not in shown


def walked(secure: Secure, way: str) -> list[Step]:
    listener, credentials = ways(secure)[way]
    broker = f"kafka://localhost:{secure.ports[listener]}"
    app = {"id": "proj", "broker": broker, "broker_credentials": credentials or None}
    return list(steps(resolve(app, {}, None, {})))


def test_each_step_of_the_way_is_told(secure: Secure) -> None:
    for way in ("certificate", "SCRAM-SHA-512 by TLS"):
        told = {step.name: step for step in walked(secure, way)}

        assert not any(step.exit_code for step in told.values())
        assert {"name", "connect", "TLS", "version"} <= told.keys()
        assert told["version"].text == "Kafka 4.0 or later"
    assert told["login"].text == f"SCRAM-SHA-512 as {USER}"


@pytest.mark.parametrize(
    ("way", "step", "text"),
    [
        ("wrong password", "login", "Authentication failed"),
        ("no login", "login", "ends the connection of who does not log in"),
        ("no TLS", "TLS", "the server speaks TLS only"),
        ("TLS on a listener without", "TLS", "the server does not speak TLS"),
        ("unknown authority", "TLS", "certificate verify failed"),
        ("no certificate", "TLS", "certificate"),
    ],
)
def test_the_step_that_fails_is_told(secure: Secure, way: str, step: str, text: str) -> None:
    last = walked(secure, way)[-1]

    assert (last.name, last.exit_code) == (step, 69)
    assert text in last.text
    assert last.remedy


@pytest.mark.parametrize(
    ("broker", "step"),
    [("kafka://no-such-host.invalid", "name"), ("kafka://127.0.0.1:1", "connect")],
)
def test_a_name_or_a_port_that_leads_nowhere_is_told(broker: str, step: str) -> None:
    *_, last = steps(resolve({"id": "proj", "broker": broker}, {}, None, {}))

    assert (last.name, last.exit_code) == (step, 69)


def test_check_tells_the_failed_step_and_what_is_not_permitted(secure: Secure) -> None:
    with site(WORDS, unique("secure"), "localhost:1") as words:
        go(words, secure, "wrong password")
        wrong = words.run("check --json")
        go(words, secure, "PLAIN")
        words.do(["send", f"{words.id}-posts", "a"])
        well = words.run("check --json")
        rule(secure, f"{words.id}-posts", AclOperation.ALL, AclPermissionType.ALLOW)
        rule(secure, f"{words.id}-posts", AclOperation.READ, AclPermissionType.DENY)
        denied = words.run("check --json")
        rule(secure, f"{words.id}-posts", AclOperation.DESCRIBE, AclPermissionType.DENY)
        hidden = words.run("check --json")

    assert wrong.returncode == 69
    assert "login failed: " in wrong.stdout and "wrong-word" not in wrong.stdout
    assert well.returncode == 0
    assert denied.returncode == 69
    assert f"topic '{words.id}-posts': no permission to read" in denied.stdout
    assert hidden.returncode == 69
    assert "permission failed: " in hidden.stdout


OWN, GROUP = "-proj.count", ".split"


@contextmanager
def running(secure: Secure, **settings: str) -> Iterator[Site]:
    """An app whose user has a rule for each of the topics that tests take from it."""
    app = sooner(access_LOOK_S=0.5) + WORDS
    with site(app, unique("secure"), "localhost:1") as words:
        go(words, secure, "PLAIN")
        words.environment |= settings
        words.do(["send", f"{words.id}-posts", "a"])
        words.do("start")
        for name in (f"{words.id}-posts", f"{words.id}{OWN}", f"{words.id}{GROUP}"):
            rule(secure, name, AclOperation.ALL, AclPermissionType.ALLOW)
        eventually(lambda: words.count_of("a") == 1)
        yield words


def see_writing_waits(secure: Secure, words: Site) -> None:
    """Take the permission to write away for a while."""
    own = f"{words.id}{OWN}"
    with denied(secure, own, AclOperation.WRITE):
        words.do(["send", f"{words.id}-posts", "a c"])
        told = f"permission to write topic '{own}'"
        eventually(lambda: told in words.waits_for())
    eventually(lambda: words.count_of("c") == 1)
    eventually(lambda: words.status()["state"] == "running")
    assert words.count_of("a") == 2
    # What was refused is sent by a successor, which begins once it may.
    assert sum(each["restarts"] for each in words.status()["processes"]) <= 1


def test_a_permission_that_is_taken_away_is_waited_for(secure: Secure) -> None:
    with running(secure) as words:
        posts = f"{words.id}-posts"
        with denied(secure, posts, AclOperation.READ):
            told = eventually(words.waits_for)
            words.do(["send", posts, "b"])
        eventually(lambda: words.count_of("b") == 1)
        see_writing_waits(secure, words)
        lines = [line for line in words.do("logs").splitlines() if " WARNING " in line]

    assert told == (
        f"waits for permission to read topic '{posts}': give user '{USER}' an ACL for it"
    )
    assert len(lines) <= 3, lines


def test_a_group_that_is_taken_away_is_waited_for(secure: Secure) -> None:
    with running(secure, STREAMD_BROKER_SESSION_TIMEOUT="3") as words:
        group = f"{words.id}{GROUP}"
        with denied(secure, group, AclOperation.READ):
            told = eventually(words.waits_for)
            status = words.status()
            words.do(["send", f"{words.id}-posts", "b"])
        eventually(lambda: words.count_of("b") == 1)
        eventually(lambda: words.status()["state"] == "running")
        processes = words.status()["processes"]
        log = words.do("logs")

    assert told == (
        f"waits for permission to read group '{group}': give user '{USER}' an ACL for it"
    )
    assert status["state"] == "degraded"
    assert log.count("waits for permission") == 1, log
    assert not any(each["restarts"] for each in processes)


def test_a_start_without_its_group_waits_for_it(secure: Secure) -> None:
    with site(sooner(access_LOOK_S=0.5) + WORDS, unique("secure"), "localhost:1") as words:
        go(words, secure, "PLAIN")
        group = f"{words.id}{GROUP}"
        with denied(secure, group, AclOperation.READ):
            words.do(["start", "--no-wait"])
            eventually(lambda: words.run("status --json").stdout)
            told = eventually(words.waits_for)
            rule(secure, group, AclOperation.ALL, AclPermissionType.ALLOW)
        words.do(["send", f"{words.id}-posts", "a"])
        eventually(lambda: words.count_of("a") == 1)
        eventually(lambda: words.status()["state"] == "running")
        processes = words.status()["processes"]

    assert f"waits for permission to read group '{group}': give user" in told
    assert not any(each["restarts"] for each in processes)


def test_a_transaction_that_is_not_permitted_is_waited_for(secure: Secure) -> None:
    with (
        denied(secure, decisions.TOPIC, AclOperation.READ),
        running(secure, STREAMD_PROCESSING_GUARANTEE="exactly_once") as words,
    ):
        see_writing_waits(secure, words)
        assert "what became of the transactions of" in words.do("logs")


def binding(name: str, operation: Any, permission: Any, kind: Any = AclBinding) -> Any:
    resource = ResourceType.GROUP if name.endswith(GROUP) else ResourceType.TOPIC
    return kind(
        resource, name, ResourcePatternType.LITERAL, f"User:{USER}", "*", operation, permission
    )


@contextmanager
def denied(secure: Secure, topic: str, operation: Any) -> Iterator[None]:
    """The user may not do this meanwhile."""
    rule(secure, topic, operation, AclPermissionType.DENY)
    yield
    admin = AdminClient({"bootstrap.servers": secure.cluster.bootstrap})
    rules = binding(topic, operation, AclPermissionType.DENY, AclBindingFilter)
    for future in admin.delete_acls([rules]).values():
        future.result()


def rule(secure: Secure, topic: str, operation: Any, permission: Any) -> None:
    admin = AdminClient({"bootstrap.servers": secure.cluster.bootstrap})
    for future in admin.create_acls([binding(topic, operation, permission)]).values():
        future.result()
