"""Sending, asking, sinks, and copies of an agent that work side by side."""

import asyncio
import json
import logging
from collections import Counter
from typing import Any

import pytest
from flowing import app_of, eventually, flow_test, running

from streamd.agents import AgentFailed
from streamd.app import App
from streamd.context import RecordMetadata
from streamd.errors import BrokerError, ReplyTimeout, StreamdError


def test_copies_of_an_agent_store_only_the_settled_prefix() -> None:
    gates = {n: asyncio.Event() for n in range(5)}

    def build() -> App:
        app = app_of(topic_partitions=1)
        out = app.topic("out", value_type=int, partitions=1)

        @app.agent(value_type=int, concurrency=5)
        async def work(stream: Any) -> None:
            async for value in stream:
                await out.send(value=value)
                await gates[value].wait()
                await out.send(value=value + 10)

        return app

    async def test() -> None:
        async with running(build) as flow:
            engine = flow.engine("work")
            [(agent, tp)] = engine.pending.positions
            for n in range(5):
                await flow.send("work", n)
            for n in (4, 2, 1):
                gates[n].set()
            await eventually(lambda: engine.statistics().events[agent] == 3)
            await engine.pending.durable(urgent=False)
            assert engine.pending.positions[agent, tp] == 0
            assert flow.values("out") == []

            gates[0].set()
            await eventually(lambda: len(flow.values("out")) == 6)
            assert engine.session.positions[agent, tp] == 3
            assert flow.values("out") == [0, 10, 1, 11, 2, 12]

            gates[3].set()
            await flow.settled()
            assert flow.values("out") == [n + d for n in range(5) for d in (0, 10)]

    flow_test(test)


def test_handing_out_pauses_where_too_much_is_held_back() -> None:
    gate = asyncio.Event()
    begun: list[int] = []

    def build() -> App:
        app = app_of(topic_partitions=1)

        @app.agent(value_type=int, concurrency=3)
        async def work(stream: Any) -> None:
            async for value in stream:
                begun.append(value)
                if value == 0:
                    await gate.wait()

        return app

    async def test() -> None:
        async with running(build) as flow:
            name = flow.topic("work").name
            await flow.append(name, [(None, str(n).encode()) for n in range(50_000)])
            await eventually(lambda: len(begun) > 1000)
            seen = -1
            while seen != len(begun):
                seen = len(begun)
                await asyncio.sleep(0.1)
            assert seen < 20_000
            gate.set()
            await flow.settled()
            assert sorted(begun) == list(range(50_000))

    flow_test(test)


def test_awaiting_a_send_twice() -> None:
    seen: list[RecordMetadata] = []

    def build() -> App:
        app = app_of(topic_partitions=2)
        counts = app.Table("counts", default=int)
        out = app.topic("out", value_type=str)

        @app.agent(value_type=str)
        async def work(stream: Any) -> None:
            async for word in stream:
                counts[word] += 1
                seen.append(await (await out.send(key="k", value=word)))

        return app

    async def test() -> None:
        async with running(build) as flow:
            await flow.send("work", "x")
            await flow.settled()
            assert seen == [RecordMetadata("out", seen[0].partition, None, 0.0)]

            async def outside_of_agents(app: App) -> None:
                out = app.topics["out"]
                await (await out.send(key="k", value="durable"))
                assert "durable" in flow.values("out")
                app.tables["counts"]["k"] = 1
                await (await out.send(key="k", value="after a write"))
                assert "after a write" not in flow.values("out")

            await flow.perform("work", outside_of_agents)
            assert "after a write" in flow.values("out")

    flow_test(test)


def test_a_send_takes_key_partition_timestamp_headers_and_serializers() -> None:
    def build() -> App:
        app = app_of(topic_partitions=4)
        out = app.topic("out", key_type=str)

        @app.agent(value_type=str)
        async def work(stream: Any) -> None:
            async for word in stream:
                await out.send(key="k", value=[word], partition=3, timestamp=12.5,
                               headers={"a": "text", "b": b"\xff"})  # fmt: skip
                await out.send(key=b"raw", value=b"bytes", partition=3,
                               key_serializer="raw", value_serializer="raw")  # fmt: skip
                out.send_soon(key="k", value=1, partition=3, headers=[("h", "1"), ("h", "2")])
                await out.send(key="only", partition=3)

        return app

    async def test() -> None:
        seen = []
        async with running(build) as flow:
            await flow.send("work", "x")
            await flow.settled()
            log = flow.broker._topics["out"][3]
            seen = list(zip(log.keys, log.values, log.headers, strict=True))
            assert log.timestamps[0] == 12.5

        assert seen == [
            (b"k", b'["x"]', [("a", b"text"), ("b", b"\xff")]),
            (b"raw", b"bytes", []),
            (b"k", b"1", [("h", b"1"), ("h", b"2")]),
            (b"only", None, []),
        ]

    flow_test(test)


def test_headers_that_are_no_text_fail_the_send_and_leave_no_record() -> None:
    def build() -> App:
        app = app_of(topic_partitions=1)
        out = app.topic("out", value_type=str)

        @app.agent(value_type=str)
        async def work(stream: Any) -> None:
            async for word in stream:
                refused: list[Any] = [{"n": 5}, {"n": None}, [("n",)]]
                for headers in refused:
                    try:
                        await out.send(value=word, headers=headers)
                    except Exception:
                        await out.send(value="refused")

        return app

    async def test() -> None:
        async with running(build) as flow:
            await flow.send("work", "x")
            await flow.settled()

            assert flow.values("out") == ["refused"] * 3

    flow_test(test)


def test_forward_keeps_bytes_and_headers_and_send_encodes_anew() -> None:
    def build() -> App:
        app = app_of(topic_partitions=1)
        out = app.topic("out", key_serializer="json", value_serializer="msgpack")

        @app.agent(app.topic("in", value_type=int, key_type=str))
        async def work(stream: Any) -> None:
            async for event in stream.events():
                await event.forward(out)
                await event.send(out)
                await event.forward(out, value=5)

        return app

    async def test() -> None:
        async with running(build) as flow:
            await flow.append("in", [(b"k", b" 7 ")], headers=[("h", b"1"), ("h", b"2")])
            await flow.settled()
            log = flow.broker._topics["out"][0]

            assert log.keys == [b"k", b'"k"', b"k"]
            assert log.values == [b" 7 ", b"\x07", b"\x05"]
            assert log.headers[0] == [("h", b"1"), ("h", b"2")]

    flow_test(test)


def test_records_without_key_go_with_their_event() -> None:
    def build() -> App:
        app = app_of(topic_partitions=4)
        out = app.topic("out", value_type=int)

        @app.agent(app.topic("in", value_type=int))
        async def work(stream: Any) -> None:
            async for value in stream:
                await out.send(value=value)
                out.send_soon(value=value)

        return app

    async def test() -> None:
        async with running(build) as flow:
            for n in range(40):
                await flow.send("in", n, partition=n % 4)
            await flow.settled()

            assert Counter(flow.values("out")) == Counter([*range(40)] * 2)
            assert len({partition for partition, _, _ in flow.broker.events("out")}) > 1

    flow_test(test)


def test_callbacks_are_called_once_the_record_is_durable_and_may_fail(
    caplog: pytest.LogCaptureFixture,
) -> None:
    called: list[Any] = []
    gate = asyncio.Event()

    def build() -> App:
        app = app_of(topic_partitions=1)
        out = app.topic("out", value_type=str, partitions=1)
        tries: list[int] = []

        async def later(metadata: RecordMetadata) -> None:
            called.append(metadata.topic)
            raise ValueError("later")

        def now(metadata: RecordMetadata) -> None:
            called.append(metadata.topic)
            raise ValueError("now")

        @app.agent(value_type=str)
        async def work(stream: Any) -> None:
            async for word in stream:
                tries.append(1)
                await out.send(value=word, callback=now)
                out.send_soon(value=word, callback=later)
                await gate.wait()
                if len(tries) == 1:
                    raise RuntimeError

        @app.agent(value_type=str, group="work")
        async def other(stream: Any) -> None:
            async for _ in stream:
                pass

        return app

    async def test() -> None:
        async with running(build) as flow:
            await flow.send("work", "x")
            await flow.send("other", "y")
            await flow.engine("work").pending.durable()
            await flow.engine("work").pending.durable()
            assert called == []
            gate.set()
            await flow.settled()
            await eventually(lambda: len(called) == 2)

        assert called == ["out", "out"]

    with caplog.at_level(logging.ERROR):
        flow_test(test)
    assert "callback" in caplog.text


def asking(**options: Any) -> App:
    """A group that asks another, one that asks itself, and one that only gives errors."""
    app = app_of(topic_partitions=2, reply_timeout=5, **options)
    counts = app.Table("counts", default=int)
    out = app.topic("out", value_type=int)

    @app.agent(value_type=int)
    async def double(stream: Any) -> Any:
        async for value in stream:
            await asyncio.sleep(0)
            yield value * 2

    @app.agent(value_type=int, retries=1)
    async def fail(stream: Any) -> Any:
        async for value in stream:
            if value < 0:
                raise ValueError(value)
            yield value

    @app.agent(value_type=int)
    async def silent(stream: Any) -> None:
        async for _ in stream:
            pass

    @app.agent(value_type=int)
    async def client(stream: Any) -> None:
        async for value in stream:
            await out.send(value=await double.ask(value, key=str(value)))

    @app.agent(value_type=int)
    async def outer(stream: Any) -> None:
        async for value in stream:
            counts["before"] += 1
            reply = await inner.ask(value, key="k")
            counts["after"] += reply

    @app.agent(value_type=int)
    async def inner(stream: Any) -> Any:
        async for value in stream:
            counts["inner"] += 1
            await asyncio.sleep(0.001)
            yield value

    return app


@pytest.mark.parametrize("alone", [False, True])
def test_an_agent_asks_an_agent_of_another_group(alone: bool) -> None:
    async def test() -> None:
        async with running(asking, alone=alone) as flow:
            for n in range(20):
                await flow.send("client", n)
            await flow.settled()

            assert sorted(flow.values("out")) == [2 * n for n in range(20)]

    flow_test(test)


@pytest.mark.parametrize("alone", [False, True])
def test_asking_inside_a_group_with_a_table_is_no_deadlock(alone: bool) -> None:
    async def test() -> None:
        async with running(asking, alone=alone) as flow:
            for _ in range(30):
                await flow.send("outer", 1, key="k")
            await flow.settled(5)

            parts = flow.parts("counts").values()
            total: Counter[str] = Counter()
            for part in parts:
                total.update(part)
            assert total == {"before": 30, "inner": 30, "after": 30}
            assert flow.letters() == []

    flow_test(test)


def test_views_and_tasks_ask() -> None:
    async def test() -> None:
        async with running(asking) as flow:

            async def view(app: App) -> list[Any]:
                agents = {agent.label: agent for agent in app.agents.values()}
                table = app.tables["counts"]
                double = agents["double"]
                one = await double.ask(4)
                joined = await double.join([1, 2, 3])
                mapped = sorted([reply async for reply in double.map([5, 6])])
                promise = await double.ask_nowait(8)
                inner_before = await agents["inner"].ask(5, key="k")
                table["view"] = 1
                inner_after = await agents["inner"].ask(7, key="k")
                return [one, joined, mapped, await promise, inner_before, inner_after]

            for whole in (True, False):
                answer = await asyncio.wait_for(flow.perform("outer", view, whole), 5)
                assert answer == [8, [2, 4, 6], [10, 12], 16, 5, 7]

    flow_test(test)


def test_an_ask_that_is_not_answered_times_out() -> None:
    async def test() -> None:
        async with running(asking) as flow:

            async def view(app: App) -> None:
                agents = {agent.label: agent for agent in app.agents.values()}
                with pytest.raises(ReplyTimeout, match="silent") as caught:
                    await agents["silent"].ask(1, timeout=0.05)
                assert "it yields nothing" in str(caught.value.remedy)
                assert not (await app.replies())._waiting

            await flow.perform("app", view)

    flow_test(test)


@pytest.mark.parametrize("policy", ["retry", "skip"])
def test_who_asks_an_agent_that_gives_up_is_told(policy: str) -> None:
    async def test() -> None:
        async with running(lambda: asking(on_error=policy)) as flow:

            async def view(app: App) -> None:
                agents = {agent.label: agent for agent in app.agents.values()}
                with pytest.raises(AgentFailed, match="ValueError: -1"):
                    await agents["fail"].ask(-1, timeout=3)
                assert await agents["fail"].ask(3) == 3

            await flow.perform("app", view)

    flow_test(test)


def test_a_promise_that_nobody_awaits_is_forgotten() -> None:
    async def test() -> None:
        async with running(asking) as flow:

            async def view(app: App) -> None:
                agents = {agent.label: agent for agent in app.agents.values()}
                await agents["fail"].ask_nowait(-1)
                await agents["double"].ask_nowait(1)
                replies = await app.replies()
                await eventually(lambda: not replies._waiting, 5)

            await flow.perform("app", view)

    flow_test(test)


def test_leaving_a_map_early_leaves_no_ask_behind() -> None:
    async def test() -> None:
        async with running(asking) as flow:

            async def view(app: App) -> None:
                agents = {agent.label: agent for agent in app.agents.values()}
                async for _ in agents["double"].map([1, 2, 3]):
                    break
                with pytest.raises(AgentFailed):
                    async for _ in agents["fail"].map([-1, -2, -3]):
                        pass
                replies = await app.replies()
                await eventually(lambda: not replies._waiting, 5)

            await flow.perform("app", view)

    flow_test(test)


@pytest.mark.parametrize("header", [b"\xff\xfe", b"x"])
def test_reply_headers_that_are_no_text_harm_nobody(header: bytes) -> None:
    async def test() -> None:
        async with running(asking) as flow:
            headers = [("Faust-Ag-ReplyTo", b"replies"), ("Faust-Ag-CorrelationId", header)]
            await flow.append(flow.topic("double").name, [(None, b"1")], headers=headers)
            await flow.append(flow.topic("fail").name, [(None, b"-1")], headers=headers)
            await flow.settled(5)

            replies = [json.loads(v) for _, _, v in flow.broker.events("replies") if v]
            assert sorted(str(r["value"]) for r in replies) == ["2", "None"]

    flow_test(test)


def test_what_is_yielded_goes_to_every_sink() -> None:
    called: list[Any] = []

    def build() -> App:
        app = app_of(topic_partitions=1)
        out = app.topic("out", value_type=int, partitions=1)

        @app.agent(value_type=int)
        async def following(stream: Any) -> None:
            async for value in stream:
                called.append(("agent", value))

        def plain(value: int) -> None:
            called.append(("function", value))

        async def slow(value: int) -> None:
            await asyncio.sleep(0)
            called.append(("async", value))

        @app.agent(value_type=int, sink=[out, plain, slow, following])
        async def work(stream: Any) -> Any:
            async for value in stream:
                yield value
                yield -value

        return app

    async def test() -> None:
        async with running(build) as flow:
            await flow.send("work", 1)
            await flow.send("work", 2)
            await flow.settled()

            assert flow.values("out") == [1, -1, 2, -2]

        for kind in ("function", "async", "agent"):
            assert [value for sink, value in called if sink == kind] == [1, -1, 2, -2]

    flow_test(test)


def test_cast_sends_and_wants_no_reply() -> None:
    async def test() -> None:
        async with running(asking) as flow:

            async def view(app: App) -> None:
                agents = {agent.label: agent for agent in app.agents.values()}
                await agents["inner"].cast(1, key="k")

            await flow.perform("app", view)
            await flow.settled()
            assert sum(p.get("inner", 0) for p in flow.parts("counts").values()) == 1

    flow_test(test)


def test_a_task_that_sends_much_is_slowed_and_loses_nothing() -> None:
    async def test() -> None:
        async with running(asking) as flow:
            most = 0

            async def task(app: App) -> None:
                nonlocal most
                out = app.topics["out"]
                for n in range(200_000):
                    await out.send(value=n)
                    if n % 1000 == 0:
                        engine = flow.engine("app")
                        lanes = [
                            errand.lanes for errand in engine.errands
                        ] + engine.pending.outbox
                        most = max(most, sum(len(lane.keys) for one in lanes
                                             for lane in one["out"].values()))  # fmt: skip

            await flow.perform("app", task, whole=False)
            assert len(flow.values("out")) == 200_000
            assert most <= 60_000

    flow_test(test)


def test_sending_where_nothing_runs_names_the_cure() -> None:
    async def test() -> None:
        app = asking()
        app.finalize()
        with pytest.raises(StreamdError, match="outside of a running app"):
            await app.topics["out"].send(value=1)
        with pytest.raises(StreamdError, match="outside of a running app"):
            app.topics["out"].send_soon(value=1)

    flow_test(test)


def test_an_ask_that_cannot_be_sent_fails_the_event_not_the_engine() -> None:
    async def test() -> None:
        async with running(asking) as flow:
            await flow.send("client", 1)
            await flow.settled()
            await flow.send("client", 2)
            flow.broker.failing = BrokerError("the disk is full")
            await asyncio.sleep(0.03)
            flow.broker.failing = None
            await flow.settled()

            assert sorted(flow.values("out")) in ([2, 4], [2])
            assert len(flow.values("out")) + len(flow.letters()) == 2

    flow_test(test)
