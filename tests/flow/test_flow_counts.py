"""Word counts are exact, however the work is cut."""

from collections import Counter
from typing import Any

import pytest
from flowing import app_of, flow_test, running

from streamd.app import App

TEXT = "the quick brown fox jumps over the lazy dog and the dog sleeps on".split()


def word_count(partitions: int) -> App:
    app = app_of(topic_partitions=partitions)
    posts = app.topic("posts", value_type=str)
    counts = app.Table("counts", default=int)

    @app.agent(posts)
    async def split(stream: Any) -> None:
        async for post in stream:
            for word in post.split():
                await count.send(key=word, value=word)

    @app.agent(value_type=str)
    async def count(stream: Any) -> None:
        async for word in stream:
            counts[word] += 1

    return app


@pytest.mark.parametrize("partitions", [1, 2, 3, 8])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_word_count_is_exact(partitions: int, processes: int) -> None:
    async def test() -> None:
        slots = {"split": min(2, processes), "count": processes}
        async with running(lambda: word_count(partitions), slots=slots) as flow:
            for n in range(200):
                post = " ".join(TEXT[n % 7 :])
                await flow.send("posts", post, partition=n % partitions)
            await flow.settled()

            expected = Counter(w for n in range(200) for w in TEXT[n % 7 :])
            assert flow.table("counts") == expected

    flow_test(test)


def test_all_groups_in_one_process_count_the_same() -> None:
    async def test() -> None:
        async with running(lambda: word_count(4), alone=True) as flow:
            for n in range(50):
                await flow.send("posts", " ".join(TEXT), partition=n % 4)
            await flow.settled()

            assert flow.table("counts") == Counter(TEXT * 50)

    flow_test(test)
