"""Whatever fails and whatever is killed, the end is the fold of the input."""

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
from flowing import Flow, app_of, flow_test, running
from hypothesis import given, settings
from hypothesis import strategies as st

from streamd.app import App


class Chaos:
    """Decides where the agents fail and wait; the same seed, the same decisions."""

    def __init__(self, seed: int, fail: float, wait: float) -> None:
        self._random = random.Random(seed)
        self._fail = fail
        self._wait = wait
        self.tries: Counter[str] = Counter()

    async def strike(self, word: str) -> None:
        if self._random.random() < self._wait:
            await asyncio.sleep(self._random.choice([0, 0, 0, 0.001, 0.004]))
        if self._random.random() < self._fail and self.tries[word] < 40:
            self.tries[word] += 1
            raise RuntimeError(word)


def build(chaos: Chaos, concurrency: int, take: bool) -> App:
    """Two agents that share a table, and one behind them that has its own."""
    app = app_of(topic_partitions=3, retries=1000, retry_backoff=0.0005)
    both = app.Table("both", default=int)
    seen = app.Table("seen", default=list)
    total = app.Table("total", default=int)
    plain = app.topic("plain", value_type=str)

    @app.agent(value_type=str)
    async def plus(stream: Any) -> None:
        async for word in stream:
            both[word] += 1
            await chaos.strike(word)
            await after.send(key=word, value=word)
            await chaos.strike(word)
            both[word] += 1

    @app.agent(value_type=str)
    async def minus(stream: Any) -> None:
        if take:
            async for batch in stream.take(4, within=0.002):
                for word in batch:
                    seen[word] = [*seen[word], len(seen[word])]
                    both[word] -= 1
                    await chaos.strike(word)
                    await after.send(key=word, value=word)
        else:
            async for word in stream:
                seen[word] = [*seen[word], len(seen[word])]
                await chaos.strike(word)
                both[word] -= 1
                await after.send(key=word, value=word)

    @app.agent(value_type=str, concurrency=concurrency)
    async def after(stream: Any) -> None:
        async for word in stream:
            await chaos.strike(word)
            await last.send(key=word, value=word)
            await plain.send(value=word)
            await chaos.strike(word)

    @app.agent(value_type=str)
    async def last(stream: Any) -> None:
        async for word in stream:
            total[word] += 1

    return app


async def check(flow: Flow, plus: Counter[str], minus: Counter[str]) -> None:
    await flow.settled()
    both = {w: n for w, n in flow.table("both").items() if n}
    assert both == {w: n for w in plus | minus if (n := 2 * plus[w] - minus[w])}
    assert flow.table("seen") == {w: list(range(n)) for w, n in minus.items()}
    assert flow.table("total") == plus + minus
    assert Counter(flow.values("plain")) == plus + minus
    assert flow.letters() == []


async def play(seed: int, fail: float, wait: float, concurrency: int, take: bool,
               slots: int, deeds: list[str]) -> None:  # fmt: skip
    choose = random.Random(seed)
    chaos = Chaos(seed, fail, wait)
    plus: Counter[str] = Counter()
    minus: Counter[str] = Counter()
    counts = {"plus": slots, "after": slots}
    async with running(lambda: build(chaos, concurrency, take), slots=counts) as flow:
        for deed in deeds:
            if deed in ("kill", "stop"):
                group = choose.choice(["plus", "after", "last"])
                slot = choose.randrange(counts.get(group, 1))
                await getattr(flow, deed)(group, slot)
                await flow.start(group, slot, counts.get(group, 1))
            elif deed == "wait":
                await asyncio.sleep(choose.choice([0, 0.002, 0.01]))
            else:
                for _ in range(choose.randrange(1, 30)):
                    word = f"w{choose.randrange(9)}"
                    target, expected = choose.choice([("plus", plus), ("minus", minus)])
                    await flow.send(target, word, key=word)
                    expected[word] += 1
        await check(flow, plus, minus)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    fail=st.sampled_from([0.0, 0.01, 0.1]),
    wait=st.sampled_from([0.0, 0.2, 0.9]),
    concurrency=st.sampled_from([1, 4]),
    take=st.booleans(),
    slots=st.sampled_from([1, 2]),
    deeds=st.lists(
        st.sampled_from(["send", "send", "send", "wait", "wait", "kill", "stop"]), max_size=14
    ),
)
def test_failures_waits_and_kills_change_no_result(
    seed: int, fail: float, wait: float, concurrency: int, take: bool, slots: int,
    deeds: list[str],
) -> None:  # fmt: skip
    flow_test(lambda: play(seed, fail, wait, concurrency, take, slots, deeds))


@pytest.mark.parametrize("seed", range(4))
def test_a_storm_of_kills_changes_no_result(seed: int) -> None:
    deeds = random.Random(seed).choices(["send", "wait", "kill", "stop"], [4, 6, 3, 1], k=60)
    flow_test(lambda: play(seed, 0.02, 0.5, 3, seed % 2 == 0, 2, deeds))
