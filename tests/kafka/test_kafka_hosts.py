"""A key on another host: its page and look-ups in one hop, right or 503."""

import contextlib
import http.client
import json
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from urllib.parse import urlsplit

import pytest
from kafka_clients import unique
from kafka_hosts import TOKEN, Feeder, Host, eventually, hosts, traced_app

WORDS = [f"w{n}" for n in range(40)]


def knows_all(host: Host, url: str, page: str) -> bool:
    """Does a page of this host tell how often each word was counted?"""
    replies = {word: host.get(f"/{page}/{word}/", url) for word in WORDS}
    assert {status for status, _ in replies.values()} <= {200, 503}
    return host.expected == {word: body.get("count") for word, (_, body) in replies.items()}


@pytest.fixture(scope="module")
def pair(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    """Two hosts that share four partitions; each of 40 words was counted three times."""
    id = unique("hosts")
    source = traced_app(kafka, id, tmp_path_factory.mktemp("trace") / "trace") + READER
    with hosts(source, 2) as ab:
        threads = [threading.Thread(target=host.start) for host in ab]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        eventually(lambda: [len(host.partitions("count")) for host in ab] == [2, 2])
        with Feeder(kafka, f"{id}-words") as feeder:
            eventually(lambda: sum(feeder.counts.values()) >= 120)
        ab[0].expected = ab[1].expected = feeder.counts
        yield ab


READER = """

@app.page("/read/{word}/")
async def read(web, request, word):
    return web.json({"count": await counts.lookup(word)})
"""


def test_every_key_is_found_from_every_host(pair: list[Host]) -> None:
    for host in pair:
        eventually(partial(knows_all, host, host.web, "count"))


def test_a_process_of_another_group_looks_up_keys_on_another_host(pair: list[Host]) -> None:
    for host in pair:
        eventually(partial(knows_all, host, host.web, "read"))


def test_the_page_of_tables_and_the_router_know_the_other_host(pair: list[Host]) -> None:
    a, b = pair
    url, other = a.web, urlsplit(b.web).netloc
    found = {a.get(f"/router/counts/{word}/", url)[1]["process"] for word in WORDS}
    assert f"the host {other}" in found
    assert a.get("/table/counts/w1/", url) == (200, a.expected["w1"])


def post(url: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, object]]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", "/streamd/hop", body, headers)
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())


def test_a_hop_that_is_not_signed_with_the_token_is_refused(pair: list[Host]) -> None:
    status, body = post(pair[0].web, b"anything", {"x-streamd-signature": "0" * 64})
    assert status == 403
    assert TOKEN not in json.dumps(body)


class Reader(threading.Thread):
    """Asks a gateway for one word after the other, all the time."""

    def __init__(self, host: Host) -> None:
        super().__init__(daemon=True)
        self._host = host
        self._url = host.web
        self._ending = threading.Event()
        self.right = 0
        self.later = 0  # 503
        self.wrong: list[object] = []

    def run(self) -> None:
        while not self._ending.is_set():
            for word in WORDS:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    self._take(word, *self._host.get(f"/count/{word}/", self._url))

    def _take(self, word: str, status: int, body: dict[str, object]) -> None:
        if status == 503:
            self.later += 1
        elif status == 200 and body == {"count": self._host.expected[word]}:
            self.right += 1
        else:
            self.wrong.append((word, status, body))

    def end(self) -> None:
        self._ending.set()
        self.join(60)


def test_answers_are_right_or_503_while_partitions_move_between_hosts(
    pair: list[Host],
) -> None:
    a, b = pair
    readers = [Reader(host) for host in pair]
    for reader in readers:
        reader.start()
    pid = b.pid("count#0")
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: b.pid("count#0") != pid)
    assert a.command("scale count=4").returncode == 0
    assert b.command("scale count=1").returncode == 0
    b.stop()
    eventually(lambda: len(a.partitions("count")) == 4)
    after = readers[0].right
    eventually(lambda: readers[0].right > after + len(WORDS))
    for reader in readers:
        reader.end()
    assert [reader.wrong for reader in readers] == [[], []]
    assert all(reader.right > 0 for reader in readers)


def test_without_the_token_a_key_of_another_host_gets_503_that_says_so(
    pair: list[Host],
) -> None:
    a, b = pair
    assert a.command("scale count=1").returncode == 0
    del b.environment["STREAMD_WEB_TOKEN"]
    b.start()
    eventually(lambda: b.partitions("count"))
    url = b.web
    words = iter(WORDS)
    refused = eventually(lambda: refusal(b, url, next(words)))
    assert refused["hint"] == "set web_token, the same on every host"
    url = a.web
    words = iter(WORDS)
    assert eventually(lambda: refusal(a, url, next(words)))["code"] == "unavailable"
    told = [event["text"] for event in b.status()["events_log"]]
    assert any("hosts ask each other only with a secret" in text for text in told)


def refusal(host: Host, url: str, word: str) -> dict[str, str]:
    """What a page says that has no answer now; {} where it has one."""
    status, body = host.get(f"/count/{word}/", url)
    assert status in (200, 503)
    return dict(body["error"]) if status == 503 else {}
