"""The real web process before a made-up fleet: pages, owners, and who is let in."""

import html.parser
import json
import signal
import socket
import time
from collections.abc import Iterator

import psutil
import pytest
from web_fleet import WebFleet, eventually, fleet, sample_snapshot


@pytest.fixture(scope="module")
def web() -> Iterator[WebFleet]:
    with fleet(snapshot=sample_snapshot(), settings={"web_max_body": 1000}) as running:
        yield running


# The user's pages.


@pytest.mark.parametrize("path", ["/count/the/", "/count/?word=the"])
def test_a_key_goes_to_its_owner(web: WebFleet, path: str) -> None:
    owner = web.owner_of("the")
    owner.counts["the"] = 42

    status, headers, body = web.get(path)

    assert (status, json.loads(body)) == (200, {"word": "the", "count": 42})
    assert headers["content-type"] == "application/json"
    assert owner.seen[-1].partition in owner.active


@pytest.mark.parametrize("word", ["a%2Fb", "%C3%A4", "a%20b", "%3Cscript%3E", "%2E%2E"])
def test_any_text_can_be_a_key(web: WebFleet, word: str) -> None:
    status, _, body = web.get(f"/count/{word}/")

    assert status == 200
    assert json.loads(body)["count"] == 0


def test_a_key_of_an_unknown_codec_is_placed_by_the_app(web: WebFleet) -> None:
    status, _, _ = web.get("/odd/seven-7/")

    assert status == 200
    seen = [request for agent in web.agents for request in agent.seen if request.route == 7]
    assert seen[-1].partition == len("seven-7") % 8


def test_a_body_and_headers_pass_but_not_those_of_the_hop(web: WebFleet) -> None:
    sent = {
        "X-Mine": "1", "X-Forwarded-For": "9.9.9.9", "X-Streamd-Hop": "1",
        "Connection": "x-b", "X-B": "2",
    }  # fmt: skip

    status, headers, body = web.request("POST", "/echo/", b"body", sent)

    assert (status, body) == (201, b"body")
    assert headers["x-a"] == "1" and "x-method" not in headers
    names = dict(web.agents[2].seen[-1].headers)
    assert names["x-mine"] == "1"
    assert not {"x-forwarded-for", "x-streamd-hop", "x-b"} & names.keys()


def test_methods_slashes_and_head(web: WebFleet) -> None:
    assert web.request("DELETE", "/echo/")[0] == 405
    assert web.request("DELETE", "/echo/")[1]["allow"] == "POST, PUT"
    assert web.request("HEAD", "/hello/")[0] == 200
    assert web.get("/hello")[0] == 404


@pytest.mark.parametrize(("size", "status"), [(1000, 201), (1001, 413)])
def test_a_body_has_a_limit(web: WebFleet, size: int, status: int) -> None:
    assert web.request("POST", "/echo/", b"x" * size)[0] == status


def test_a_reply_that_would_split_headers_is_not_sent(web: WebFleet) -> None:
    status, headers, _ = web.get("/bad/")

    assert status == 502
    assert "set-cookie" not in headers


def test_what_was_taken_back_is_503_with_retry_after(web: WebFleet) -> None:
    status, headers, body = web.get("/busy/")

    assert status == 503
    assert float(headers["retry-after"]) >= 1
    assert json.loads(body)["error"]["code"] == "unavailable"


# Owners that come and go.


def test_a_lost_owner_is_503_until_the_next_one_is_known() -> None:
    with fleet() as web:
        gone = web.owner_of("the")
        web.do(gone.die())
        gone.active = []
        web.announce()

        status, headers, body = web.get("/count/the/")

        assert status == 503 and "retry-after" in headers
        assert json.loads(body)["error"]["code"] == "no_owner"

        heir = next(agent for agent in web.agents[:2] if agent is not gone)
        heir.active = list(range(8))
        heir.believes = set(heir.active)
        heir.counts["the"] = 7
        web.announce()
        assert json.loads(web.get("/count/the/")[2])["count"] == 7


def test_an_owner_that_moved_is_asked_no_more_and_never_guessed() -> None:
    with fleet() as web:
        owner = web.owner_of("the")
        owner.believes = set()

        status, _, body = web.get("/count/the/")

        assert status == 503
        assert json.loads(body)["error"]["code"] == "moved"


def test_a_recovering_owner_is_waited_for() -> None:
    with fleet() as web:
        owner = web.owner_of("the")
        owner.recovering, owner.active = owner.active, []
        web.announce()

        status, _, body = web.get("/count/the/")

        assert status == 503
        assert json.loads(body)["error"]["code"] == "recovering"


@pytest.mark.parametrize(("method", "status"), [("GET", 503), ("POST", 502)])
def test_a_request_whose_outcome_is_unknown_is_not_repeated_unless_it_may_be(
    method: str, status: int
) -> None:
    with fleet() as web:
        assert web.request(method, "/die/")[0] == status
        assert len([r for r in web.agents[2].seen if r.route == 6]) == 1


def test_a_key_of_a_scattered_table_is_asked_of_every_owner() -> None:
    with fleet() as web:
        home = web.owner_of("the")
        other = next(agent for agent in web.agents[:2] if agent is not home)
        for agent in web.agents[:2]:
            agent.scattered = ["word_counts"]
        web.announce()

        other.counts["the"] = 5
        assert json.loads(web.get("/count/the/")[2])["count"] == 5
        assert json.loads(web.get("/count/none/")[2])["count"] == 0
        home.counts["the"] = 6
        status, _, body = web.get("/count/the/")

        assert status == 409
        assert "group_by" in json.loads(body)["error"]["hint"]


def test_a_page_that_takes_too_long_is_504() -> None:
    with fleet(settings={"web_timeout": 0.3}) as web:
        began_at = time.monotonic()

        assert web.get("/slow/")[0] == 504
        assert time.monotonic() - began_at < 5


# Who is let in.


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", {"Host": "evil.example"}, 421),
        ("GET", {"Host": "localhost:1234"}, 200),
        ("POST", {"Host": "localhost", "Sec-Fetch-Site": "same-origin"}, 201),
        ("POST", {"Host": "localhost", "Sec-Fetch-Site": "none"}, 201),
        ("POST", {"Host": "localhost", "Sec-Fetch-Site": "cross-site"}, 403),
        ("POST", {"Host": "localhost", "Origin": "http://localhost"}, 201),
        ("POST", {"Host": "localhost", "Origin": "http://evil.example"}, 403),
        ("POST", {"Host": "localhost", "Origin": "null"}, 403),
        ("POST", {"Host": "localhost"}, 201),
        ("TRACE", {"Host": "localhost"}, 405),
    ],
)
def test_the_guard(web: WebFleet, method: str, headers: dict[str, str], status: int) -> None:
    path = "/echo/" if method == "POST" else "/hello/"

    assert web.request(method, path, b"x" if method == "POST" else None, headers)[0] == status


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"POST /echo/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n"
         b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
        (b"POST /echo/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n"
         b"Content-Length: 2\r\n\r\nxx", b"400"),
        (b"GET /hello/ HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\n"
         b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n", b"400"),
        (b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n", b"40"),
        (b"GET /hello/ HTTP/1.1\r\nHost: localhost\r\n"
         + b"".join(b"X-%d: y\r\n" % n for n in range(200)) + b"\r\n", b"431"),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"4"),
    ],
    ids=["both lengths", "two lengths", "h2c", "absolute", "many headers", "long target"],
)  # fmt: skip
def test_what_smugglers_send_is_refused(
    web: WebFleet, request_bytes: bytes, status: bytes
) -> None:
    answer = web.raw(request_bytes)

    assert answer.startswith(b"HTTP/1.1 " + status), answer[:200]
    assert b"101" not in answer[:20]


# Streamd's own pages.

OWN = ["/", "/stats/", "/table/word_counts/", "/graph/", "/healthz", "/readyz", "/metrics"]


@pytest.mark.parametrize("path", [*OWN, "/streamd/", "/nothing/here"])
def test_every_page_of_ours_has_its_guard_headers(web: WebFleet, path: str) -> None:
    _, headers, _ = web.get(path)

    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


class Balance(html.parser.HTMLParser):
    """Notes tags that do not close, ids that are there twice, and what refreshes itself."""

    VOID = frozenset({"meta", "link", "input", "br", "img", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def test_the_stats_page_is_whole_and_says_what_a_person_wants_to_know(web: WebFleet) -> None:
    status, _, body = web.get("/")
    text = body.decode()
    page = Balance()
    page.feed(text)

    assert status == 200
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    for word in ("1 of 4 count_words processes restarts", "backoff", "shuffle_words", "41 203",
                 "streamd logs count_words#3"):  # fmt: skip
        assert word in text.replace("\u202f", " ").replace("\u00a0", " "), word
    assert "http://" not in text.replace("http://127.0.0.1", "").replace(
        "http://www.w3.org", ""
    )


def test_stats_is_the_snapshot(web: WebFleet) -> None:
    assert json.loads(web.get("/stats/")[2])["schema"] == "streamd.status/1"


def test_a_degraded_instance_is_alive_and_not_ready(web: WebFleet) -> None:
    assert web.get("/healthz")[0] == 200
    assert web.get("/readyz")[0] == 503


def test_metrics_are_in_the_text_format(web: WebFleet) -> None:
    lines = web.get("/metrics")[2].decode().splitlines()

    assert any(line.startswith("# TYPE streamd_") for line in lines)
    assert all(line.startswith("#") or " " in line for line in lines if line)


def test_a_look_up_of_a_key_is_json_or_404(web: WebFleet) -> None:
    web.owner_of("the").counts["the"] = 42

    assert json.loads(web.get("/table/word_counts/the/")[2]) == 42
    assert web.get("/table/word_counts/none-such/")[0] == 404
    assert web.get("/table/nothing/the/")[0] == 404


def test_an_exposed_port_without_a_token_shows_no_values() -> None:
    settings = {"web_bind": "0.0.0.0", "web_hosts": ["localhost"]}
    with fleet(settings=settings, snapshot=sample_snapshot()) as web:
        web.owner_of("the").counts["the"] = 42

        assert web.get("/table/word_counts/the/")[0] in {401, 403}
        assert web.get("/")[0] == 200


def test_hostile_names_are_shown_as_text() -> None:
    snapshot = sample_snapshot()
    snapshot["tables"][0]["help"] = "<script>alert(1)</script>"
    snapshot["events_log"][0]["text"] = "</td><img src=x onerror=alert(1)>"
    with fleet(snapshot=snapshot) as web:
        text = web.get("/")[2].decode()

    assert "<script>alert" not in text
    assert "<img src=x" not in text


# Streams, and the end.


def test_a_stream_gets_each_snapshot_and_the_process_ends_at_term() -> None:
    with fleet(snapshot=sample_snapshot()) as web:
        stream = socket.create_connection(("127.0.0.1", web.port), timeout=5)
        stream.sendall(b"GET /streamd/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        got = bytearray()

        def has(text: bytes) -> bool:
            got.extend(stream.recv(65536))
            return text in got

        eventually(lambda: has(b"text/event-stream"))
        later = sample_snapshot()
        later["sentence"] = "All is well again."
        web.show(later)
        eventually(lambda: has(b"All is well again."))

        status, took_s = web.stop(signal.SIGTERM)

        stream.close()
    assert status == 0
    assert took_s < 2
    assert "Traceback" not in web.stderr


def test_readers_that_stall_do_not_hold_the_end_back() -> None:
    big = sample_snapshot() | {"sentence": "x" * 500_000}
    with fleet(snapshot=big) as web:
        stalled = []
        for _ in range(5):
            reader = socket.socket()
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", web.port))
            reader.sendall(b"GET /streamd/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert reader.recv(10)
            stalled.append(reader)
        for _ in range(20):
            web.show(big)
        # Others are served meanwhile, and memory is bounded.
        assert web.get("/healthz")[0] == 200
        resident_bytes = psutil.Process(web.process.pid).memory_info().rss

        status, took_s = web.stop(signal.SIGTERM)

        for reader in stalled:
            reader.close()
    assert status == 0
    assert took_s < 4
    assert resident_bytes < 150 * 2**20
    assert "Traceback" not in web.stderr


def test_a_request_that_runs_at_the_end_is_answered() -> None:
    with fleet() as web:
        web.agents[2].slow_s = 0.5
        connection = web.connection()
        connection.request("GET", "/slow/")
        eventually(lambda: bool(web.agents[2].seen))

        status, _ = web.stop(signal.SIGTERM)

        assert connection.getresponse().read() == b"hello"
        connection.close()
    assert status == 0


def test_the_process_ends_when_its_master_is_gone() -> None:
    with fleet() as web:
        web.loop.call_soon_threadsafe(web.link.close)

        assert web.process.wait(10) == 70
