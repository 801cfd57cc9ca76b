"""A key on another host: its page and look-ups in one hop, right or 503."""

import contextlib
import http.client
import json
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
