"""Events that fail: nothing of a failed try is left, and no neighbour is lost or doubled."""

import asyncio
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from flowing import Flow, app_of, eventually, flow_test, running

from streamd.app import App
from streamd.errors import BrokerError, Fenced, LogDamaged, Outdated, StreamdError
from streamd.wire import Suspect


def failing(fails: Callable[[str, int], bool], tried: Counter[str], **agent: Any) -> App:
    """An agent that writes and sends, then raises where `fails(word, try)` says so."""
    app = app_of(topic_partitions=2)
    counts = app.Table("counts", default=int)
    out = app.topic("out", value_type=str)

    @app.agent(value_type=str, **agent)
    async def count(stream: Any) -> None:
        async for word in stream:
            tried[word] += 1
            counts[word] += 1
            await out.send(key=word, value=word)
            await asyncio.sleep(0)
            if fails(word, tried[word]):
                raise RuntimeError(f"no {word}")

    return app


WORDS = [f"w{n % 7}" for n in range(100)]


async def feed(flow: Flow, words: list[str]) -> None:
    for word in words:
        await flow.send("count", word, key=word)


def test_a_failed_try_leaves_nothing_behind() -> None:
    async def test() -> None:
        tried: Counter[str] = Counter()
        async with running(lambda: failing(lambda w, n: w == "bad" and n < 3, tried)) as flow:
            await feed(flow, [*WORDS, "bad", *WORDS])
            await flow.settled()

            expected = Counter([*WORDS, "bad", *WORDS])
            assert flow.table("counts") == expected
            assert Counter(flow.values("out")) == expected
            assert tried["bad"] == 3
            assert flow.letters() == []

    flow_test(test)


def test_after_its_retries_an_event_is_dead_lettered_as_it_came() -> None:
    async def test() -> None:
        tried: Counter[str] = Counter()
        build = lambda: failing(lambda w, n: w == "bad", tried, retries=2)  # noqa: E731
        async with running(build) as flow:
            await feed(flow, WORDS)
            await flow.send("count", "bad", key="k", headers={"h": "v"})
            await feed(flow, WORDS)
            await flow.settled()

            assert tried["bad"] == 3
            [(key, value, headers)] = flow.letters()
            assert (key, value, headers["h"]) == (b"k", b'"bad"', b"v")
            assert headers["streamd-error"] == b"RuntimeError: no bad"
            assert headers["streamd-tries"] == b"3"
            assert flow.table("counts") == Counter(WORDS * 2)
            assert Counter(flow.values("out")) == Counter(WORDS * 2)

    flow_test(test)


def test_skip_drops_the_event_and_nothing_else() -> None:
    async def test() -> None:
        tried: Counter[str] = Counter()
        build = lambda: failing(lambda w, n: w == "bad", tried, on_error="skip")  # noqa: E731
        async with running(build) as flow:
            await feed(flow, [*WORDS, "bad", *WORDS])
            await flow.settled()

            assert tried["bad"] == 1
            assert flow.letters() == []
            assert flow.table("counts") == Counter(WORDS * 2)

    flow_test(test)


def test_stop_ends_the_engine_and_the_event_is_done_after_the_mend() -> None:
    async def test() -> None:
        tried: Counter[str] = Counter()
        broken = True
        build = lambda: failing(  # noqa: E731
            lambda w, n: broken and w == "bad", tried, on_error="stop"
        )
        async with running(build) as flow:
            await feed(flow, [*WORDS, "bad", *WORDS])
            run = flow.running["count#0"].run
            await asyncio.wait([run], timeout=5)
            error = run.exception()
            assert isinstance(error, StreamdError) and error.exit_code == 78
            assert "bad" in str(error)

            broken = False
            await flow.start("count")
            await flow.settled()
            assert flow.table("counts") == Counter([*WORDS, "bad", *WORDS])

    flow_test(test)


def test_retries_wait_longer_and_longer() -> None:
    times: list[float] = []

    def build() -> App:
        app = app_of(topic_partitions=1, retry_backoff=0.05)

        @app.agent(value_type=str)
        async def work(stream: Any) -> None:
            async for _ in stream:
                times.append(asyncio.get_running_loop().time())
                raise RuntimeError

        return app

    async def test() -> None:
        async with running(build) as flow:
            await flow.send("work", "x")
            await flow.settled()

        gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
        assert len(gaps) == 3
        assert gaps[0] >= 0.05 and gaps[1] >= 0.1 and gaps[2] >= 0.2

    flow_test(test)


def test_other_partitions_go_on_while_an_event_waits_for_its_next_try() -> None:
    def build() -> App:
        app = app_of(topic_partitions=3, retry_backoff=1.0)
        out = app.topic("out", value_type=str, partitions=1)
        tries: list[int] = []

        @app.agent(value_type=str)
        async def work(stream: Any) -> None:
            async for word in stream:
                await out.send(value=word)
                if word == "bad":
                    tries.append(1)
                    if len(tries) < 2:
                        raise RuntimeError

        return app

    async def test() -> None:
        async with running(build) as flow:
            await flow.send("work", "bad", partition=0)
            await flow.send("work", "after", partition=0)
            for n in range(20):
                await flow.send("work", f"w{n}", partition=1 + n % 2)
            await eventually(lambda: len(flow.values("out")) == 20, 0.8)
            assert "after" not in flow.values("out")
            await flow.settled()
            out = flow.values("out")
            assert out.index("bad") < out.index("after")
            assert len(out) == 22

    flow_test(test)


def test_other_agents_of_the_group_lose_nothing_to_a_roll_back() -> None:
    def build() -> App:
        app = app_of(topic_partitions=2)
        seen = app.Table("seen", default=int)
        out = app.topic("out", value_type=str)
        tried: Counter[str] = Counter()

        @app.agent(value_type=str)
        async def slow(stream: Any) -> None:
            async for word in stream:
                seen[word] += 1
                await asyncio.sleep(0.003)
                seen[word] += 1
                await out.send(value=word)

        @app.agent(value_type=str)
        async def bad(stream: Any) -> None:
            async for word in stream:
                tried[word] += 1
                seen[word] += 1
                await asyncio.sleep(0)
                if tried[word] < 3:
                    raise RuntimeError(word)

        return app

    async def test() -> None:
        async with running(build) as flow:
            assert [group.name for group in flow.app.groups] == ["slow"]
            for n in range(30):
                await flow.send("slow", f"s{n}", key=f"s{n}")
                if n % 3 == 0:
                    await flow.send("bad", f"b{n}", key=f"b{n}")
            await flow.settled()

            expected = {f"s{n}": 2 for n in range(30)}
            expected |= {f"b{n}": 1 for n in range(0, 30, 3)}
            assert flow.table("seen") == expected
            assert sorted(flow.values("out")) == sorted(f"s{n}" for n in range(30))

    flow_test(test)


def test_a_failing_value_is_tried_apart_from_the_rest_of_its_list() -> None:
    def build() -> App:
        app = app_of(topic_partitions=1)
        out = app.topic("out", value_type=str, partitions=1)

        @app.agent(value_type=str)
        async def work(stream: Any) -> None:
            async for batch in stream.take(5):
                if "bad" in batch:
                    raise RuntimeError("bad")
                for word in batch:
                    await out.send(value=word)

        return app

    async def test() -> None:
        words = ["a", "b", "bad", "c", "d", "e", "f", "g", "h", "i"]
        async with running(build) as flow:
            for word in words:
                await flow.send("work", word)
            await eventually(lambda: len(flow.values("out")) == 9 or len(flow.letters()) > 1)

            assert [value for _, value, _ in flow.letters()] == [b'"bad"']
            assert flow.values("out") == [word for word in words if word != "bad"]

    flow_test(test)


@pytest.mark.parametrize(("take", "concurrency"), [(None, 1), (3, 1), (None, 3)])
def test_an_undecodable_value_is_dead_lettered_unseen(
    take: int | None, concurrency: int
) -> None:
    seen: list[int] = []

    def build() -> App:
        app = app_of(topic_partitions=1)

        @app.agent(value_type=int, concurrency=concurrency)
        async def work(stream: Any) -> None:
            if take:
                async for batch in stream.take(take, within=0.01):
                    seen.extend(batch)
            else:
                async for value in stream:
                    seen.append(value)

        return app

    async def test() -> None:
        async with running(build) as flow:
            topic = flow.topic("work").name
            rows = [b"1", b"2", b'{"x"', b"3", b"\xff\xfe", b"4", b'"5"']
            await flow.append(topic, [(b"k", row) for row in rows], headers=[("h", b"v")])
            await flow.settled()

            letters = flow.letters()
            assert [value for _, value, _ in letters] == [b'{"x"', b"\xff\xfe", b'"5"']
            assert all(key == b"k" and h["h"] == b"v" for key, _, h in letters)
            assert [h["streamd-offset"] for _, _, h in letters] == [b"2", b"4", b"6"]
            assert seen == [1, 2, 3, 4]

    flow_test(test)


def test_an_event_that_takes_too_long_fails() -> None:
    def build() -> App:
        app = app_of(topic_partitions=1)
        out = app.topic("out", value_type=str, partitions=1)

        @app.agent(value_type=str, timeout=0.05, retries=1)
        async def work(stream: Any) -> None:
            async for word in stream:
                await out.send(value=word)
                if word == "slow":
                    await asyncio.sleep(60)

        return app

    async def test() -> None:
        async with running(build) as flow:
            for word in ("a", "slow", "b"):
                await flow.send("work", word)
            await flow.settled()

            [(_, value, headers)] = flow.letters()
            assert value == b'"slow"'
            assert headers["streamd-error"] == b"TimeoutError: it took longer than 0.05 s"
            assert flow.values("out") == ["a", "b"]

    flow_test(test)


def test_an_agent_that_raises_before_any_event_is_started_again_then_stops() -> None:
    starts: list[int] = []

    def build() -> App:
        app = app_of(topic_partitions=1)

        @app.agent(value_type=str)
        async def work(stream: Any) -> None:
            starts.append(1)
            raise RuntimeError("cannot start")

        return app

    async def test() -> None:
        async with running(build) as flow:
            run = flow.running["work#0"].run
            await asyncio.wait([run], timeout=5)
            error = run.exception()
            assert isinstance(error, StreamdError) and "cannot start" in str(error)
            assert len(starts) == 4

    flow_test(test)


def test_an_agent_that_swallows_cancellation_cannot_block_a_roll_back() -> None:
    def build() -> App:
        app = app_of(topic_partitions=1)
        counts = app.Table("counts", default=int)
        tries: list[int] = []

        @app.agent(value_type=str)
        async def deaf(stream: Any) -> None:
            async for word in stream:
                try:
                    counts[word] += 1
                    await asyncio.sleep(0.02)
                except BaseException:  # noqa: B036, S110
                    continue

        @app.agent(value_type=str)
        async def bad(stream: Any) -> None:
            async for word in stream:
                counts[word] += 1
                tries.append(1)
                if len(tries) == 1:
                    raise RuntimeError

        return app

    async def test() -> None:
        async with running(build) as flow:
            for n in range(5):
                await flow.send("deaf", f"d{n}")
            await flow.send("bad", "b")
            await flow.settled(5)

            assert flow.table("counts") == {"b": 1, **{f"d{n}": 1 for n in range(5)}}

    flow_test(test)


def test_what_an_agent_started_ends_with_its_failed_try() -> None:
    left: list[str] = []

    def build() -> App:
        app = app_of(topic_partitions=1)
        counts = app.Table("counts", default=int)
        tries: list[int] = []

        @app.agent(value_type=str)
        async def work(stream: Any) -> None:
            async for word in stream:
                tries.append(1)

                async def later(word: str, number: int) -> None:
                    await asyncio.sleep(0.05)
                    left.append(word)
                    counts[word] += number

                task = asyncio.create_task(later(word, len(tries)))
                if len(tries) == 1:
                    await asyncio.sleep(0)
                    raise RuntimeError
                await task

        return app

    async def test() -> None:
        async with running(build) as flow:
            await flow.send("work", "x")
            await flow.settled()

            assert flow.table("counts") == {"x": 2}
            assert left == ["x"]

    flow_test(test)


@pytest.mark.parametrize("what", ["value", "key"])
def test_a_table_write_that_cannot_be_stored_is_its_events_error(what: str) -> None:
    def build() -> App:
        app = app_of(topic_partitions=2)
        counts = app.Table("counts")

        @app.agent(value_type=str)
        async def work(stream: Any) -> None:
            async for word in stream:
                bad = word == "bad"
                if what == "value":
                    counts[word] = object() if bad else 1
                else:
                    counts[object() if bad else word] = 1

        return app

    async def test() -> None:
        words = [f"w{n}" for n in range(50)]
        async with running(build) as flow:
            for word in [*words[:25], "bad", *words[25:]]:
                await flow.send("work", word, key=word)
            await flow.settled(10)

            assert [value for _, value, _ in flow.letters()] == [b'"bad"']
            assert flow.table("counts") == dict.fromkeys(words, 1)

    flow_test(test)


def test_a_send_to_a_partition_that_is_not_there_is_its_events_error() -> None:
    def build() -> App:
        app = app_of(topic_partitions=2)
        out = app.topic("out", value_type=str)

        @app.agent(value_type=str, retries=0)
        async def work(stream: Any) -> None:
            async for word in stream:
                await out.send(value=word, partition=9 if word == "bad" else 1)

        return app

    async def test() -> None:
        async with running(build) as flow:
            for word in ("a", "bad", "b"):
                await flow.send("work", word, partition=0)
            await flow.settled(5)

            assert [value for _, value, _ in flow.letters()] == [b'"bad"']
            assert flow.values("out") == ["a", "b"]

    flow_test(test)


def test_a_parked_event_goes_to_the_dead_letters_unseen() -> None:
    async def test() -> None:
        tried: Counter[str] = Counter()
        build = lambda: failing(lambda w, n: False, tried)  # noqa: E731
        app = failing(lambda w, n: False, tried)
        app.finalize()
        name, topic = next((a.name, a.channel) for a in app.agents.values())
        partition = topic.encode("b", "b").partition
        suspect = Suspect(name, topic.name, partition, 0, 3)
        async with running(build, groups=[]) as flow:
            await feed(flow, ["b", "b"])
            await flow.start("count", parked=(suspect,), careful=True)
            await flow.settled()

            assert tried["b"] == 1
            [(_, value, headers)] = flow.letters()
            assert value == b'"b"' and b"3 times" in headers["streamd-reason"]

    flow_test(test)


def test_a_commit_that_fails_for_a_while_loses_and_doubles_nothing() -> None:
    async def test() -> None:
        tried: Counter[str] = Counter()
        async with running(lambda: failing(lambda w, n: False, tried)) as flow:
            await feed(flow, WORDS)
            flow.broker.failing = BrokerError("the disk is full")
            await eventually(lambda: tried.total() > 0)
            await asyncio.sleep(0.15)
            flow.broker.failing = None
            await feed(flow, WORDS)
            await flow.settled()

            assert flow.table("counts") == Counter(WORDS * 2)
            assert Counter(flow.values("out")) == Counter(WORDS * 2)

    flow_test(test)


def test_an_outdated_checkpoint_is_taken_back_and_its_events_are_worked_on_again() -> None:
    async def test() -> None:
        tried: Counter[str] = Counter()
        async with running(lambda: failing(lambda w, n: False, tried)) as flow:
            await feed(flow, WORDS)
            flow.broker.failing = Outdated("its partitions went")
            await eventually(lambda: tried.total() > len(WORDS))
            flow.broker.failing = None
            await feed(flow, WORDS)
            await flow.settled()

            assert flow.table("counts") == Counter(WORDS * 2)
            assert Counter(flow.values("out")) == Counter(WORDS * 2)

    flow_test(test)


def test_a_checkpoint_that_failed_and_then_is_outdated_lets_events_be_handed_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        tried: Counter[str] = Counter()
        async with running(lambda: failing(lambda w, n: False, tried)) as flow:
            await feed(flow, WORDS)
            flow.broker.failing = BrokerError("its member was replaced")
            await eventually(lambda: "a checkpoint failed" in caplog.text)
            before = tried.total()
            flow.broker.failing = Outdated("its partitions went")
            # Without a further event there is nothing that a checkpoint could hold.
            await eventually(lambda: tried.total() > before)
            flow.broker.failing = None
            await flow.settled()

            assert flow.table("counts") == Counter(WORDS)

    flow_test(test)


def test_an_event_that_fails_while_the_disk_is_full_is_tried_again_later() -> None:
    async def test() -> None:
        tried: Counter[str] = Counter()
        async with running(lambda: failing(lambda w, n: w == "bad" and n < 2, tried)) as flow:
            flow.broker.failing = BrokerError("the disk is full")
            flow.broker.failing = None
            await feed(flow, [*WORDS, "bad", *WORDS])
            flow.broker.failing = BrokerError("the disk is full")
            await asyncio.sleep(0.2)
            flow.broker.failing = None
            await flow.settled()

            assert flow.table("counts") == Counter([*WORDS, "bad", *WORDS])

    flow_test(test)


def test_a_fenced_engine_ends_with_exit_70_and_writes_nothing() -> None:
    async def test() -> None:
        tried: Counter[str] = Counter()
        build = lambda: failing(lambda w, n: False, tried)  # noqa: E731
        async with running(build) as flow:
            old = flow.running["count#0"]
            await flow.start("count")  # claims the same partitions
            await feed(flow, WORDS)
            await asyncio.wait([old.run], timeout=5)

            error = old.run.exception()
            assert isinstance(error, Fenced) and error.exit_code == 70
            await flow.settled()
            assert flow.table("counts") == Counter(WORDS)
            assert Counter(flow.values("out")) == Counter(WORDS)

    flow_test(test)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_an_end_in_the_middle_of_retries_loses_nothing(end: str) -> None:
    async def test() -> None:
        tried: Counter[str] = Counter()
        build = lambda: failing(lambda w, n: w == "bad" and n < 4, tried, retries=9)  # noqa: E731
        async with running(build) as flow:
            await feed(flow, [*WORDS, "bad", *WORDS])
            for count in (1, 2, 3):
                await eventually(partial(lambda least: tried["bad"] >= least, count))
                await getattr(flow, end)("count")
                await flow.start("count")
            await flow.settled()

            assert flow.table("counts") == Counter([*WORDS, "bad", *WORDS])
            assert Counter(flow.values("out")) == Counter([*WORDS, "bad", *WORDS])

    flow_test(test)


def test_several_copies_of_an_agent_try_failing_events_one_at_a_time() -> None:
    def build() -> App:
        app = app_of(topic_partitions=2)
        out = app.topic("out", value_type=int, partitions=1)
        tried: Counter[int] = Counter()
        alone: list[int] = []

        @app.agent(value_type=int, concurrency=4)
        async def work(stream: Any) -> None:
            async for value in stream:
                tried[value] += 1
                retry = tried[value] > 1 and value % 10 == 0
                if retry:
                    alone.append(value)
                await asyncio.sleep(0.001)
                await out.send(value=value)
                if retry:
                    assert alone == [value]
                    alone.clear()
                elif value % 10 == 0:
                    raise RuntimeError(value)

        return app

    async def test() -> None:
        async with running(build) as flow:
            for n in range(100):
                await flow.send("work", n, partition=n % 2)
            await flow.settled()

            assert sorted(flow.values("out")) == list(range(100))
            assert flow.letters() == []

    flow_test(test)


def test_a_parked_event_stays_parked_when_another_event_is_rolled_back() -> None:
    async def test() -> None:
        tried: Counter[str] = Counter()

        def build() -> App:
            return failing(lambda w, n: w == "bad" and n < 3, tried)

        app = build()
        app.finalize()
        name, topic = next((a.name, a.channel.name) for a in app.agents.values())
        parked = (Suspect(name, topic, 0, 0, 3),)
        async with running(build, groups=[]) as flow:
            for word in ("deadly", "bad", "good"):
                await flow.send("count", word, partition=0)
            await flow.start("count", parked=parked)
            await flow.settled()
            assert tried == {"bad": 3, "good": 1}
            assert flow.table("counts") == {"bad": 1, "good": 1}
            assert [value for _, value, _ in flow.letters()] == [b'"deadly"']

    flow_test(test)


def test_a_key_that_is_not_of_its_type_goes_to_the_dead_letters() -> None:
    async def test() -> None:
        seen: list[Any] = []

        def build() -> App:
            app = app_of(topic_partitions=1)
            words = app.topic("words", key_type=int, value_type=str)

            @app.agent(words)
            async def take(stream: Any) -> None:
                async for event in stream.events():
                    seen.append((event.key, event.value))

            return app

        async with running(build) as flow:
            await flow.append("words", [(b"1", b"one"), (b"x", b"two"), (None, b"three")])
            await flow.settled()

            assert seen == [(1, "one"), (None, "three")]
            [(key, value, headers)] = flow.letters()
            assert (key, value) == (b"x", b"two")
            assert headers["streamd-reason"] == b"it cannot be decoded"
            assert headers["streamd-error"].startswith(b"its key: ")

    flow_test(test)


def test_a_log_that_is_damaged_ends_the_engine_instead_of_being_tried_again() -> None:
    async def test() -> None:
        brokers: list[Any] = []

        def damage(word: str, tries: int) -> bool:
            for broker in brokers:
                broker.failing = LogDamaged("the disk failed while it was made durable")
            return False

        async with running(lambda: failing(damage, Counter())) as flow:
            run = flow.running["count#0"].run
            brokers.append(flow.broker)
            await flow.send("count", "word", key="word")
            await asyncio.wait([run], timeout=10)

            error = run.exception()
            assert isinstance(error, LogDamaged) and error.exit_code == 78
            assert flow.values("out") == []
            brokers.clear()
            flow.broker.failing = None
            await flow.start("count")
            await flow.settled()
            assert flow.values("out") == ["word"]

    flow_test(test)
