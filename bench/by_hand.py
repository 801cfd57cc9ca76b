"""The word count as one would write it by hand, without streamd: the yardstick of the bench.

Two processes and one SQLite file. `split` reads packs of posts and writes packs of words,
placed by the hash of the word; `count` reads those and keeps a table. Each transaction holds
outputs, the table's changed rows and the position, so it is exact as well. Nothing else is
there: no groups, no fences, no retries, no wake-ups, no web, no checks.
"""

import multiprocessing
import os
import time
import zlib
from collections import Counter
from pathlib import Path

import apsw
import msgspec
from confluent_kafka import murmur2

PARTITIONS = 8
PACK_EVENTS = 1000
POSTS_A_TRANSACTION = 2000
WORDS_A_TRANSACTION = 10_000

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(tuple[list[bytes | None], list[bytes]]).decode
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(str).decode


def open_file(path: Path) -> apsw.Connection:
    connection = apsw.Connection(str(path))
    connection.set_busy_timeout(30_000)
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "cache_size=-2000"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def fill(path: Path, posts: list[str]) -> None:
    connection = open_file(path)
    connection.execute(
        "CREATE TABLE log(id INTEGER PRIMARY KEY, n INTEGER, data BLOB);"
        "CREATE TABLE position(reader TEXT, tp INTEGER, next INTEGER, PRIMARY KEY(reader, tp));"
        "CREATE TABLE counts(word BLOB PRIMARY KEY, n BLOB) WITHOUT ROWID;"
    )
    with connection:
        ends: Counter[int] = Counter()
        for start in range(0, len(posts), PACK_EVENTS):
            part = [_encode(post) for post in posts[start : start + PACK_EVENTS]]
            write_pack(
                connection, start // PACK_EVENTS % PARTITIONS, ends, [None] * len(part), part
            )
    connection.close()


def write_pack(
    connection: apsw.Connection,
    tp: int,
    ends: Counter[int],
    keys: list[bytes | None],
    values: list[bytes],
) -> None:
    data = _pack((keys, values))
    data += zlib.crc32(data).to_bytes(4, "big")
    connection.execute(
        "INSERT INTO log VALUES(?, ?, ?)", (tp << 44 | ends[tp], len(values), data)
    )
    ends[tp] += len(values)


def read(
    connection: apsw.Connection, tp: int, position: int, limit: int
) -> tuple[list[bytes], int]:
    values: list[bytes] = []
    rows = connection.execute(
        "SELECT n, data FROM log WHERE id >= ? AND id < ? ORDER BY id LIMIT ?",
        (tp << 44 | position, (tp + 1) << 44, limit),
    ).fetchall()
    for n, data in rows:
        if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "big"):
            raise SystemExit("a pack is damaged")
        values += _unpack(data[:-4])[1]
        position += n
    return values, position


def split(path: Path, total: int) -> None:
    connection = open_file(path)
    positions: Counter[int] = Counter()
    ends: Counter[int] = Counter()
    done = 0
    while done < total:
        words: list[list[bytes | None]] = [[] for _ in range(PARTITIONS)]
        values: list[list[bytes]] = [[] for _ in range(PARTITIONS)]
        before = done
        for tp in range(PARTITIONS):
            posts, positions[tp] = read(connection, tp, positions[tp], 1)
            done += len(posts)
            for post in posts:
                for word in _decode(post).split():
                    key = word.encode()
                    to = murmur2(key, PARTITIONS)
                    words[to].append(key)
                    values[to].append(_encode(word))
            if done - before >= POSTS_A_TRANSACTION:
                break
        connection.execute("BEGIN IMMEDIATE")
        for to in range(PARTITIONS):
            for start in range(0, len(values[to]), PACK_EVENTS):
                end = start + PACK_EVENTS
                write_pack(
                    connection,
                    PARTITIONS + to,
                    ends,
                    words[to][start:end],
                    values[to][start:end],
                )
        save(connection, "split", positions)
        connection.execute("COMMIT")
    note_cpu()


def count(path: Path, total: int) -> None:
    connection = open_file(path)
    positions: Counter[int] = Counter()
    table: dict[str, int] = {}
    done = 0
    while done < total:
        dirty: dict[str, int] = {}
        before = done
        for tp in range(PARTITIONS, 2 * PARTITIONS):
            words, positions[tp] = read(connection, tp, positions[tp], 3)
            done += len(words)
            for data in words:
                word = _decode(data)
                dirty[word] = table[word] = table.get(word, 0) + 1
            if done - before >= WORDS_A_TRANSACTION:
                break
        if done == before:
            time.sleep(0.001)
            continue
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(
            "INSERT OR REPLACE INTO counts VALUES(?, ?)",
            [(word.encode(), _encode(n)) for word, n in dirty.items()],
        )
        save(connection, "count", positions)
        connection.execute("COMMIT")
    note_cpu()


def save(connection: apsw.Connection, reader: str, positions: Counter[int]) -> None:
    connection.executemany(
        "INSERT OR REPLACE INTO position VALUES(?, ?, ?)",
        [(reader, tp, position) for tp, position in positions.items()],
    )


CPU = multiprocessing.Value("d", 0.0)


def note_cpu() -> None:
    times = os.times()
    with CPU.get_lock():
        CPU.value += times.user + times.system


def run(folder: Path, posts: list[str], expected: Counter[str]) -> tuple[float, float]:
    """Count the posts; seconds it took, and seconds of CPU of both processes.

    Raises:
        SystemExit: The counts are not right.
    """
    path = folder / "by-hand.db"
    fill(path, posts)
    CPU.value = 0.0
    began_at = time.monotonic()
    workers = [
        multiprocessing.Process(target=split, args=(path, len(posts))),
        multiprocessing.Process(target=count, args=(path, sum(expected.values()))),
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    took_s = time.monotonic() - began_at
    connection = open_file(path)
    counted = {
        word.decode(): int(n) for word, n in connection.execute("SELECT word, n FROM counts")
    }
    connection.close()
    if counted != dict(expected):
        raise SystemExit("the hand-written loop counted wrongly")
    return took_s, CPU.value
