"""Transactions that hang: they are over, and in a partition their mark is missing.

Clusters make them when they come back from a crash, by chance. So requests are made by hand
here, to a broker of one node, by Kafka's protocol in versions that it will know for long.
"""

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)

PRODUCE, FIND_COORDINATOR, INIT_PRODUCER_ID, ADD_PARTITIONS, END = 0, 10, 22, 24, 26
OF_TRANSACTIONS = b"\1"
VERIFICATION = "transaction.partition.verification.enable"
WITHIN_S = 30.0


class Producer(NamedTuple):
    """Who writes: what the coordinator gave a transactional id."""

    id: int
    epoch: int


@contextmanager
def unverified(bootstrap: str) -> Iterator[None]:
    """Let the cluster's brokers not ask the coordinator about what they are sent."""
    _set_verification(bootstrap, "false")
    try:
        yield
    finally:
        _set_verification(bootstrap, "true")


def hang(
    bootstrap: str,
    transactional_id: str,
    tp: tuple[str, int],
    key: bytes | None,
    value: bytes,
    *,
    commits: bool,
    headers: bytes = b"\0",
) -> None:
    """Leave a record of a transaction that was committed, or aborted, without its mark.

    A producer of this id that lives is fenced. The broker must not verify what it is sent.

    Args:
        headers: Of the record, as in a batch.
    """
    topic, partition = tp
    with _connection(bootstrap) as connection:
        producer = _init(connection, transactional_id)
        who = _string(transactional_id) + struct.pack("!qh", *producer)
        place = struct.pack("!i", 1) + _string(topic) + struct.pack("!ii", 1, partition)
        before = _ends(bootstrap, tp)[1]
        # Of a topic: its name and its partitions' errors.
        added = _ask(connection, ADD_PARTITIONS, 0, who + place)
        assert struct.unpack("!h", added[-2:]) == (0,), f"the partition was refused: {added!r}"
        ended = _ask(connection, END, 0, who + bytes([commits]))
        assert struct.unpack("!ih", ended)[1] == 0, f"the end was refused: {ended!r}"
        _until(lambda: _ends(bootstrap, tp)[0] > before)
        batch = _batch(producer, key, value, headers)
        body = _string(transactional_id) + struct.pack("!hi", -1, 10_000)
        body += place + struct.pack("!i", len(batch)) + batch
        # A broker verifies for a moment after it was told not to.
        _until(lambda: _is_taken(_ask(connection, PRODUCE, 7, body), topic))
    stable, end = _ends(bootstrap, tp)
    assert stable < end, f"nothing hangs in {tp}"


def _ends(bootstrap: str, tp: tuple[str, int]) -> tuple[int, int]:
    """How far a partition can be read, and how far it was written."""
    found = []
    for level in ("read_committed", "read_uncommitted"):
        consumer = Consumer(
            {"bootstrap.servers": bootstrap, "group.id": "ends", "isolation.level": level}
        )
        found.append(consumer.get_watermark_offsets(TopicPartition(*tp), timeout=WITHIN_S)[1])
        consumer.close()
    return found[0], found[1]


def _is_taken(answer: bytes, topic: str) -> bool:
    # One topic with its name, one partition with its number, and the error.
    [error] = struct.unpack_from("!h", answer, 4 + len(_string(topic)) + 4 + 4)
    return bool(error == 0)


def _until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not is_so():
        assert time.monotonic() < deadline, f"not so after {WITHIN_S} s"
        time.sleep(0.02)


def _init(connection: socket.socket, transactional_id: str) -> Producer:
    deadline = time.monotonic() + WITHIN_S
    while True:
        # A cluster has no coordinator before the first one asks for it.
        _ask(connection, FIND_COORDINATOR, 1, _string(transactional_id) + OF_TRANSACTIONS)
        body = _string(transactional_id) + struct.pack("!i", 10_000)
        answer = _ask(connection, INIT_PRODUCER_ID, 1, body)
        _, error, id, epoch = struct.unpack("!ihqh", answer)
        if not error:
            return Producer(id, epoch)
        # It is told to wait until a transaction of the id before has ended, and the like.
        assert time.monotonic() < deadline, f"the broker refused the producer: {error}"
        time.sleep(0.05)


def _batch(producer: Producer, key: bytes | None, value: bytes, headers: bytes) -> bytes:
    """One record in a transactional batch."""
    record = b"\0\0\0" + (_varint(-1) if key is None else _varint(len(key)) + key)
    record += _varint(len(value)) + value + headers
    now_ms = int(time.time() * 1000)
    is_transactional = 0x10
    rest = struct.pack(
        "!hiqqqhii", is_transactional, 0, now_ms, now_ms, producer.id, producer.epoch, 0, 1
    )
    rest += _varint(len(record)) + record
    tail = struct.pack("!ibI", -1, 2, _crc32c(rest)) + rest
    return struct.pack("!qi", 0, len(tail)) + tail


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def _varint(number: int) -> bytes:
    number = 2 * number if number >= 0 else -2 * number - 1  # zigzag
    data = b""
    while number > 0x7F:
        data += bytes([number & 0x7F | 0x80])
        number >>= 7
    return data + bytes([number])


def _string(text: str) -> bytes:
    return struct.pack("!h", len(text)) + text.encode()


def _connection(bootstrap: str) -> socket.socket:
    host, port = bootstrap.rsplit(":", 1)
    return socket.create_connection((host, int(port)), WITHIN_S)


def _ask(connection: socket.socket, what: int, version: int, body: bytes) -> bytes:
    request = struct.pack("!hhi", what, version, 1) + _string("hanging") + body
    connection.sendall(struct.pack("!i", len(request)) + request)
    with connection.makefile("rb") as answer:
        [size] = struct.unpack("!i", answer.read(4))
        return answer.read(size)[4:]


def _set_verification(bootstrap: str, value: str) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for broker in admin.list_topics(timeout=WITHIN_S).brokers:
        entry = ConfigEntry(VERIFICATION, value, incremental_operation=AlterConfigOpType.SET)
        place = ConfigResource(ResourceType.BROKER, str(broker), incremental_configs=[entry])
        [done] = admin.incremental_alter_configs([place]).values()
        done.result(WITHIN_S)
