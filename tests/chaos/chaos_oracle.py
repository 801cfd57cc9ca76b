"""What must be true of an instance in the end.

The oracle is a replay of the input that the log holds, compared key by key: a conserved sum
would not see a lost or doubled event. On Kafka with the default guarantee, named topics may
hold what was sent again after a crash, in order behind what was sent before; nothing else may
differ.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from chaos_content import Content, Row
from chaos_kafka import KafkaContent
from chaos_tree import Tree, eventually

DRAIN_S = 60.0

Held = Content | KafkaContent


def content_of(made: Tree) -> Held:
    """What the instance's broker holds; to be closed."""
    return KafkaContent(made) if made.broker else Content(made.datadir)


def drain(made: Tree) -> None:
    """Wait until every agent has settled all that the log holds, and nothing is a zombie."""
    content = content_of(made)
    try:
        deadline = time.monotonic() + DRAIN_S
        while behind := content.behind():
            status = made.ask("status") or {}
            assert time.monotonic() < deadline, (
                f"still behind after {DRAIN_S} s: {behind}; {status.get('sentence')} "
                f"{[(p['name'], p['state']) for p in status.get('processes', [])]}"
            )
            time.sleep(0.05)
    finally:
        content.close()
    eventually(lambda: not made.zombies(), "no zombies", 3.0)


def problems(made: Tree, acked: set[tuple[str, int]]) -> list[str]:
    """What is wrong with the end state; empty when all is exact. The instance is stopped.

    Args:
        acked: Topic and number of what must be in the log.
    """
    content = content_of(made)
    try:
        return [
            *_input_problems(content, acked),
            *_word_problems(content),
            *_bank_problems(content),
            *_tick_problems(content),
            *content.damage(),
        ]
    finally:
        content.close()


def _input_problems(content: Held, acked: set[tuple[str, int]]) -> Iterator[str]:
    there = Counter(
        (topic, int(row["headers"]["number"]))
        for topic in ("posts", "transfers", "deposits")
        for rows in content.topic(topic)
        for row in rows
    )
    if lost := acked - set(there):
        yield f"{len(lost)} acknowledged records are not in the log: {sorted(lost)[:5]}"
    if twice := [number for number, count in there.items() if count > 1]:
        yield f"{len(twice)} records are in the log more than once: {twice[:5]}"


def _word_problems(content: Held) -> Iterator[str]:
    wanted: Counter[str] = Counter()
    for rows in content.topic("posts"):
        for row in rows:
            wanted.update(row["value"].split())
    counted: Counter[str] = Counter()
    for (_, word), count in content.table("word_counts", 4).items():
        counted[word] += count
    yield from _differences("word_counts", dict(wanted), dict(counted))
    seen: dict[str, list[int]] = defaultdict(list)
    for rows in content.topic("results"):
        for row in rows:
            seen[row["key"]].append(row["value"])
    if not content.exactly_once:
        seen = defaultdict(list, {word: _first_of_each(each) for word, each in seen.items()})
    wrong = [
        word
        for word in sorted(wanted.keys() | seen.keys())
        if seen[word] != list(range(1, wanted[word] + 1))
    ]
    for word in wrong[:5]:
        yield f"results of {word}: {_first_break(seen[word])}, {wanted[word]} wanted"


def _bank_problems(content: Held) -> Iterator[str]:
    accounts: dict[tuple[int, str], int] = {}
    ledger: dict[str, list[Row]] = defaultdict(list)
    refused: Counter[int] = Counter()
    for partition, rows in enumerate(content.topic("transfers")):
        for row in rows:
            transfer = row["value"]
            if transfer.get("how") in ("always", "exit", "segfault"):
                refused[transfer["number"]] += 1
                continue
            source, target = (partition, transfer["source"]), (partition, transfer["target"])
            done = accounts.get(source, 100) >= transfer["amount"]
            if done:
                accounts[source] = accounts.get(source, 100) - transfer["amount"]
            balance = accounts.get(source, 100)
            ledger[transfer["source"]].append(
                {"number": transfer["number"], "done": done, "balance": balance}
            )
            if done:
                accounts[target] = accounts.get(target, 100) + transfer["amount"]
    yield from _differences("accounts", accounts, content.table("accounts", 2))
    written: dict[str, list[Row]] = defaultdict(list)
    for rows in content.topic("ledger"):
        for row in rows:
            written[row["key"]].append(row["value"])
    if not content.exactly_once:
        written = defaultdict(list, {k: _first_of_each(rows) for k, rows in written.items()})
    yield from _differences("ledger", dict(ledger), dict(written))
    letters = Counter(row["value"]["number"] for row in content.dead_letters())
    if not content.exactly_once:
        letters = Counter(dict.fromkeys(letters, 1))
    yield from _differences("dead letters", dict(refused), dict(letters))
    sums: dict[str, int] = defaultdict(int)
    for rows in content.topic("deposits"):
        for row in rows:
            sums[row["key"]] += row["value"]
    held: dict[str, int] = defaultdict(int)
    for (_, key), value in content.table("deposited", 2).items():
        held[key] += value
    ticks = held.pop("ticks", 0)
    logged = [row["value"] for rows in content.topic("tick_log") for row in rows]
    if not content.exactly_once:
        logged = _first_of_each(logged)
    if logged != list(range(1, ticks + 1)):
        yield f"ticks: {ticks} in the table; the log has {_first_break(logged)}"
    yield from _differences("deposited", dict(sums), dict(held))


def _tick_problems(content: Held) -> Iterator[str]:
    if not any(content.topic("tick_log")):
        yield "no tick was logged"


def _first_of_each(values: list[Any]) -> list[Any]:
    """Without what was there before: what named topics may get again after a crash."""
    seen: set[str] = set()
    return [v for v in values if not ((s := str(v)) in seen or seen.add(s))]  # type: ignore[func-returns-value]


def _first_break(numbers: list[int]) -> str:
    for index, number in enumerate(numbers):
        if number != index + 1:
            around = numbers[max(0, index - 3) : index + 4]
            return f"{len(numbers)} values, {number} where {index + 1} belongs: … {around}"
    return f"{len(numbers)} values without a break"


def _differences(what: str, wanted: dict[Any, Any], got: dict[Any, Any]) -> Iterator[str]:
    wrong = [key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key)]
    for key in sorted(wrong, key=str)[:5]:
        left, right = wanted.get(key), got.get(key)
        if isinstance(left, list) and isinstance(right, list):
            at = next(
                (
                    i
                    for i, pair in enumerate(zip(left, right, strict=False))
                    if pair[0] != pair[1]
                ),
                min(len(left), len(right)),
            )
            yield (
                f"{what} of {key}: {len(left)} wanted, {len(right)} there; from {at} on "
                f"{left[at : at + 3]} wanted, {right[at : at + 3]} there"
            )
        else:
            yield f"{what} of {key}: {left!r} wanted, {right!r} there"
    if len(wrong) > 5:
        yield f"{what}: {len(wrong)} keys differ"
