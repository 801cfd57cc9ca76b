"""The real web process before clients that send too much, too slowly, or what is no HTTP."""

import json
import socket
import time
from collections.abc import Iterator

import psutil
import pytest
from web_fleet import ROUTES, WebFleet, eventually, fleet, route, sample_snapshot

HEAD = b"POST /echo/ HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def web() -> Iterator[WebFleet]:
    settings = {"web_timeout": 1.0}
    with fleet(snapshot=sample_snapshot(), settings=settings) as running:
        yield running


def test_a_body_of_unknown_length_is_cut_at_the_limit(web: WebFleet) -> None:
    before_bytes = psutil.Process(web.process.pid).memory_info().rss
    with socket.create_connection(("127.0.0.1", web.port), timeout=10) as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(400):
            client.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        answer = client.recv(65536)

    assert answer.startswith(b"HTTP/1.1 413")
    assert b"web_max_body" in answer
    grown_bytes = psutil.Process(web.process.pid).memory_info().rss - before_bytes
    assert grown_bytes < 20 * 2**20


def test_a_client_that_announces_too_much_reads_why(web: WebFleet) -> None:
    status, headers, body = web.request("POST", "/echo/", b"x" * 3_000_000)

    assert status == 413
    assert headers["connection"] == "close"
    assert json.loads(body)["error"]["code"] == "body_too_large"


def test_a_body_that_drips_is_given_up(web: WebFleet) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", web.port), timeout=10) as client:
        client.settimeout(0.05)
        client.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        answer = b""
        while not answer and time.monotonic() - began < 8:
            client.sendall(b"x")
            try:
                answer = client.recv(65536)
            except TimeoutError:
                continue

    assert answer.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "preface",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /count/%ff/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /count/%00/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"nonsense\r\n\r\n",
    ],
    ids=["h2", "websocket", "no host", "two hosts", "nul", "not utf-8", "%00", "nonsense"],
)
def test_what_is_no_request_of_ours_is_refused(web: WebFleet, preface: bytes) -> None:
    answer = web.raw(preface)

    status = answer[9:10]
    assert status == b"4" or answer.startswith(b"HTTP/1.1 505"), answer[:100]


def test_a_refused_request_leaves_no_second_one_behind(web: WebFleet) -> None:
    seen = len(web.agents[2].seen)
    smuggled = b"GET /hello/ HTTP/1.1\r\nHost: localhost\r\n\r\n"

    answer = web.raw(
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled
    )

    assert answer.count(b"HTTP/1.1 ") == 1
    assert len(web.agents[2].seen) == seen


def test_idle_connections_leave_room_for_others(web: WebFleet) -> None:
    idle = [socket.create_connection(("127.0.0.1", web.port)) for _ in range(200)]
    for client in idle[:100]:
        client.sendall(b"GET / HTTP/1.1\r\nHost: local")

    began = time.monotonic()
    assert web.get("/healthz")[0] == 200
    assert time.monotonic() - began < 1
    for client in idle:
        client.close()


def test_clients_that_leave_write_no_line_and_requests_are_not_logged() -> None:
    with fleet(snapshot=sample_snapshot()) as web:
        assert web.get("/")[0] == 200
        for path in (b"/slow/", b"/streamd/events", b"/"):
            with socket.create_connection(("127.0.0.1", web.port)) as client:
                client.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with socket.create_connection(("127.0.0.1", web.port)) as client:
            client.sendall(HEAD + b"Content-Length: 10\r\n\r\nabc")
        assert web.get("/hello/")[0] == 200
        web.stop()

    assert web.stderr == ""


def test_requests_are_logged_once_where_that_is_asked_for() -> None:
    with fleet(settings={"web_access_log": True}) as web:
        web.get("/hello/?x=1")
        eventually(lambda: "/hello/" in web.errors())

        assert web.errors().count("GET /hello/") == 1


def test_pages_of_the_user_win_over_ours() -> None:
    own = [route(3, "/", ["GET"]), route(4, "/stats/", ["POST"])]
    with fleet(routes=[*ROUTES, *own], snapshot=sample_snapshot()) as web:
        assert web.get("/")[2] == b"hello"
        assert web.get("/stats/")[0] == 405
        assert web.get("/streamd/stats/")[0] == 200
        assert b"count_words#3" in web.get("/streamd/")[2]


@pytest.mark.parametrize(
    ("given", "status"), [(None, 401), ("Bearer wrong", 401), ("Bearer s3cret", 200)]
)
def test_an_exposed_port_with_a_token_shows_values_to_who_has_it(
    exposed: WebFleet, given: str | None, status: int
) -> None:
    headers = {} if given is None else {"Authorization": given}

    assert exposed.request("GET", "/table/word_counts/the/", headers=headers)[0] == status
    assert exposed.get("/")[0] == 200


def test_an_exposed_port_may_be_called_by_address_but_not_by_any_name(
    exposed: WebFleet,
) -> None:
    assert exposed.get("/healthz", Host="192.0.2.7:6066")[0] == 200
    assert exposed.get("/healthz", Host="evil.example")[0] == 421


@pytest.fixture(scope="module")
def exposed() -> Iterator[WebFleet]:
    settings = {"web_bind": "0.0.0.0", "web_token": "s3cret"}
    with fleet(settings=settings, snapshot=sample_snapshot()) as running:
        running.owner_of("the").counts["the"] = 42
        yield running


def test_before_anything_is_known_pages_say_so() -> None:
    with fleet() as web:
        assert b"nothing is known yet" in web.get("/")[2]
        assert web.get("/stats/")[0] == 503
        assert web.get("/readyz")[0] == 503
        assert web.get("/healthz")[0] == 200
