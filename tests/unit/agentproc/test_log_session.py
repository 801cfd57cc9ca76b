"""What every broker promises the engine, asked of the embedded log and of memory alike."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from streamd.agentproc.broker import TP, Batch, Checkpoint, Output, Subscription, TableChange
from streamd.agentproc.broker.embedded import EmbeddedBroker, EmbeddedSession
from streamd.agentproc.broker.memory import MemoryBroker, MemorySession
from streamd.errors import BrokerError, ConfigError, Fenced
from streamd.wire import TableInfo, TopicInfo

AnyBroker = EmbeddedBroker | MemoryBroker
AnySession = EmbeddedSession | MemorySession
Body = Callable[[AnyBroker], Awaitable[None]]


@pytest.fixture(params=["embedded", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[Body], None]]:
    def run_body(body: Body) -> None:
        async def main() -> None:
            broker: AnyBroker = (
                EmbeddedBroker(tmp_path, tmp_path, default_partitions=2)
                if request.param == "embedded"
                else MemoryBroker(default_partitions=2)
            )
            try:
                async with asyncio.timeout(20):
                    await body(broker)
            finally:
                await broker.close()

        asyncio.run(main())

    yield run_body


def topic(name: str, partitions: int) -> TopicInfo:
    return TopicInfo(name, partitions, False, None, "", "")


def subscription(slot: int = 0, slots: int = 1, group: str = "g") -> Subscription:
    return Subscription("app", group, slot, slots, {f"{group}.agent": ["t"]}, {"counts": 2})


def numbers(tp: TP, first: int, count: int) -> Output:
    values: list[bytes | None] = [b"%d" % n for n in range(first, first + count)]
    return Output(tp, [b"k"] * count, values, [1.5] * count)


async def opened(broker: AnyBroker, slot: int = 0, slots: int = 1) -> AnySession:
    session = broker.session(subscription(slot, slots))
    await session.open()
    return session


async def read(session: AnySession, count: int, max_events: int = 100) -> list[Batch]:
    batches: list[Batch] = []
    while sum(len(batch.values) for batch in batches) < count:
        batches += await session.poll(max_events)
    return batches


def test_what_is_appended_is_read_in_order(run: Callable[[Body], None]) -> None:
    async def body(broker: AnyBroker) -> None:
        session = await opened(broker)
        tp = TP("t", 0)

        firsts = await session.append([numbers(tp, 0, 3), numbers(tp, 3, 2)])
        batches = await read(session, 5)

        assert firsts == [0, 3]
        assert [value for batch in batches for value in batch.values] == [
            b"0", b"1", b"2", b"3", b"4",
        ]  # fmt: skip
        assert [list(batch.positions) for batch in batches] == [[0, 1, 2, 3, 4]]
        assert batches[0].end == 5
        assert batches[0].timestamps == [1.5] * 5
        assert batches[0].headers is None

    run(body)


def test_headers_null_keys_and_times_come_back_as_they_were(
    run: Callable[[Body], None],
) -> None:
    async def body(broker: AnyBroker) -> None:
        session = await opened(broker)
        tp = TP("t", 1)
        plain = Output(tp, [None], [None], [3.25])
        rich = Output(tp, [b"", b"k"], [b"v", b""], [7.0, 5.5], [[("h", b"1")], []])

        await session.append([plain])
        await session.append([rich])
        (batch,) = await read(session, 3)

        assert batch.keys == [None, b"", b"k"]
        assert batch.values == [None, b"v", b""]
        assert batch.timestamps == [3.25, 7.0, 5.5]
        assert batch.headers == [[], [("h", b"1")], []]

    run(body)


def test_a_checkpoint_moves_outputs_tables_and_positions_together(
    run: Callable[[Body], None],
) -> None:
    async def body(broker: AnyBroker) -> None:
        session = await opened(broker)
        tp = TP("t", 0)
        await session.append([numbers(tp, 0, 4)])

        await session.commit(
            Checkpoint(
                outputs=[numbers(TP("t", 1), 0, 2)],
                changes=[TableChange("counts", 0, [(b"a", b"1"), (b"b", b"2")])],
                positions={("g.agent", tp): 3},
            )
        )
        await session.commit(Checkpoint(changes=[TableChange("counts", 0, [(b"a", None)])]))

        assert session.positions["g.agent", tp] == 3
        assert session.behind() == {"g.agent": 3}
        again = await opened(broker)
        assert again.positions == {("g.agent", tp): 3, ("g.agent", TP("t", 1)): 0}
        assert await again.load("counts", 0) == [(b"b", b"2")]
        assert await again.load("counts", 1) == []

    run(body)


def test_a_checkpoint_with_a_mistake_leaves_nothing_behind(
    run: Callable[[Body], None],
) -> None:
    async def body(broker: AnyBroker) -> None:
        session = await opened(broker)
        good = numbers(TP("t", 0), 0, 3)

        with pytest.raises(BrokerError, match="partitions 0 to 1, not 7"):
            await session.commit(Checkpoint(outputs=[good, numbers(TP("t", 7), 0, 1)]))
        with pytest.raises(BrokerError, match="no table 'other'"):
            await session.commit(
                Checkpoint(outputs=[good], changes=[TableChange("other", 0, [(b"a", b"1")])])
            )

        assert session.behind() == {"g.agent": 0}

    run(body)


def test_who_lost_a_partition_can_commit_no_more(run: Callable[[Body], None]) -> None:
    async def body(broker: AnyBroker) -> None:
        zombie = await opened(broker)
        heir = await opened(broker)

        with pytest.raises(Fenced, match="nothing was written"):
            await zombie.commit(
                Checkpoint(
                    outputs=[numbers(TP("t", 0), 0, 3)],
                    changes=[TableChange("counts", 0, [(b"a", b"1")])],
                    positions={("g.agent", TP("t", 0)): 9},
                )
            )

        assert heir.generation > zombie.generation
        assert heir.behind() == {"g.agent": 0}
        assert await heir.load("counts", 0) == []
        assert (await opened(broker)).positions["g.agent", TP("t", 0)] == 0

    run(body)


def test_slots_share_the_partitions_and_fence_only_what_they_take(
    run: Callable[[Body], None],
) -> None:
    async def body(broker: AnyBroker) -> None:
        one = await opened(broker, 0, 2)
        two = await opened(broker, 1, 2)

        await one.commit(Checkpoint(positions={("g.agent", TP("t", 0)): 0}))
        await two.commit(Checkpoint(positions={("g.agent", TP("t", 1)): 0}))
        await opened(broker, 1, 2)

        assert (one.partitions, two.partitions) == ([0], [1])
        await one.commit(Checkpoint(positions={("g.agent", TP("t", 0)): 0}))
        with pytest.raises(Fenced):
            await two.commit(Checkpoint(positions={("g.agent", TP("t", 1)): 0}))

    run(body)


def test_a_slot_without_partitions_commits_what_needs_none(
    run: Callable[[Body], None],
) -> None:
    async def body(broker: AnyBroker) -> None:
        await opened(broker, 0, 3)
        idle = await opened(broker, 2, 3)

        await idle.commit(Checkpoint(outputs=[numbers(TP("t", 0), 0, 1)]))

        assert idle.partitions == []

    run(body)


def test_a_second_agent_of_a_topic_begins_at_its_own_position(
    run: Callable[[Body], None],
) -> None:
    async def body(broker: AnyBroker) -> None:
        first = await opened(broker)
        await first.append([numbers(TP("t", 0), 0, 5)])
        await first.commit(Checkpoint(positions={("g.agent", TP("t", 0)): 4}))

        both = broker.session(
            Subscription("app", "g", 0, 1, {"g.agent": ["t"], "new": ["t"]}, {"counts": 2})
        )
        await both.open()

        assert both.positions["g.agent", TP("t", 0)] == 4
        assert both.positions["new", TP("t", 0)] == 0
        assert [batch.positions[0] for batch in await read(both, 5)] == [0]

    run(body)


@pytest.mark.parametrize(("reset", "offset"), [("earliest", 0), ("latest", 5)])
def test_an_agent_without_a_position_begins_where_it_is_told(
    run: Callable[[Body], None], reset: str, offset: int
) -> None:
    async def body(broker: AnyBroker) -> None:
        sender = broker.session(Subscription("app", "s", 0, 1, {}, {}))
        await sender.append([numbers(TP("t", 0), 0, 5)])
        begins = Subscription("app", "g", 0, 1, {"a": ["t"]}, {}, {"t": reset})
        for _ in range(2):
            session = broker.session(begins)
            await session.open()
            assert session.positions["a", TP("t", 0)] == offset
            await session.close()
            # What comes after the first time is to be read, though nothing was settled.
            await sender.append([numbers(TP("t", 0), 5, 1)])

    run(body)


def test_an_agent_that_must_have_a_position_is_refused_without_one(
    run: Callable[[Body], None],
) -> None:
    async def body(broker: AnyBroker) -> None:
        sender = broker.session(Subscription("app", "s", 0, 1, {}, {}))
        await sender.append([numbers(TP("t", 0), 0, 5)])
        session = broker.session(
            Subscription("app", "g", 0, 1, {"a": ["t"]}, {}, {"t": "error"})
        )

        with pytest.raises(ConfigError, match=r"agent 'a' has no position in t\[0\]"):
            await session.open()

    run(body)


def test_seek_reads_again_from_the_middle(run: Callable[[Body], None]) -> None:
    async def body(broker: AnyBroker) -> None:
        session = await opened(broker)
        tp = TP("t", 0)
        await session.append([numbers(tp, 0, 10)])
        await read(session, 10)

        session.seek(tp, 7)
        (batch,) = await session.poll(100)

        assert list(batch.positions) == [7, 8, 9]
        assert batch.values == [b"7", b"8", b"9"]

    run(body)


def test_a_chunk_has_one_batch_a_partition_and_serves_all_in_turn(
    run: Callable[[Body], None],
) -> None:
    async def body(broker: AnyBroker) -> None:
        await broker.declare([topic("t", 4)], [], [])
        session = broker.session(Subscription("app", "g", 0, 1, {"a": ["t"]}, {}))
        await session.open()
        for round in range(6):
            await session.append([numbers(TP("t", p), round * 50, 50) for p in range(4)])

        chunks = [await session.poll(100) for _ in range(12)]

        for chunk in chunks:
            assert len({batch.tp for batch in chunk}) == len(chunk)
        early = {batch.tp.partition for chunk in chunks[:4] for batch in chunk}
        assert early == {0, 1, 2, 3}
        assert sum(len(batch.values) for chunk in chunks for batch in chunk) == 1200

    run(body)


def test_a_waiting_poll_is_woken_and_a_cancelled_one_loses_nothing(
    run: Callable[[Body], None],
) -> None:
    async def body(broker: AnyBroker) -> None:
        session = await opened(broker)
        waiting = asyncio.create_task(session.poll(10))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

        waits_s = []
        for n in range(20):
            poll = asyncio.create_task(session.poll(10))
            await asyncio.sleep(0)
            at = time.perf_counter()
            await session.append([numbers(TP("t", 0), n, 1)])
            (batch,) = await poll
            waits_s.append(time.perf_counter() - at)
            assert batch.values == [b"%d" % n]

        # The safety poll alone would take 50 ms at the median.
        assert sorted(waits_s)[10] < 0.03

    run(body)


def test_a_topic_that_is_not_there_is_made(run: Callable[[Body], None]) -> None:
    async def body(broker: AnyBroker) -> None:
        session = await opened(broker)

        assert session.partitions_of("t") == 2
        assert session.partitions_of("fresh") == 2
        assert await session.append([numbers(TP("fresh", 1), 0, 1)]) == [0]
        assert await session.append([numbers(TP("fresher", 1), 0, 1)]) == [0]

    run(body)


def test_the_number_of_partitions_cannot_change(run: Callable[[Body], None]) -> None:
    async def body(broker: AnyBroker) -> None:
        table = TableInfo("counts", "g", 4, "", "", "", "", "")
        await broker.declare([topic("t", 4)], [table], [])
        await broker.declare([topic("t", 4)], [table], [])

        with pytest.raises(ConfigError, match="topic 't' has 4 partitions in the log"):
            await broker.declare([topic("new", 1), topic("t", 5)], [], [])
        with pytest.raises(ConfigError, match="table 'counts' has 4 partitions"):
            await broker.session(subscription()).open()

    run(body)


def test_an_append_of_many_events_is_cut_and_read_whole(run: Callable[[Body], None]) -> None:
    async def body(broker: AnyBroker) -> None:
        session = await opened(broker)
        tp = TP("t", 0)
        large = Output(tp, [None] * 30, [bytes(60_000)] * 30, [1.0] * 30)

        firsts = await session.append([numbers(tp, 0, 2500), large, numbers(tp, 9, 1)])
        batches = await read(session, 2531, 700)

        assert firsts == [0, 2500, 2530]
        values = [value for batch in batches for value in batch.values]
        assert values[:2500] == [b"%d" % n for n in range(2500)]
        assert values[2500:] == [bytes(60_000)] * 30 + [b"9"]

    run(body)


def test_an_append_with_columns_of_different_length_is_refused(
    run: Callable[[Body], None],
) -> None:
    async def body(broker: AnyBroker) -> None:
        session = await opened(broker)

        with pytest.raises(ValueError, match="columns"):
            await session.append([Output(TP("t", 0), [None], [b"1", b"2"], [1.0, 1.0])])

        assert session.behind() == {"g.agent": 0}

    run(body)


def test_a_closed_session_lets_its_successor_claim(run: Callable[[Body], None]) -> None:
    async def body(broker: AnyBroker) -> None:
        first = await opened(broker)
        await first.append([numbers(TP("t", 0), 0, 2)])
        await first.commit(Checkpoint(positions={("g.agent", TP("t", 0)): 1}))
        await first.close()
        await first.close()

        second = await opened(broker)

        assert [batch.values for batch in await second.poll(10)] == [[b"1"]]

    run(body)


def test_many_rows_are_written_and_deleted(run: Callable[[Body], None]) -> None:
    async def body(broker: AnyBroker) -> None:
        session = await opened(broker)
        rows: list[tuple[bytes, bytes | None]] = [(b"%06d" % n, b"v") for n in range(25_000)]

        await session.commit(Checkpoint(changes=[TableChange("counts", 1, rows)]))
        gone: list[tuple[bytes, bytes | None]] = [(key, None) for key, _ in rows[:1100]]
        await session.commit(Checkpoint(changes=[TableChange("counts", 1, gone)]))

        assert await session.load("counts", 1) == rows[1100:]

    run(body)
