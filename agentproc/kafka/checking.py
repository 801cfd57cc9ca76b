"""Whether an app gets to its cluster, step by step; the first that fails says what to mend.

Names, connections, TLS, login, version, permissions, in this order. Each step is bounded in
time. It blocks, and changes nothing on the cluster.
"""

import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    NewTopic,
)

from streamd.agentproc.kafka import options, topics
from streamd.agentproc.kafka.health import reason_of
from streamd.agentproc.kafka.making import Survey
from streamd.agentproc.kafka.obstacles import barred, look
from streamd.config import Settings, broker_servers
from streamd.errors import BrokerError

STEP_S = 5.0
LOGIN_S = 10.0
ANSWERS_S = 4.0

Ranges = dict[int, tuple[int, int]]  # a request's number -> its versions, from and to

FETCH, TXN_OFFSET_COMMIT, API_VERSIONS = 1, 28, 18
DESCRIBE_CLUSTER, GROUP_HEARTBEAT, DESCRIBE_PARTITIONS = 60, 68, 75


@dataclass(frozen=True)
class Step:
    """What came of one."""

    name: str
    text: str
    remedy: str | None = None
    exit_code: int = 0  # of what fails


def steps(settings: Settings) -> Iterator[Step]:
    """The way to the cluster, up to the first step that fails.

    Raises:
        ConfigError: Credentials or options cannot be used.
    """
    reach = options.connection(settings)
    protocol = str(reach.given.get("security.protocol", "plaintext")).lower()
    way = _Way(settings, reach, protocol.endswith("ssl"), protocol.startswith("sasl"))
    for step in (way.name, way.connect, way.talk, way.login, way.version):
        for told in step():
            yield told
            if told.exit_code:
                return


class _Way:
    """One walk along the steps."""

    def __init__(
        self, settings: Settings, reach: options.Reach, tls: bool, logs_in: bool
    ) -> None:
        self._settings = settings
        self._reach = reach
        self._tls = tls
        self._logs_in = logs_in
        self._servers = [_address(server) for server in broker_servers(settings.broker)]
        self._open: list[tuple[str, int]] = []  # those that take connections
        self._ranges: Ranges = {}

    def name(self) -> Iterator[Step]:
        """Each name leads to an address."""
        bad = {}
        for host in dict.fromkeys(host for host, _ in self._servers):
            if why := _looked_up(host):
                bad[host] = why
        if len(bad) == len({host for host, _ in self._servers}):
            told = "; ".join(f"{host!r}: {why}" for host, why in bad.items())
            yield _away("name", f"no address is known for {told}", "correct the name in broker")
            return
        self._servers = [server for server in self._servers if server[0] not in bad]
        without = f"; none for {', '.join(bad)}" if bad else ""
        yield Step("name", f"{', '.join(host for host, _ in self._servers)}{without}")

    def connect(self) -> Iterator[Step]:
        """Some server takes a connection."""
        bad = []
        for host, port in self._servers:
            try:
                socket.create_connection((host, port), STEP_S).close()
                self._open.append((host, port))
            except OSError as error:
                bad.append(f"{host}:{port}: {error.strerror or error}")
        if self._open:
            text = f"{len(self._open)} of {len(self._servers)} servers take connections"
            yield Step("connect", "; ".join([text, *bad]))
        else:
            yield _away(
                "connect", "; ".join(bad), "start the cluster, or correct the port in broker"
            )

    def talk(self) -> Iterator[Step]:
        """Both sides speak TLS, or both do not."""
        try:
            self._ranges = _ranges(self._open[0], self._context() if self._tls else None)
        except (ssl.SSLError, ConnectionError) as error:
            # Who speaks TLS ends it with an alert.
            if self._tls and "ALERT" not in str(getattr(error, "reason", "")):
                yield _away("TLS", "the server does not speak TLS", "kafka:// as broker")
        except _OtherSide:
            yield _away("TLS", "the server speaks TLS only", "kafka+ssl:// as broker")
        except (OSError, struct.error):
            # A server that wants a certificate says so to librdkafka as well.
            return

    def _context(self) -> ssl.SSLContext:
        # Only to ask; whether the server can be trusted, Kafka's client finds out.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        given = self._reach.given
        if certificate := given.get("ssl.certificate.location"):
            key, password = given.get("ssl.key.location"), given.get("ssl.key.password")
            context.load_cert_chain(certificate, key, password or "")
        return context

    def login(self) -> Iterator[Step]:
        """Kafka's client gets an answer."""
        errors: list[KafkaError] = []
        told_here: options.Options = {"error_cb": errors.append}
        client = AdminClient({**self._reach.admin, **told_here})
        # Who is not let in without a login is only disconnected, again and again.
        patience_s = LOGIN_S if self._logs_in or not self._ranges else ANSWERS_S
        deadline = time.monotonic() + patience_s
        while True:
            why: KafkaError | None = None
            try:
                client.list_topics(timeout=1.0)
            except KafkaException as error:
                why = error.args[0]
                client.poll(0)
            told = {self._kind(error): reason_of(error.str()) for error in errors}
            final = {KafkaError._SSL, KafkaError._AUTHENTICATION} & told.keys()
            if why is None or final or time.monotonic() > deadline:
                break
        if (said := told.get(KafkaError._SSL)) and why is not None:
            yield _away("TLS", said, _tls_remedy(said))
            return
        if self._tls and (why is None or self._ranges):
            yield Step("TLS", _trust(self._reach.given))
        if why is None:
            if self._logs_in:
                user = self._reach.given.get("sasl.username") or "a token"
                yield Step("login", f"{self._mechanism} as {user}")
        elif said := told.get(KafkaError._AUTHENTICATION):
            yield _away("login", said, "correct user, password and mechanism")
        elif self._ranges and not self._logs_in:
            yield _away(
                "login",
                "the cluster ends the connection of who does not log in: "
                + (told.get(KafkaError._TRANSPORT) or reason_of(why.str())),
                "broker_credentials with user and password",
            )
        else:
            said = told.get(KafkaError._TRANSPORT) or reason_of(why.str())
            yield _away("connect", said, None)

    def _kind(self, error: KafkaError) -> int:
        # An alert of the other side, e.g. that it wants a certificate, comes as a failure of
        # the connection.
        code: int = error.code()
        is_alert = code == KafkaError._TRANSPORT and self._tls and "SSL" in error.str()
        return KafkaError._SSL if is_alert else code

    def version(self) -> Iterator[Step]:
        """The cluster can do what the settings ask for."""
        settings, ranges = self._settings, self._ranges
        if not ranges:
            return
        if settings.broker_group_protocol == "consumer" and GROUP_HEARTBEAT not in ranges:
            yield _away(
                "version",
                f"Kafka {version_of(ranges)} has no broker_group_protocol='consumer'",
                "broker_group_protocol='classic', or Kafka 4.0",
            )
        elif ranges.get(TXN_OFFSET_COMMIT, (0, 0))[1] < 3:
            yield _away("version", f"Kafka {version_of(ranges)}", "Kafka 2.5 or later")
        else:
            yield Step("version", f"Kafka {version_of(ranges)}")

    @property
    def _mechanism(self) -> str:
        return str(self._reach.given.get("sasl.mechanism", "GSSAPI"))


def permissions(
    admin: AdminClient, needs: dict[str, set[str]], missing: Iterable[topics.Wanted],
    groups: Iterable[str],
) -> Iterator[Step]:  # fmt: skip
    """What the app may not do that it needs to.

    Args:
        needs: Topic that is there -> `read` and `write`.
        missing: What a start would make.
        groups: The ids of its groups.
    """
    bad = [*_of_topics(admin, needs), *_of_making(admin, missing), *_of_groups(admin, groups)]
    if not bad:
        yield Step("permission", f"describe, make, read and write {len(needs)} topics")
    for text in bad:
        yield Step("permission", text, "an ACL for the app's user; kafka-acls makes it", 69)


def needs_of(settings: Settings, survey: Survey, read: set[str]) -> dict[str, set[str]]:
    """Topic that is there -> what the app does with it.

    Args:
        read: The topics that its agents read.
    """
    own = f"{settings.id}-"
    return {
        name: {"read", "write"}
        if name.startswith(own)
        else {"read" if name in read else "write"}
        for name in survey.found
    }


def _of_topics(admin: AdminClient, needs: dict[str, set[str]]) -> Iterator[str]:
    try:
        seen = look(admin, {name: frozenset(what) for name, what in needs.items()}, STEP_S)
    except BrokerError as error:
        yield str(error)
        return
    for name, lacks in sorted(seen.forbidden.items()):
        yield f"topic {name!r}: no permission to {' and '.join(lacks)}"


def _of_making(admin: AdminClient, missing: Iterable[topics.Wanted]) -> Iterator[str]:
    new = [NewTopic(each.name, each.partitions, each.copies) for each in missing]
    if not new:
        return
    asked = admin.create_topics(new, validate_only=True, request_timeout=STEP_S)
    for name, future in asked.items():
        try:
            future.result()
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                yield f"topic {name!r} cannot be made: {error.args[0].str()}"


def _of_groups(admin: AdminClient, groups: Iterable[str]) -> Iterator[str]:
    if not (names := list(groups)):
        return
    asked = admin.describe_consumer_groups(
        names, include_authorized_operations=True, request_timeout=STEP_S
    )
    try:
        for name in barred(asked, STEP_S + 1.0):
            yield f"group {name!r}: no permission to read"
    except BrokerError as error:
        yield str(error)


def version_of(ranges: Ranges) -> str:
    """The oldest Kafka that answers so, in words (pure).

    >>> version_of({FETCH: (0, 9), DESCRIBE_CLUSTER: (0, 0)})
    '2.8 or later'
    """
    if ranges.get(FETCH, (0, 0))[0] >= 4:
        return "4.0 or later"
    if DESCRIBE_PARTITIONS in ranges:
        return "3.7 or later"
    if DESCRIBE_CLUSTER in ranges:
        return "2.8 or later"
    if ranges.get(TXN_OFFSET_COMMIT, (0, 0))[1] >= 3:
        return "2.5 or later"
    return "before 2.5"


class _OtherSide(Exception):
    """The server speaks TLS, and was spoken to without."""


def _ranges(address: tuple[str, int], context: ssl.SSLContext | None) -> Ranges:
    """What the server can do: it tells anyone, before a login."""
    with socket.create_connection(address, STEP_S) as plain:
        if context is not None:
            with context.wrap_socket(plain, server_hostname=address[0]) as wrapped:
                return _asked(wrapped)
        return _asked(plain)


def _asked(connection: socket.socket) -> Ranges:
    request = struct.pack(">hhih7s", API_VERSIONS, 0, 1, 7, b"streamd")
    connection.sendall(struct.pack(">i", len(request)) + request)
    with connection.makefile("rb") as answers:
        head = answers.read(4)
        if head[:1] in (b"\x15", b"\x16"):
            raise _OtherSide
        (size_bytes,) = struct.unpack(">i", head)
        body = answers.read(min(size_bytes, 1 << 16))
    _, code, count = struct.unpack_from(">ihi", body)
    rows = struct.iter_unpack(">hhh", body[10 : 10 + 6 * count]) if not code else ()
    return {number: (low, high) for number, low, high in rows}


def _address(server: str) -> tuple[str, int]:
    host, _, port = server.rpartition(":")
    return host.strip("[]"), int(port)


def _looked_up(host: str) -> str:
    """Why a name leads nowhere; "" where it does. The system may take minutes to say so."""
    found: list[str] = []

    def look() -> None:
        try:
            socket.getaddrinfo(host, None)
            found.append("")
        except OSError as error:
            found.append(error.strerror or str(error))

    thread = threading.Thread(target=look, name=f"look up {host}", daemon=True)
    thread.start()
    thread.join(STEP_S)
    return found[0] if found else f"no answer in {STEP_S:g} s"


def _trust(given: options.Options) -> str:
    if given.get("enable.ssl.certificate.verification") is False:
        return "encrypted; the server's certificate is not looked at"
    where = given.get("ssl.ca.location") or (
        "ssl.ca.pem" if "ssl.ca.pem" in given else "the system's"
    )
    return f"the server's certificate is trusted, by {where}"


def _tls_remedy(why: str) -> str:
    if "verify" in why or "certificate" in why.lower():
        return "cafile in broker_credentials, a certificate for this very name, or certfile"
    return "compare the listener's protocol with broker"


def _away(name: str, text: str, remedy: str | None) -> Step:
    return Step(name, text, remedy, BrokerError.exit_code)
