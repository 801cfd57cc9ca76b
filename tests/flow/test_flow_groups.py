"""A group's work side by side: the barrier, views, tasks, ends."""

import asyncio
import gc
import time
from collections import Counter
from typing import Any

import pytest
from flowing import app_of, eventually, flow_test, running

from streamd.agentproc.pending import RolledBack
from streamd.agentproc.runs import Run
from streamd.agents import AgentFailed
from streamd.app import App
from streamd.errors import BrokerError, TableError
from streamd.partition import partition_for


def counting(**options: Any) -> App:
    app = app_of(topic_partitions=4, **options)
    counts = app.Table("counts", default=int)
    out = app.topic("out", value_type=str)
    tried: Counter[str] = Counter()

    @app.agent(value_type=str)
    async def count(stream: Any) -> None:
        async for word in stream:
            counts[word] += 1
            await out.send(key=word, value=word)
            await asyncio.sleep(0)
            tried[word] += 1
            if word.startswith("bad") and tried[word] < 2:
                raise RuntimeError(word)

    return app


def test_what_a_view_writes_goes_where_each_key_hashes_to() -> None:
    async def test() -> None:
        async with running(counting) as flow:

            async def view(app: App) -> int:
                counts = app.tables["counts"]
                for n in range(20):
                    counts[f"k{n}"] += 1
                await asyncio.sleep(0)
                for n in range(20):
                    counts[f"k{n}"] += 1
                return sum(counts.values())

            assert await flow.perform("count", view) == 40
            for partition, part in flow.parts("counts").items():
                for key, value in part.items():
                    assert value == 2
                    assert partition_for(key.encode(), 4) == partition

            await flow.send("count", "k3", key="k3")
            await flow.settled()
            assert flow.table("counts")["k3"] == 3

    flow_test(test)


def test_a_view_that_writes_a_key_of_another_process_gets_an_error_and_leaves_nothing() -> None:
    async def test() -> None:
        async with running(counting, slots={"count": 2}) as flow:

            async def view(app: App) -> None:
                counts = app.tables["counts"]
                for n in range(20):
                    counts[f"k{n}"] = 1
                await asyncio.sleep(0)

            with pytest.raises(TableError, match="which another process holds"):
                await flow.perform("count", view)
            await flow.engine("count").pending.durable()
            assert flow.table("counts") == {}
            assert flow.running["count#0"].run.done() is False

    flow_test(test)


def test_a_view_learns_of_a_foreign_key_where_it_waits() -> None:
    async def test() -> None:
        async with running(counting, slots={"count": 2}) as flow:
            cleaned: list[str] = []

            async def view(app: App) -> str:
                counts = app.tables["counts"]
                try:
                    for n in range(20):
                        counts[f"k{n}"] = 1
                    await asyncio.sleep(0)
                except TableError:
                    cleaned.append("cleaned")
                    return "refused"
                return "done"

            assert await flow.perform("count", view) == "refused"
            assert cleaned == ["cleaned"]
            assert flow.table("counts") == {}

    flow_test(test)


def test_a_view_that_raises_leaves_nothing() -> None:
    async def test() -> None:
        async with running(counting) as flow:
            await flow.send("count", "a", key="a")
            await flow.settled()

            async def view(app: App) -> None:
                app.tables["counts"]["a"] += 10
                await app.topics["out"].send(value="from the view")
                await asyncio.sleep(0.03)
                app.tables["counts"]["a"] += 10
                raise ValueError("view")

            with pytest.raises(ValueError, match="view"):
                await flow.perform("count", view)
            await flow.send("count", "a", key="a")
            await flow.settled()
            assert flow.table("counts") == {"a": 2}
            assert flow.values("out") == ["a", "a"]

    flow_test(test)


def test_a_view_that_wrote_is_told_of_a_roll_back() -> None:
    async def test() -> None:
        async with running(counting) as flow:

            async def view(app: App) -> None:
                app.tables["counts"]["v"] += 1
                await flow.send("count", "bad", key="bad")
                await asyncio.sleep(5)

            with pytest.raises(RolledBack):
                await flow.perform("count", view)
            await flow.settled()
            assert flow.table("counts") == {"bad": 1}

    flow_test(test)


def test_a_view_that_swallows_its_cancellation_is_told_as_well() -> None:
    async def test() -> None:
        async with running(counting) as flow:

            async def view(app: App) -> str:
                app.tables["counts"]["v"] += 1
                await flow.send("count", "bad", key="bad")
                try:
                    await asyncio.sleep(5)
                except asyncio.CancelledError:
                    app.tables["counts"]["v"] += 1
                return "done"

            with pytest.raises(RolledBack):
                await flow.perform("count", view)
            await flow.settled()
            assert flow.table("counts") == {"bad": 1}

    flow_test(test)


def test_a_task_that_only_sends_loses_and_doubles_nothing_to_a_roll_back() -> None:
    async def test() -> None:
        async with running(counting) as flow:

            async def task(app: App) -> None:
                out = app.topics["out"]
                for n in range(60):
                    sent = await out.send(value=f"t{n}")
                    if n % 7 == 0:
                        await sent
                    if n % 20 == 10:
                        await flow.send("count", f"bad{n}", key="bad")
                    await asyncio.sleep(0.001)

            await flow.perform("count", task, whole=False)
            await flow.settled()
            sent = [value for value in flow.values("out") if value.startswith("t")]
            assert sorted(sent) == sorted(f"t{n}" for n in range(60))

    flow_test(test)


def test_a_task_that_writes_is_durable_stretch_by_stretch() -> None:
    async def test() -> None:
        async with running(counting) as flow:
            gate = asyncio.Event()

            async def task(app: App) -> None:
                app.tables["counts"]["a"] += 1
                await asyncio.sleep(0)
                app.tables["counts"]["b"] += 1
                await gate.wait()

            running_task = asyncio.create_task(flow.perform("count", task, whole=False))
            await eventually(lambda: flow.table("counts") == {"a": 1, "b": 1})
            await flow.send("count", "c", key="c")
            await eventually(lambda: "c" in flow.table("counts"))
            gate.set()
            await running_task

    flow_test(test)


def test_a_view_that_wrote_does_not_stop_when_the_group_is_told_to() -> None:
    async def test() -> None:
        async with running(counting) as flow:
            gate = asyncio.Event()

            async def view(app: App) -> str:
                app.tables["counts"]["a"] += 1
                await gate.wait()
                app.tables["counts"]["b"] += 1
                return "done"

            request = asyncio.create_task(flow.perform("count", view))
            await asyncio.sleep(0.02)
            stop = asyncio.create_task(flow.stop("count"))
            await asyncio.sleep(0.05)
            gate.set()
            await stop
            assert await request == "done"
            assert flow.table("counts") == {"a": 1, "b": 1}

    flow_test(test)


def two_agents(tables: bool) -> App:
    """A slow agent and a fast one in one group."""
    app = app_of(topic_partitions=1)
    out = app.topic("out", value_type=str, partitions=1)
    if tables:
        counts = app.Table("counts", default=int)

        def note(word: str) -> None:
            counts[word] += 1

    @app.agent(value_type=str, group="both")
    async def slow(stream: Any) -> None:
        async for word in stream:
            if tables:
                note(word)
            await asyncio.sleep(0.5)

    @app.agent(value_type=str, group="both")
    async def fast(stream: Any) -> None:
        async for word in stream:
            await out.send(value=word)

    return app


def test_a_long_event_delays_the_checkpoints_of_a_group_with_tables() -> None:
    async def test() -> None:
        async with running(lambda: two_agents(True)) as flow:
            await flow.send("slow", "s")
            await asyncio.sleep(0.05)
            began = time.monotonic()
            await flow.send("fast", "f")
            await eventually(lambda: flow.values("out") == ["f"])
            assert 0.2 < time.monotonic() - began < 2
            await flow.settled()
            assert flow.table("counts") == {"s": 1}

    flow_test(test)


def test_a_long_event_delays_nobody_in_a_group_without_tables() -> None:
    async def test() -> None:
        async with running(lambda: two_agents(False)) as flow:
            await flow.send("slow", "s")
            await asyncio.sleep(0.05)
            began = time.monotonic()
            for n in range(3):
                await flow.send("fast", f"f{n}")
                await eventually(lambda n=n: len(flow.values("out")) == n + 1)  # type: ignore[misc]
            assert time.monotonic() - began < 0.4
            await flow.settled()

    flow_test(test)


def asked_while_busy(fails: int) -> App:
    """An agent that asks another of its group, which fails at first."""
    app = app_of(topic_partitions=1, retries=2, reply_timeout=3)
    counts = app.Table("counts", default=int)
    tried: list[int] = []

    @app.agent(value_type=int)
    async def outer(stream: Any) -> None:
        async for value in stream:
            counts["outer"] += 1
            counts["replies"] += await inner.ask(value)

    @app.agent(value_type=int)
    async def inner(stream: Any) -> Any:
        async for value in stream:
            counts["inner"] += 1
            tried.append(value)
            await asyncio.sleep(0)
            if len(tried) <= fails:
                raise RuntimeError(value)
            yield value

    return app


def test_an_asked_agent_of_the_group_may_fail_first() -> None:
    async def test() -> None:
        async with running(lambda: asked_while_busy(1)) as flow:
            await flow.send("outer", 5)
            await flow.settled(8)

            counts = flow.table("counts")
            # The request is sent outside the checkpoint: once for each try of the asker.
            assert counts["outer"] == 1 and counts["replies"] == 5
            assert counts["inner"] >= 1
            assert flow.letters() == []

    flow_test(test)


def test_an_asked_agent_of_the_group_that_gives_up_fails_its_asker() -> None:
    async def test() -> None:
        async with running(lambda: asked_while_busy(10**6)) as flow:
            await flow.send("outer", 5)
            await flow.settled(15)

            assert flow.table("counts") == {}
            errors = [headers["streamd-error"] for _, _, headers in flow.letters()]
            assert any(AgentFailed.__name__.encode() in error for error in errors)

    flow_test(test)


def test_groups_that_ask_each_other_in_a_circle_end() -> None:
    def build() -> App:
        app = app_of(topic_partitions=1, reply_timeout=5)
        counts = app.Table("counts", default=int)

        @app.agent(value_type=int)
        async def first(stream: Any) -> None:
            async for value in stream:
                counts["first"] += await second.ask(value)

        @app.agent(value_type=int)
        async def second(stream: Any) -> Any:
            async for value in stream:
                yield await third.ask(value)

        @app.agent(value_type=int)
        async def third(stream: Any) -> Any:
            async for value in stream:
                counts["third"] += 1
                yield value

        return app

    async def test() -> None:
        async with running(build) as flow:
            assert sorted(g.name for g in flow.app.groups) == ["first", "second"]
            for _ in range(3):
                await flow.send("first", 2)
                # Something is due, so that a checkpoint waits while `first` asks.
                asyncio.create_task(flow.engine("first").pending.durable()).add_done_callback(
                    lambda task: task.cancelled() or task.exception()
                )
            await flow.settled(15)
            assert flow.table("counts") == {"first": 6, "third": 3}
            assert flow.letters() == []

    flow_test(test)


def test_asking_all_the_time_starves_no_checkpoint() -> None:
    def build() -> App:
        app = app_of(topic_partitions=1)
        counts = app.Table("counts", default=int)

        @app.agent(value_type=int, concurrency=4)
        async def client(stream: Any) -> None:
            async for value in stream:
                reply = await helper.ask(value)
                counts["asked"] += reply

        @app.agent(value_type=int)
        async def helper(stream: Any) -> Any:
            async for value in stream:
                yield value

        @app.agent(value_type=int)
        async def other(stream: Any) -> None:
            async for _ in stream:
                counts["other"] += 1
                await asyncio.sleep(0)

        return app

    async def test() -> None:
        async with running(build) as flow:
            began = time.monotonic()
            for _ in range(2000):
                await flow.send("client", 1)
                await flow.send("other", 1)
            await flow.settled()
            took_s = time.monotonic() - began
            assert flow.table("counts") == {"asked": 2000, "other": 2000}
            assert flow.engine("client").statistics().checkpoints > took_s / 0.1

    flow_test(test)


def test_an_engine_may_be_stopped_and_aborted_in_the_middle_of_a_roll_back() -> None:
    def build() -> App:
        app = app_of(topic_partitions=1)
        counts = app.Table("counts", default=int)
        tried: list[int] = []

        @app.agent(value_type=str)
        async def work(stream: Any) -> None:
            async for word in stream:
                counts[word] += 1
                tried.append(1)
                try:
                    await asyncio.sleep(0.001)
                finally:
                    await asyncio.sleep(0.05)  # a roll-back waits for it
                if len(tried) < 3:
                    raise RuntimeError

        @app.agent(value_type=str)
        async def other(stream: Any) -> None:
            async for word in stream:
                counts[word] += 1
                try:
                    await asyncio.sleep(0.2)
                finally:
                    await asyncio.sleep(0.05)

        return app

    async def test() -> None:
        async with running(build) as flow:
            await flow.send("other", "o")
            await flow.send("work", "w")
            await eventually(lambda: not flow.engine("work").gate.steady.is_set())
            flow.engine("work").stop()
            flow.engine("work").stop()
            await flow.running.pop("work#0").run
            await flow.start("work")
            await flow.send("work", "w")
            await eventually(lambda: not flow.engine("work").gate.steady.is_set(), 3)
            await flow.kill("work")
            await flow.start("work")
            await flow.settled()
            assert flow.table("counts") == {"o": 1, "w": 2}

    # Its own counter of tries is new in each engine's app: each fails twice.
    flow_test(test)


def test_a_view_that_writes_while_a_failed_event_is_taken_back_is_whole_or_gone() -> None:
    def build() -> App:
        app = app_of(topic_partitions=1)
        counts = app.Table("counts", default=int)
        app.topic("out", value_type=int)
        failed: list[str] = []

        @app.agent(value_type=str)
        async def work(stream: Any) -> None:
            async for word in stream:
                counts[word] += 1
                failed.append(word)
                if len(failed) < 2:
                    raise RuntimeError(word)

        @app.agent(value_type=str)
        async def other(stream: Any) -> None:
            async for word in stream:
                counts[word] += 1
                try:
                    await asyncio.sleep(0.1)
                finally:
                    await asyncio.sleep(0.05)  # a roll-back waits for it

        return app

    async def view(app: App) -> None:
        app.tables["counts"]["views"] += 1
        await app.topics["out"].send(value=app.tables["counts"]["views"])
        await asyncio.sleep(0.1)

    async def test() -> None:
        async with running(build) as flow:
            await flow.send("other", "o")
            await flow.send("work", "w")
            await eventually(lambda: not flow.engine("work").gate.steady.is_set())
            with pytest.raises(RolledBack):
                await flow.perform("work", view)
            await flow.perform("work", view)
            await flow.settled()
            assert flow.table("counts") == {"o": 1, "w": 1, "views": 1}
            assert flow.values("out") == [1]

    flow_test(test)


def test_errands_wait_for_a_commit_that_fails_for_a_while() -> None:
    async def test() -> None:
        async with running(counting) as flow:

            async def view(app: App) -> str:
                app.tables["counts"]["a"] = 1
                return "done"

            flow.broker.failing = BrokerError("the disk is full")
            request = asyncio.create_task(flow.perform("count", view))
            await asyncio.sleep(0.05)
            assert not request.done()
            flow.broker.failing = None
            assert await request == "done"
            assert flow.table("counts") == {"a": 1}

    flow_test(test)


def test_what_was_settled_is_let_go() -> None:
    def build() -> App:
        app = app_of(topic_partitions=1)

        @app.agent(value_type=str)
        async def work(stream: Any) -> None:
            async for _ in stream:
                await asyncio.sleep(0)

        return app

    def runs() -> int:
        gc.collect()
        return sum(isinstance(thing, Run) for thing in gc.get_objects())

    async def test() -> None:
        before = runs()
        async with running(build) as flow:
            topic = flow.topic("work").name
            for _ in range(5):
                await flow.append(topic, [(None, b'"x"')] * 3000)
                await flow.settled()

            assert runs() <= before

    flow_test(test)
