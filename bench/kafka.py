"""streamd on Kafka beside loops by hand and Kafka Streams in one run, with what is asked of it.

The broker runs on the same cores. Ratios are of medians of rounds in which each way ran once.
"""

import os
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from kafka_by_hand import (
    PARTITIONS,
    ROUNDS,
    WORDS,
    Run,
    broker,
    fill,
    line,
    measure,
    rounds,
    streams_line,
)
from kafka_moments import (
    RATE,
    holding,
    idle,
    latencies,
    recoveries,
    replacements,
    resident_bytes,
)
from kafka_streams import KafkaStreams
from kafka_words import measure as measure_ours
from text import posts

DEFAULT, EXACTLY_ONCE = "at_least_once", "exactly_once"
OURS = {
    "streamd": (DEFAULT, True),
    "streamd, exactly once": (EXACTLY_ONCE, True),
    "streamd, packed=False": (DEFAULT, False),
}
HAND = "by hand, packed"
STREAMS = "Kafka Streams, at_least_once"
STREAMS_EXACT = "Kafka Streams, exactly_once_v2"
EVENTS = 20_000
TRIALS = 11
IDLE_S = 30.0
KEYS = 1_000_000
MB = 2**20


def run(*, small: bool = False) -> Iterator[str]:
    """Lines of the report."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        streams = KafkaStreams.compiled(folder)
        with broker(folder) as bootstrap:
            yield from word_count(bootstrap, streams, small)
            yield from moments(bootstrap, small)


def word_count(bootstrap: str, streams: KafkaStreams | None, small: bool) -> Iterator[str]:
    count = 1 if small else ROUNDS
    made, expected = posts(WORDS // 5 if small else WORDS)
    words = sum(expected.values())
    yield (
        f"word count on Kafka, {words} words in {len(made)} posts, {PARTITIONS} partitions, "
        f"{count} rounds, interleaved; medians; the broker on the same {os.cpu_count()} cores"
    )
    topic = f"posts-{uuid.uuid4().hex[:8]}"
    fill(bootstrap, topic, made)
    medians = rounds(count, lambda: every_way(bootstrap, topic, len(made), expected, streams))
    for what, (took_s, cpu_s) in medians.items():
        yield line(what, words, took_s, cpu_s)
    yield streams_line(streams)
    if streams is not None:
        for what, beside, least in (
            ("streamd", STREAMS, "2.0"),
            ("streamd, exactly once", STREAMS_EXACT, "2.0"),
            ("streamd, packed=False", STREAMS, "1.0"),
        ):
            ratio = medians[beside][0] / medians[what][0]
            yield row(f"{what}: words/s over {beside}", f"{ratio:.2f}", f"≥ {least}")
    cpu = medians["streamd"][1] / medians[HAND][1]
    yield row("streamd: CPU a word over the packed loop", f"{cpu:.2f}", "≤ 3")


def every_way(
    bootstrap: str,
    topic: str,
    made: int,
    expected: Counter[str],
    streams: KafkaStreams | None,
) -> Iterator[Run]:
    """One round. The CPU of an app is that of all its processes."""
    for what, (guarantee, packed) in OURS.items():
        took_s, cpu_s = measure_ours(bootstrap, topic, expected, guarantee, packed)
        each = ", ".join(f"{name} {spent:.1f}" for name, spent in cpu_s.items())
        sys.stderr.write(f"{what}: seconds of CPU: {each}\n")
        yield what, took_s, sum(cpu_s.values())
    yield from measure(bootstrap, topic, made, expected, streams)


def moments(bootstrap: str, small: bool) -> Iterator[str]:
    events, trials = (EVENTS // 5, TRIALS // 3) if small else (EVENTS, TRIALS)
    for guarantee, least in ((DEFAULT, "≤ 5, 40 ms"), (EXACTLY_ONCE, "≤ 100, 250 ms")):
        p50, p99 = (took_s * 1000 for took_s in latencies(bootstrap, guarantee, events))
        yield row(
            f"event to result at {RATE}/s, p50, p99, {guarantee}",
            f"{p50:.1f}, {p99:.1f} ms", least,
        )  # fmt: skip
    for guarantee, least in ((DEFAULT, "≤ 0.5 s"), (EXACTLY_ONCE, "≤ 1.5 s")):
        took_s = replacements(bootstrap, guarantee, trials)
        yield row(
            f"process killed → next result, median of {trials}, {guarantee}",
            f"{took_s[len(took_s) // 2]:.2f} s (max {took_s[-1]:.2f})", least,
        )  # fmt: skip
    percent = 100 * idle(bootstrap, IDLE_S / 3 if small else IDLE_S)
    yield row("CPU of an idle app, all its processes", f"{percent:.2f} % of a core", "≤ 1 %")
    yield from recovery(bootstrap, trials)


def recovery(bootstrap: str, trials: int) -> Iterator[str]:
    """A process that holds many keys: its weight, and how soon the one after it has them."""
    with holding(bootstrap, KEYS) as bench:
        size = resident_bytes(bench)
        for stored, least in ((True, "≤ 2 s"), (False, "≤ 4 s")):
            took = recoveries(bench, trials, stored=stored)
            whence = "its local stores" if stored else "the changelog"
            wall_s, cpu_s = took[len(took) // 2]
            yield row(
                f"process start → {KEYS} int keys from {whence}, median of {trials}",
                f"{wall_s:.2f} s ({cpu_s:.2f} of CPU)", least,
            )  # fmt: skip
    yield row(f"resident memory of a process with {KEYS} int keys", f"{size / MB:.0f} MB", "")


def row(what: str, found: str, wanted: str) -> str:
    return f"  {what:66} {found:>22}   {wanted}"
