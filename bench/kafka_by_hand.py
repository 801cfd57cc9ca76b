"""The word count on Kafka as one would write it by hand, and Kafka Streams beside it.

Two processes: `split` reads posts and writes each word with itself as key; `count` reads those,
keeps a dict, and writes a chunk's changed words to a changelog. Both flush, then commit, each
fifth of a second: at least once. `plain` writes a record a word; `packed` one record for each
partition and chunk, a msgpack array of keys and values. Nothing else is there: no recovery, no
retries, no web, no checks. Kafka Streams' figures hold the warming up of its JVM, seconds of
CPU: with few words, or where others use the cores, words/s and a ratio over them say little; a
busy machine doubled the time of a run whose CPU stayed the same. All runs read
one topic, and the changelog of each is compared with what is true.
"""

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path

import kafka_broker
import msgspec
from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    KafkaException,
    Producer,
    TopicPartition,
    murmur2,
)
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from kafka_streams import KafkaStreams
from text import posts

WORDS = 5_000_000
PARTITIONS = 4
ROUNDS = 3
CHUNK = 10_000
COMMIT_EVERY_S = 0.2
PATIENCE_S = 120

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(tuple[list[bytes], list[bytes]]).decode
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(str).decode

Run = tuple[str, float, float]  # what ran, seconds, seconds of CPU

# When the first post was read and the last word settled, and the CPU of both processes since.
Clock = tuple[Synchronized, Synchronized, Synchronized]


def consumer(
    bootstrap: str, group: str, topic: str, assigned: Callable[[], None] | None
) -> Consumer:
    made = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": group,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            # The default of a second makes a consumer whose queue was full sleep.
            "fetch.queue.backoff.ms": 1,
        }
    )
    made.subscribe([topic], on_assign=lambda *_: assigned() if assigned else None)
    return made


def producer(bootstrap: str) -> Producer:
    return Producer(
        {
            "bootstrap.servers": bootstrap,
            "partitioner": "murmur2_random",
            "compression.type": "lz4",
            "linger.ms": 5,
            "queue.buffering.max.messages": 1_000_000,
        }
    )


def write(to: Producer, topic: str, value: bytes, **where: object) -> None:
    while True:
        try:
            to.produce(topic, value, **where)
            return
        except BufferError:
            to.poll(0.01)


class Loop:
    """Reads chunks, and now and then flushes what was written and commits what was read."""

    def __init__(
        self, bootstrap: str, group: str, topic: str, assigned: Callable[[], None] | None = None
    ) -> None:
        self.source = consumer(bootstrap, group, topic, assigned)
        self.out = producer(bootstrap)
        self._unsettled = False
        self._settle_at = 0.0
        self._deadline = time.monotonic() + PATIENCE_S

    def read(self) -> list[bytes]:
        """The values of the next chunk; none where none came soon."""
        if time.monotonic() > self._deadline:
            raise SystemExit(f"not counted in {PATIENCE_S} s")
        messages = self.source.consume(CHUNK, 0.05)
        for message in messages:
            if message.error():
                raise KafkaException(message.error())
        self._unsettled = self._unsettled or bool(messages)
        return [message.value() for message in messages]

    def settle(self, *, last: bool = False) -> None:
        """Flush and commit, where it is time for it or this is the end."""
        self.out.poll(0)
        if self._unsettled and (last or time.monotonic() > self._settle_at):
            self.out.flush()
            self.source.commit(asynchronous=False)
            self._unsettled = False
            self._settle_at = time.monotonic() + COMMIT_EVERY_S


def cpu_s() -> float:
    times = os.times()
    return times.user + times.system


def split(
    bootstrap: str, name: str, topic: str, total: int, packed: bool, at: Clock, ready: Event
) -> None:
    # The clock runs from the first post: joining a group is not what is measured.
    if not ready.wait(PATIENCE_S):
        raise SystemExit(f"`count` got no partitions in {PATIENCE_S} s")
    loop = Loop(bootstrap, f"{name}-split", topic)
    done, began_cpu_s = 0, 0.0
    while done < total:
        values = loop.read()
        if values and not done:
            at[0].value, began_cpu_s = time.monotonic(), cpu_s()
        done += len(values)
        if packed:
            split_packed(loop.out, f"{name}-words", values)
        else:
            for post in values:
                for word in _decode(post).split():
                    write(loop.out, f"{name}-words", _encode(word), key=word.encode())
        loop.settle()
    loop.settle(last=True)
    note(at[2], began_cpu_s)
    loop.source.close()


def split_packed(out: Producer, topic: str, values: list[bytes]) -> None:
    packs: list[tuple[list[bytes], list[bytes]]] = [([], []) for _ in range(PARTITIONS)]
    for post in values:
        for word in _decode(post).split():
            key = word.encode()
            keys, words = packs[murmur2(key, PARTITIONS)]
            keys.append(key)
            words.append(_encode(word))
            if len(keys) == CHUNK:
                write(out, topic, _pack((keys, words)), partition=murmur2(key, PARTITIONS))
                keys.clear()
                words.clear()
    for partition, (keys, words) in enumerate(packs):
        if keys:
            write(out, topic, _pack((keys, words)), partition=partition)


def count(bootstrap: str, name: str, total: int, packed: bool, at: Clock, ready: Event) -> None:
    loop = Loop(bootstrap, f"{name}-count", f"{name}-words", ready.set)
    table: dict[str, int] = {}
    done, began_cpu_s = 0, 0.0
    while done < total:
        values = loop.read()
        if values and not done:
            began_cpu_s = cpu_s()
        dirty: dict[str, int] = {}
        for words in (_unpack(value)[1] for value in values) if packed else (values,):
            done += len(words)
            for data in words:
                word = _decode(data)
                dirty[word] = table[word] = table.get(word, 0) + 1
        for word, n in dirty.items():
            write(loop.out, f"{name}-changelog", _encode(n), key=word.encode())
        loop.settle()
    loop.settle(last=True)
    at[1].value = time.monotonic()
    note(at[2], began_cpu_s)
    loop.source.close()


def note(total_s: Synchronized, began_cpu_s: float) -> None:
    with total_s.get_lock():
        total_s.value += cpu_s() - began_cpu_s


def by_hand(
    bootstrap: str, name: str, topic: str, made: int, words: int, packed: bool
) -> tuple[float, float]:
    """Seconds, and seconds of CPU of both processes, from the first post to the last commit."""
    make_topics(bootstrap, f"{name}-words", f"{name}-changelog")
    # Not forked: librdkafka's threads do not come along.
    spawn = multiprocessing.get_context("spawn")
    at = (spawn.Value("d", 0.0), spawn.Value("d", 0.0), spawn.Value("d", 0.0))
    ready = spawn.Event()
    workers = [
        spawn.Process(target=split, args=(bootstrap, name, topic, made, packed, at, ready)),
        spawn.Process(target=count, args=(bootstrap, name, words, packed, at, ready)),
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("the hand-written loop failed")
    return at[1].value - at[0].value, at[2].value


def make_topics(bootstrap: str, *names: str) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 4})
    for future in admin.create_topics([NewTopic(n, PARTITIONS, 1) for n in names]).values():
        future.result(60)


def drop_topics(bootstrap: str, prefix: str) -> None:
    """Delete a run's topics: the next run shall have the disk to itself."""
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 4})
    names = [name for name in admin.list_topics(timeout=30).topics if name.startswith(prefix)]
    for future in admin.delete_topics(names).values() if names else ():
        future.result(60)


def fill(bootstrap: str, topic: str, made: list[str]) -> None:
    make_topics(bootstrap, topic)
    out = producer(bootstrap)
    for start in range(0, len(made), 1000):
        for post in made[start : start + 1000]:
            write(out, topic, _encode(post), partition=start // 1000 % PARTITIONS)
        out.poll(0)
    out.flush()


def counted(
    bootstrap: str,
    topic: str,
    decode: Callable[[bytes], int],
    decode_key: Callable[[bytes], str] = bytes.decode,
) -> dict[str, int]:
    """What a changelog says in the end."""
    reader = Consumer(
        {"bootstrap.servers": bootstrap, "group.id": "none", "enable.partition.eof": False}
    )
    ends: dict[int, int] = {}
    for partition in range(PARTITIONS):
        _, ends[partition] = reader.get_watermark_offsets(TopicPartition(topic, partition))
    reader.assign([TopicPartition(topic, p, OFFSET_BEGINNING) for p in ends])
    table: dict[str, int] = {}
    left = {partition for partition, end in ends.items() if end}
    deadline = time.monotonic() + PATIENCE_S
    while left:
        if time.monotonic() > deadline:
            raise SystemExit(f"the changelog {topic} cannot be read to its end")
        for message in reader.consume(CHUNK, 0.2):
            if message.error():
                raise KafkaException(message.error())
            table[decode_key(message.key())] = decode(message.value())
        # Positions, as the last records of a transaction's end are no messages.
        left = {tp.partition for tp in reader.position([TopicPartition(topic, p) for p in left])
                if tp.offset < ends[tp.partition]}  # fmt: skip
    reader.close()
    return table


def check(what: str, found: dict[str, int], expected: Counter[str]) -> None:
    if found != dict(expected):
        raise SystemExit(f"{what} counted wrongly: {sum(found.values())} words")


def measure(
    bootstrap: str, topic: str, made: int, expected: Counter[str], streams: KafkaStreams | None
) -> Iterator[Run]:
    """One round: each way's name, seconds and seconds of CPU."""
    words = sum(expected.values())
    for what, packed in (("by hand, plain", False), ("by hand, packed", True)):
        name = f"hand-{uuid.uuid4().hex[:8]}"
        took_s, cpu = by_hand(bootstrap, name, topic, made, words, packed)
        check(what, counted(bootstrap, f"{name}-changelog", int), expected)
        drop_topics(bootstrap, name)
        yield what, took_s, cpu
    if streams is None:
        return
    for guarantee in ("at_least_once", "exactly_once_v2"):
        what, name = f"Kafka Streams, {guarantee}", f"streams-{uuid.uuid4().hex[:8]}"
        took_s, cpu = streams.run(bootstrap, name, topic, words, guarantee, PARTITIONS)
        changelog = f"{name}-counts-changelog"
        check(what, counted(bootstrap, changelog, lambda n: int.from_bytes(n)), expected)
        drop_topics(bootstrap, name)
        yield what, took_s, cpu


@contextmanager
def broker(folder: Path) -> Iterator[str]:
    """The address of a broker for the bench: one of its own, unless there is one."""
    if bootstrap := os.environ.get("STREAMD_TEST_KAFKA"):
        yield bootstrap
        return
    cluster = kafka_broker.start(
        folder / "broker", flags=kafka_broker.STEADY, parent=os.getpid()
    )
    try:
        yield cluster.bootstrap
    finally:
        cluster.remove()


def rounds(count: int, measure: Callable[[], Iterator[Run]]) -> dict[str, tuple[float, float]]:
    """Each way's medians of seconds and of seconds of CPU; all ways once a round."""
    runs: dict[str, list[tuple[float, float]]] = {}
    for round_ in range(count):
        for what, took_s, cpu in measure():
            runs.setdefault(what, []).append((took_s, cpu))
            sys.stderr.write(f"round {round_ + 1}: {what}: {took_s:.1f} s, {cpu:.1f} s CPU\n")
    return {
        what: (
            statistics.median(took_s for took_s, _ in figures),
            statistics.median(cpu for _, cpu in figures),
        )
        for what, figures in runs.items()
    }


def run(*, small: bool = False) -> Iterator[str]:
    """Lines of the report."""
    count = 1 if small else ROUNDS
    made, expected = posts(WORDS // 5 if small else WORDS)
    words = sum(expected.values())
    yield (
        f"word count on Kafka, {words} words in {len(made)} posts, {PARTITIONS} partitions, "
        f"{count} rounds, interleaved; medians; the broker on the same {os.cpu_count()} cores"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        streams = KafkaStreams.compiled(folder)
        with broker(folder) as bootstrap:
            topic = f"posts-{uuid.uuid4().hex[:8]}"
            fill(bootstrap, topic, made)
            medians = rounds(
                count, lambda: measure(bootstrap, topic, len(made), expected, streams)
            )
    for what, (took_s, cpu) in medians.items():
        yield line(what, words, took_s, cpu)
    yield streams_line(streams)


def line(what: str, words: int, took_s: float, cpu: float) -> str:
    """One way's figures."""
    rate, cpu_us = words / took_s, cpu / words * 1e6
    return f"  {what:32} {rate:10.0f} words/s   {cpu_us:6.2f} µs of CPU a word"


def streams_line(streams: KafkaStreams | None) -> str:
    """What is to be said of Kafka Streams."""
    if streams is None:
        return "  Kafka Streams: not measured, there is no javac on this machine"
    return "  Kafka Streams: the warming up of its JVM is included; see kafka_by_hand.py"
