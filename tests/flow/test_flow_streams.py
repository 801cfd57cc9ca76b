"""What an agent's stream gives, in each of its forms, and that none of it is lost."""

import asyncio
from collections import Counter
from typing import Any

import pytest
from flowing import app_of, eventually, flow_test, running

from streamd.app import App
from streamd.errors import AppError, BrokerError


def test_events_and_items_carry_keys_headers_and_places() -> None:
    seen: list[Any] = []

    def build() -> App:
        app = app_of()
        topic = app.topic("in", key_type=str, value_type=int)

        @app.agent(topic)
        async def by_event(stream: Any) -> None:
            async for event in stream.events():
                m = event.message
                seen.append((event.key, event.value, event.headers, m.partition, m.offset))

        @app.agent(topic)
        async def by_item(stream: Any) -> None:
            async for key, value in stream.items():
                seen.append((key, value))

        return app

    async def test() -> None:
        async with running(build) as flow:
            await flow.send("in", 7, key="k", partition=2, headers={"h": "v"}, timestamp=5.5)
            await flow.send("in", 8, key="m", partition=2)
            await flow.settled()

        assert ("k", 7, {"h": b"v"}, 2, 0) in seen
        assert ("m", 8, {}, 2, 1) in seen
        assert [s for s in seen if len(s) == 2] == [("k", 7), ("m", 8)]

    flow_test(test)


def test_several_topics_are_read_as_one_and_sent_to_as_the_first() -> None:
    seen: list[tuple[str, int]] = []

    def build() -> App:
        app = app_of()
        both = app.topic("a", "b", key_type=str, value_type=int)
        counts = app.Table("counts", default=int)

        @app.agent(both)
        async def count(stream: Any) -> None:
            async for event in stream.events():
                seen.append((event.message.topic, event.value))
                counts[event.key] += event.value

        @app.agent(app.topic("in", value_type=int))
        async def pass_on(values: Any) -> None:
            async for value in values:
                await both.send(key="k", value=value)

        return app

    async def test() -> None:
        async with running(build) as flow:
            partition = flow.app.topics["a"].encode("k", 1).partition
            await flow.send("a", 1, key="k", partition=partition)
            await flow.send("b", 10, key="k", partition=partition)
            await flow.send("in", 100)
            await flow.settled()

            assert sorted(seen) == [("a", 1), ("a", 100), ("b", 10)]
            assert flow.table("counts") == {"k": 111}

    flow_test(test)


def test_topics_of_different_types_cannot_be_read_as_one() -> None:
    app = app_of()
    app.topic("b", value_type=str)

    with pytest.raises(AppError, match=r"value_type None and 'str'|value_type 'str' and None"):
        app.topic("a", "b")


def test_current_event_is_the_one_in_work() -> None:
    seen: list[Any] = []
    before: list[Any] = []

    def build() -> App:
        app = app_of(topic_partitions=1)

        @app.agent(app.topic("in", value_type=int))
        async def work(stream: Any) -> None:
            before.append(stream.current_event)
            async for value in stream:
                await asyncio.sleep(0)
                event = stream.current_event
                seen.append((value, event.value, event.message.offset))

        return app

    async def test() -> None:
        async with running(build) as flow:
            for n in range(50):
                await flow.send("in", n)
            await flow.settled()

        assert before == [None]
        assert seen == [(n, n, n) for n in range(50)]

    flow_test(test)


def test_enumerate_numbers_the_events() -> None:
    seen: list[Any] = []

    def build() -> App:
        app = app_of(topic_partitions=1)

        @app.agent(app.topic("in", value_type=str))
        async def work(stream: Any) -> None:
            async for number, value in stream.enumerate(10):
                seen.append((number, value))

        return app

    async def test() -> None:
        async with running(build) as flow:
            for text in "abc":
                await flow.send("in", text)
            await flow.settled()

        assert seen == [(10, "a"), (11, "b"), (12, "c")]

    flow_test(test)


def taking(seen: list[Any], max_: int, within: float | None) -> App:
    app = app_of(topic_partitions=1)
    out = app.topic("out", value_type=int, partitions=1)

    @app.agent(app.topic("in", value_type=int))
    async def work(stream: Any) -> None:
        async for batch in stream.take(max_, within=within):
            seen.append(list(batch))
            for value in batch:
                await out.send(value=value)
                await asyncio.sleep(0)

    return app


def test_take_without_within_gives_full_lists_only() -> None:
    async def test() -> None:
        seen: list[Any] = []
        async with running(lambda: taking(seen, 4, None)) as flow:
            for n in range(10):
                await flow.send("in", n)
            await eventually(lambda: len(flow.values("out")) == 8)

            assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]]
            assert list(flow.engine("work").statistics().behind.values()) == [2]

    flow_test(test)


def test_take_within_gives_what_came_in_time() -> None:
    async def test() -> None:
        seen: list[Any] = []
        async with running(lambda: taking(seen, 4, 0.05)) as flow:
            for n in range(6):
                await flow.send("in", n)
            await flow.settled()

            assert seen == [[0, 1, 2, 3], [4, 5]]
            assert flow.values("out") == list(range(6))

    flow_test(test)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_an_unfinished_take_is_read_again(end: str) -> None:
    async def test() -> None:
        seen: list[Any] = []
        async with running(lambda: taking(seen, 4, None)) as flow:
            for n in range(6):
                await flow.send("in", n)
            await eventually(lambda: len(flow.values("out")) == 4)
            await getattr(flow, end)("work")
            await flow.start("work")
            await flow.send("in", 6)
            await flow.send("in", 7)
            await flow.settled()

            assert flow.values("out") == list(range(8))
            assert seen[-1] == [4, 5, 6, 7]

    flow_test(test)


def test_a_take_that_is_cancelled_by_its_agent_loses_nothing() -> None:
    def build() -> App:
        app = app_of(topic_partitions=1)
        out = app.topic("out", value_type=int, partitions=1)

        @app.agent(app.topic("in", value_type=int))
        async def work(stream: Any) -> None:
            while True:
                try:
                    async with asyncio.timeout(0.01):
                        async for batch in stream.take(5):
                            for value in batch:
                                await out.send(value=value)
                    return
                except TimeoutError:
                    continue

        return app

    async def test() -> None:
        async with running(build) as flow:
            await flow.send("in", 0)
            await flow.send("in", 1)
            await asyncio.sleep(0.04)
            for n in range(2, 10):
                await flow.send("in", n)
            await flow.settled()

            assert flow.values("out") == list(range(10))

    flow_test(test)


def test_a_take_over_several_partitions_counts_each_key_once() -> None:
    def build() -> App:
        app = app_of()
        counts = app.Table("counts", default=int)

        @app.agent(value_type=str)
        async def count(stream: Any) -> None:
            async for batch in stream.take(7, within=0.01):
                for word in batch:
                    counts[word] += 1

        return app

    async def test() -> None:
        words = [f"w{n % 23}" for n in range(500)]
        async with running(build) as flow:
            for word in words:
                await flow.send("count", word, key=word)
            await flow.settled()

            assert flow.table("counts") == Counter(words)

    flow_test(test)


def test_take_of_less_than_one_is_refused() -> None:
    async def test() -> None:
        with pytest.raises(Exception, match="take"):
            async with running(lambda: taking([], 0, None)) as flow:
                await flow.send("in", 1)
                await flow.settled(5)

    flow_test(test)


@pytest.mark.parametrize("table", [False, True])
def test_a_checkpoint_in_the_middle_of_a_stride_loses_no_event(table: bool) -> None:
    """A stride of many events is cut at a checkpoint; what was cut off is handed out later."""

    def build() -> App:
        app = app_of(topic_partitions=1)
        counts = app.Table("counts", default=int)
        out = app.topic("out", value_type=int, partitions=1)

        @app.agent(app.topic("in", value_type=int))
        async def work(stream: Any) -> None:
            async for value in stream:
                if value % 97 == 0:
                    await asyncio.sleep(0.02)
                if table:
                    counts[value] += 1
                await out.send(value=value)

        return app

    async def test() -> None:
        async with running(build) as flow:
            for n in range(2000):
                await flow.send("in", n)
            await flow.settled()

            assert flow.values("out") == list(range(2000))
            if table:
                assert flow.table("counts") == {n: 1 for n in range(2000)}

    flow_test(test)


def test_a_stop_in_the_middle_of_a_stride_loses_and_doubles_nothing() -> None:
    def build() -> App:
        app = app_of(topic_partitions=1)
        out = app.topic("out", value_type=int, partitions=1)

        @app.agent(app.topic("in", value_type=int))
        async def work(stream: Any) -> None:
            async for value in stream:
                if value % 50 == 49:
                    await asyncio.sleep(0.005)
                await out.send(value=value)

        return app

    async def test() -> None:
        async with running(build) as flow:
            for n in range(1000):
                await flow.send("in", n)
            for _ in range(6):
                await asyncio.sleep(0.01)
                await flow.stop("work")
                await flow.start("work")
            await flow.settled()

            assert flow.values("out") == list(range(1000))

    flow_test(test)


def test_slow_events_do_not_hold_back_the_fast_ones_before_them() -> None:
    """What was done in a stride is made durable soon, also when a slow event follows."""
    gate = asyncio.Event()

    def build() -> App:
        app = app_of(topic_partitions=1)
        out = app.topic("out", value_type=int, partitions=1)

        @app.agent(app.topic("in", value_type=int))
        async def work(stream: Any) -> None:
            async for value in stream:
                if value == 3000:
                    await asyncio.sleep(0.05)
                if value == 3001:
                    await gate.wait()
                await out.send(value=value)

        return app

    async def test() -> None:
        async with running(build) as flow:
            for n in range(3100):
                await flow.send("in", n)
            # Event 3001 waits for ever; 3000 and all before it are durable all the same.
            await eventually(lambda: len(flow.values("out")) >= 3001, 5)
            gate.set()
            await flow.settled()

            assert flow.values("out") == list(range(3100))

    flow_test(test)


def test_an_agent_that_returns_is_started_again_where_it_left() -> None:
    def build() -> App:
        app = app_of(topic_partitions=1)
        out = app.topic("out", value_type=int, partitions=1)

        @app.agent(app.topic("in", value_type=int))
        async def work(stream: Any) -> None:
            async for value in stream:
                await out.send(value=value)
                if value == 500:
                    return

        return app

    async def test() -> None:
        async with running(build) as flow:
            for n in range(1000):
                await flow.send("in", n)
            await flow.settled()

            assert flow.values("out") == list(range(1000))

    flow_test(test)


def test_a_backlog_is_not_read_into_memory_while_a_checkpoint_cannot_be_made() -> None:
    def build() -> App:
        app = app_of(topic_partitions=1)

        @app.agent(app.topic("in", value_type=int))
        async def work(stream: Any) -> None:
            async for _ in stream:
                await asyncio.sleep(0)

        return app

    async def test() -> None:
        async with running(build) as flow:
            await flow.append("in", [(None, b"1")])
            await flow.settled()
            engine, most = flow.engine("work"), 0
            await flow.append("in", [(None, b"1")] * 100_000)
            flow.broker.failing = BrokerError("disk full")
            for _ in range(50):
                most = max(most, sum(feed.waiting for feed in engine._feeds))
                await asyncio.sleep(0.01)
            flow.broker.failing = None
            assert most < 20_000
            await flow.settled()

    flow_test(test)


def batching(max_: int, within: float | None, batches: list[list[str]]) -> App:
    """An agent of two instances that sends each list on as one value."""
    app = app_of(topic_partitions=2)
    out = app.topic("out", value_type=str, partitions=1)

    @app.agent(name="flow.batch", value_type=str, concurrency=2)
    async def batch(stream: Any) -> None:
        async for words in stream.take(max_, within=within):
            batches.append(words)
            await asyncio.sleep(0)
            await out.send(value=" ".join(words))

    return app


@pytest.mark.parametrize(("max_", "within"), [(5, 0.02), (5, None), (1000, 0.02)])
def test_with_concurrency_a_take_keeps_to_one_partition(max_: int, within: Any) -> None:
    async def test() -> None:
        batches: list[list[str]] = []
        async with running(lambda: batching(max_, within, batches)) as flow:
            for number in range(100):
                await flow.send("flow.batch", f"p{number % 2}.{number}", partition=number % 2)
            await flow.settled()

            assert sorted(word for words in batches for word in words) == sorted(
                f"p{number % 2}.{number}" for number in range(100)
            )
            assert all(len({word[:2] for word in words}) == 1 for words in batches)
            assert all(len(words) <= max_ for words in batches)

    flow_test(test)


def test_with_concurrency_lists_are_exact_over_crashes() -> None:
    async def test() -> None:
        numbers = iter(range(10**6))
        sent: list[str] = []
        async with running(lambda: batching(3, 0.005, [])) as flow:
            for _ in range(12):
                for _ in range(25):
                    number = next(numbers)
                    sent.append(f"w{number}")
                    await flow.send("flow.batch", sent[-1], partition=number % 2)
                await asyncio.sleep(0.004)
                await flow.kill("batch")
                await flow.start("batch")
            await flow.settled()

            got = [word for value in flow.values("out") for word in value.split()]
            assert Counter(got) == Counter(sent)

    flow_test(test)
