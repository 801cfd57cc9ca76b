"""A key on another host: its page and look-ups in one hop, right or 503."""

import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from confluent_kafka import Producer
from kafka_clients import unique
from kafka_hosts import TOKEN, Feeder, Host, Trace, eventually, hosts, start_all, traced_app

from streamd.errors import WireError
from streamd.partition import partition_for
from streamd.wire import Found, Lookup, decode_frame, encode_frame

WORDS = [f"w{n}" for n in range(40)]


def knows_all(host: Host, url: str, page: str) -> bool:
    """Does a page of this host tell how often each word was counted?"""
    replies = {word: host.get(f"/{page}/{word}/", url) for word in WORDS}
    assert {status for status, _ in replies.values()} <= {200, 503}
    return host.expected == {word: body.get("count") for word, (_, body) in replies.items()}


def settled(ab: list[Host]) -> bool:
    """Has each of the four processes one of the four partitions?"""
    shares = [
        each["partitions"]
        for host in ab
        for name, each in host.processes().items()
        if name in ("count#0", "count#1") and each["state"] == "RUNNING"
    ]
    return sorted(shares) == [[0], [1], [2], [3]]


def send(kafka: str, topic: str, word: str) -> None:
    """Have a word counted once more."""
    producer = Producer({"bootstrap.servers": kafka, "partitioner": "murmur2_random"})
    producer.produce(topic, f'"{word}"'.encode(), key=word)
    assert producer.flush(30) == 0


def trace_of(folders: pytest.TempPathFactory) -> Path:
    return folders.getbasetemp() / "hosts-trace"


@pytest.fixture(scope="module")
def pair(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    """Two hosts that share four partitions; each of 40 words was counted three times."""
    id = unique("hosts")
    source = traced_app(kafka, id, trace_of(tmp_path_factory)) + READER
    with hosts(source, 2) as ab:
        start_all(ab)
        eventually(lambda: settled(ab))
        with Feeder(kafka, f"{id}-words") as feeder:
            eventually(lambda: sum(feeder.counts.values()) >= 120)
        for host in ab:
            host.expected, host.topic = feeder.counts, f"{id}-words"
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
                try:
                    self._take(word, *self._host.get(f"/count/{word}/", self._url))
                except (OSError, http.client.HTTPException):
                    continue
                except ValueError as error:
                    self.wrong.append((word, repr(error)))

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


def test_a_process_that_was_stopped_for_long_does_not_tell_what_was(
    pair: list[Host], kafka: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    a, b = pair
    trace = Trace(trace_of(tmp_path_factory))
    eventually(lambda: settled(pair))
    pid, mine = b.pid("count#0"), b.processes()["count#0"]["partitions"]
    word = next(w for w in WORDS if partition_for(w.encode(), 4) in mine)
    partition = partition_for(word.encode(), 4)
    before = a.expected[word]
    os.kill(pid, signal.SIGSTOP)
    try:
        stopped_at = time.monotonic()
        send(kafka, a.topic, word)
        a.expected[word] = before + 1
        eventually(lambda: any(seen.value == word for seen in trace.events(stopped_at)))
    finally:
        os.kill(pid, signal.SIGCONT)
    question = encode_frame(1, Lookup("counts", f'"{word}"'.encode(), partition))
    address = str(b.place / "run" / "proj" / "count#0.sock.r")
    answers = []
    until = time.monotonic() + 3
    # It may end, when it hears that others have what it worked on.
    with socket.socket(socket.AF_UNIX) as asking, contextlib.suppress(OSError, WireError):
        asking.connect(address)
        while time.monotonic() < until:
            asking.sendall(question)
            answers.append(decode_frame(asking.recv(65536)))
    assert answers
    assert Found(str(before).encode(), partition) not in answers
    # What it may have written late, the owner finds at its next checkpoint, and is replaced.
    send(kafka, a.topic, word)
    a.expected[word] = before + 2
    eventually(partial(knows_all, a, a.web, "count"))
    eventually(lambda: settled(pair))


def test_answers_are_right_or_503_while_partitions_move_between_hosts(
    pair: list[Host],
) -> None:
    a, b = pair
    eventually(partial(knows_all, a, a.web, "count"))
    readers = [Reader(host) for host in pair]
    for reader in readers:
        reader.start()
    pid = b.kill("count#0")
    eventually(lambda: b.pid("count#0") != pid)
    assert a.command("scale count=4").returncode == 0
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
    words = itertools.cycle(WORDS)
    # While partitions come and go others than those of the other host are refused, too.
    hint = "set web_token, the same on every host"
    eventually(lambda: refusal(b, url, next(words)).get("hint") == hint)
    url = a.web
    words = itertools.cycle(WORDS)
    assert eventually(lambda: refusal(a, url, next(words)))["code"] == "unavailable"
    told = [event["text"] for event in b.status()["events_log"]]
    assert any("hosts ask each other only with a secret" in text for text in told)


def refusal(host: Host, url: str, word: str) -> dict[str, str]:
    """What a page says that has no answer now; {} where it has one."""
    status, body = host.get(f"/count/{word}/", url)
    assert status in (200, 503)
    return dict(body["error"]) if status == 503 else {}
