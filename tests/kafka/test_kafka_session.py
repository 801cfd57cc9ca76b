"""What a session on Kafka promises its engine: whatever ends, each event counts once."""

import asyncio
import threading
import time
from typing import Any

import pytest
from confluent_kafka import KafkaError, Producer, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
)
from kafka_clients import unique
from kafka_sessions import (
    GUARANTEES,
    WITHIN_S,
    Place,
    positions_of,
    read,
    read_nothing,
    run,
    settled,
    values_of,
)

from streamd import failpoints
from streamd.agentproc.broker import TP, Checkpoint, Output, TableChange
from streamd.agentproc.kafka.markers import Incarnation
from streamd.agentproc.kafka.packs import index_of, position_of
from streamd.agentproc.kafka.producing import Row
from streamd.errors import BrokerError, BrokerLost, ConfigError, Fenced, Outdated

EVENTS = [10, 10, 10, 11, 12, 12]
VALUES = [b"10.0", b"10.1", b"10.2", b"11.0", b"12.0", b"12.1"]
STEPS = {
    "at_least_once": (
        "before-outputs", "after-outputs", "before-flush", "before-markers",
        "before-marker-flush", "after-markers",
    ),
    "exactly_once": (
        "before-begin", "after-begin", "after-outputs", "before-offsets", "before-commit",
        "after-commit",
    ),
}  # fmt: skip


def test_reading_goes_on_in_the_middle_of_a_pack_and_of_one_events_records(kafka: str) -> None:
    place = Place(kafka)

    async def body() -> None:
        got: list[bytes | None] = []
        for number in range(len(VALUES)):
            async with place.reader(packed=number % 2 == 0) as session:
                if not number:
                    place.sender().send(EVENTS)
                batches = await read(session, len(VALUES) - number)
                assert values_of(batches) == VALUES[number:]
                got += values_of(batches)[:1]
                await session.commit(settled(place, positions_of(batches)[0]))
                left = len(VALUES) - number - 1
                assert session.behind() == {"count": 1 if left else 0}
        async with place.reader() as session:
            await read_nothing(session)
        assert got == VALUES

    run(body)


def test_reading_begins_wherever_the_log_begins(kafka: str) -> None:
    # A partition is assigned before it is known where it is read: what the client may fetch
    # until then is a matter of chance, so it is tried several times.
    place = Place(kafka, partitions=8)
    producer = Producer({"bootstrap.servers": kafka})
    admin = AdminClient({"bootstrap.servers": kafka})

    def send() -> None:
        for partition in range(8):
            producer.produce(place.words, b"plain", partition=partition)
        producer.flush(30)

    async def body() -> None:
        async with place.reader() as session:
            send()
            await read(session, 8)
            for partition in range(8):
                await session.commit(settled(place, position_of(1), partition))
        begins = [TopicPartition(place.words, partition, 1) for partition in range(8)]
        trimmed = admin.delete_records(begins)
        assert [begin.result(30).low_watermark for begin in trimmed.values()] == [1] * 8
        for times in range(1, 7):
            async with place.reader() as session:
                send()
                assert len(values_of(await read(session, 8 * times))) == 8 * times

    run(body)


def test_plain_records_beside_packs_keep_their_place_and_are_never_dropped(kafka: str) -> None:
    place = Place(kafka)

    async def body() -> None:
        producer = Producer({"bootstrap.servers": kafka})
        async with place.reader() as session:
            for number in range(3):
                producer.produce(
                    place.words, b"plain %d" % number, b"k", 0, headers={"h": b"1"}
                )
                producer.flush(30)
                place.sender().send([1, 2, number + 3])
            batches = await read(session, 8)

        assert values_of(batches) == [
            b"plain 0", b"1.0", b"2.0", b"3.0", b"plain 1", b"4.0", b"plain 2", b"5.0",
        ]  # fmt: skip
        headers = [h for b in batches for h in b.headers or [[] for _ in b.values]]
        assert [len(each) for each in headers] == [1, 0, 0, 0, 1, 0, 1, 0]

    run(body)


def test_a_plain_record_has_its_own_key_headers_and_moment(kafka: str) -> None:
    place = Place(kafka)
    headers = [[("h", b"1")], []]

    async def body() -> None:
        async with place.reader() as session:
            await asyncio.to_thread(session.partitions_of, place.out)  # makes it
            target = TP(place.out, 0)
            output = Output(target, [b"k", None], [b"a", b"b"], [1.5, 2.25], headers)
            await session.commit(Checkpoint([output], [], {}))

    run(body)
    first, second = place.records(place.out)
    assert [each.value() for each in (first, second)] == [b"a", b"b"]
    assert (first.key(), first.headers(), first.timestamp()[1]) == (b"k", headers[0], 1500)
    assert (second.key(), second.headers(), second.timestamp()[1]) == (None, None, 2250)


def test_what_a_sender_sends_again_is_dropped_also_by_who_reads_after_a_restart(
    kafka: str,
) -> None:
    place = Place(kafka)

    async def body() -> None:
        async with place.reader() as session:
            place.sender().send([1, 2, 2, 3])
            batches = await read(session, 4)
            await session.commit(settled(place, positions_of(batches)[-1]))
            place.sender().send([2, 2, 3])
            place.sender().send([1, 2, 2, 3, 4])
            again = await read(session, 1)
            assert values_of(again) == [b"4.0"]
            # It was not settled, so it comes again, and alone.
        async with place.reader() as session:
            place.sender().send([3, 4, 5])
            batches = await read(session, 2)
            assert values_of(batches) == [b"4.0", b"5.0"]
            await session.commit(settled(place, positions_of(batches)[-1]))
            assert session.behind() == {"count": 0}

    run(body)


def test_records_of_one_partition_come_in_order_over_many_chunks(kafka: str) -> None:
    place = Place(kafka, partitions=2)

    async def body() -> None:
        senders = [place.sender(), place.sender()]
        async with place.reader() as session:
            for low in range(0, 6000, 1500):
                for partition, sender in enumerate(senders):
                    sender.send(list(range(low, low + 1500)), partition)
            batches = await read(session, 12_000)

        for partition in range(2):
            mine = [b for b in batches if b.tp.partition == partition]
            wanted = [b"%d.0" % n for n in range(6000)]
            assert values_of(mine) == wanted
            positions = [p for b in mine for p in b.positions]
            assert positions == sorted(set(positions))

    run(body)


def fetched_after(written: threading.Event) -> None:
    """Keep a poller from reading until the end is fetched too: it comes in the same chunk."""
    written.wait(30)
    time.sleep(2.0)


def write_transactions(place: Place, count: int) -> None:
    """Two records in each; every third one is aborted."""
    id = unique("transaction")
    producer = Producer({"bootstrap.servers": place.bootstrap, "transactional.id": id})
    producer.init_transactions(30)
    for number in range(count):
        producer.begin_transaction()
        for _ in range(2):
            producer.produce(place.words, b"%d" % number, partition=0)
        producer.flush(30)
        if number % 3 == 1:
            producer.abort_transaction(30)
        else:
            producer.commit_transaction(30)


def test_all_records_between_marks_of_transactions_come_and_none_of_aborted_ones(
    kafka: str,
) -> None:
    place = Place(kafka)

    async def body() -> None:
        async with place.reader() as session:
            poller = session._poller
            assert poller is not None
            written = threading.Event()
            poller._commands.append(lambda: fetched_after(written))
            await asyncio.to_thread(write_transactions, place, 12)
            written.set()
            batches = await read(session, 16)
            await session.commit(settled(place, positions_of(batches)[-1]))
            await read_nothing(session)
            assert session.behind() == {"count": 0}

        assert values_of(batches) == [b"%d" % n for n in range(12) if n % 3 != 1 for _ in "ab"]

    run(body)


def test_a_seek_gives_the_same_events_again_with_replays_dropped_as_before(kafka: str) -> None:
    place = Place(kafka)
    tp = TP(place.words, 0)

    async def body() -> None:
        async with place.reader() as session:
            place.sender().send([1, 2, 3])
            place.sender().send([2, 3, 4, 4])
            first = await read(session, 5)
            await session.commit(settled(place, positions_of(first)[3]))
            again = []
            for _ in range(3):
                session.seek(tp, positions_of(first)[3])
                again.append(values_of(await read(session, 1)))

        assert values_of(first) == [b"1.0", b"2.0", b"3.0", b"4.0", b"4.1"]
        assert index_of(positions_of(first)[3]) == 3
        assert again == [[b"4.1"]] * 3

    run(body)


def test_records_behind_lost_ones_are_refused_until_their_sender_comes_again(
    kafka: str,
) -> None:
    place = Place(kafka)

    async def body() -> None:
        async with place.reader() as session:
            sender = place.sender()
            sender.send([1, 2])
            assert values_of(await read(session, 2)) == [b"1.0", b"2.0"]
            # What is sent elsewhere is, for this partition, as if it were lost.
            tracer = sender._writer.tracer
            tracer.run(TP(place.words, 0), "split", sender.SOURCE, [3])
            sender.send([4, 5])
            await read_nothing(session)
            place.sender().send([2, 3, 4, 5, 6])
            assert values_of(await read(session, 4)) == [b"3.0", b"4.0", b"5.0", b"6.0"]

    run(body)


# Tables and crashes.


def change(rows: dict[bytes, bytes | None]) -> list[TableChange]:
    return [TableChange("counts", 0, list(rows.items()))]


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_a_crash_at_any_step_of_a_checkpoint_leaves_it_whole_or_nothing_of_it(
    kafka: str, guarantee: str
) -> None:
    place = Place(kafka, guarantee)

    async def body() -> None:
        place.broker().partitions_of(place.out)
        before: dict[bytes, bytes] = {}
        for number, step in enumerate(STEPS[guarantee]):
            async with place.reader() as session:
                if not number:
                    place.sender().send(list(range(20)))
                assert dict(await session.load("counts", 0)) == before
                batches = await read(session, 2)
                first, second = positions_of(batches)[:2]
                rows: dict[bytes, bytes | None] = {b"k": b"%d" % number, b"d": None}
                await session.commit(
                    Checkpoint([], change(rows), settled(place, first).positions)
                )
                before = {b"k": b"%d" % number}
                out = Output(TP(place.out, 0), [None], [b"%d" % number], [1.0])
                rows = {b"k": b"late", b"d": b"%d" % number, step.encode(): b"1"}
                failpoints.arm(f"kafka.{step}:1:raise")
                try:
                    with pytest.raises(failpoints.FailpointError):
                        await session.commit(
                            Checkpoint([out], change(rows), settled(place, second).positions)
                        )
                finally:
                    failpoints.arm(None)
            if step in ("after-markers", "after-commit"):
                before = {b"k": b"late", b"d": b"%d" % number, step.encode(): b"1"}
            async with place.reader() as session:
                at = session.positions["count", TP(place.words, 0)]
                if step == "before-marker-flush" and at == second:
                    before = {b"k": b"late", b"d": b"%d" % number, step.encode(): b"1"}
                assert at == (second if step.encode() in before else first)
                assert dict(await session.load("counts", 0)) == before
                assert place.last_rows() == before
                await session.commit(Checkpoint([], change(dict.fromkeys([*before, b"k"]))))
                before = {}

    run(body)


def test_the_rows_of_an_aborted_transaction_count_for_no_guarantee(kafka: str) -> None:
    place = Place(kafka, "exactly_once")
    default = Place(kafka, app_id=place.app_id)

    async def body() -> None:
        async with place.reader() as session:
            await session.commit(Checkpoint([], change({b"k": b"1"})))
            failpoints.arm("kafka.before-commit:1:raise")
            try:
                with pytest.raises(failpoints.FailpointError):
                    await session.commit(Checkpoint([], change({b"k": b"2"})))
            finally:
                failpoints.arm(None)
        async with default.reader() as session:
            assert await session.load("counts", 0) == [(b"k", b"1")]
            failpoints.arm("kafka.before-markers:1:raise")
            try:
                with pytest.raises(failpoints.FailpointError):
                    await session.commit(Checkpoint([], change({b"k": b"3", b"j": b"3"})))
            finally:
                failpoints.arm(None)
        async with place.reader() as session:
            assert await session.load("counts", 0) == [(b"k", b"1")]
        assert place.last_rows() == {b"k": b"1"}

    run(body)


def test_a_compacted_changelog_and_compacted_markers_say_the_same(kafka: str) -> None:
    place = Place(kafka)

    async def body() -> None:
        for number in range(3):
            async with place.reader() as session:
                await compact_at_once(place)
                for count in range(20):
                    rows = {b"a": b"%d" % count, b"%d" % number: b"%d" % count, b"d": None}
                    await session.commit(Checkpoint([], change(rows)))
        failpoints.arm("kafka.before-markers:1:raise")
        try:
            async with place.reader() as session:
                with pytest.raises(failpoints.FailpointError):
                    await session.commit(Checkpoint([], change({b"a": b"late", b"z": b"1"})))
        finally:
            failpoints.arm(None)
        async with asyncio.timeout(60):
            # What came late is not compacted before it is repaired: it is in the last segment.
            while len(place.records(place.markers)) > 50:
                await asyncio.sleep(0.2)
            while len(place.records(place.changelog)) > 100:
                await asyncio.sleep(0.2)
        wanted = {b"a": b"19", **{b"%d" % number: b"19" for number in range(3)}}
        async with place.reader() as session:
            assert dict(await session.load("counts", 0)) == wanted
        assert place.last_rows() == wanted

    run(body)


async def compact_at_once(place: Place) -> None:
    """Let the broker compact all but the newest moment of what the group keeps."""
    wanted = {
        "min.compaction.lag.ms": "0", "segment.ms": "100", "min.cleanable.dirty.ratio": "0.01",
    }  # fmt: skip
    admin = place.broker().admin
    for name in (place.markers, place.changelog):
        resource = ConfigResource(
            ConfigResource.Type.TOPIC,
            name,
            incremental_configs=[
                ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET)
                for key, value in wanted.items()
            ],
        )
        [altered] = admin.incremental_alter_configs([resource]).values()
        await asyncio.to_thread(altered.result, 30)


# Rivals.


def test_of_two_who_claim_a_partition_at_once_one_is_its_owner(kafka: str) -> None:
    place = Place(kafka)

    async def body() -> None:
        async with place.reader() as session:
            await session.commit(Checkpoint([], change({b"k": b"1"})))
        taken: list[object] = []

        def claim() -> None:
            try:
                taken.append(place.take().marker.incarnation)
            except Fenced as error:
                taken.append(error)

        claims = [threading.Thread(target=claim) for _ in range(3)]
        for each in claims:
            each.start()
        for each in claims:
            await asyncio.to_thread(each.join)
        last = await asyncio.to_thread(place.take)

        owners = [each for each in taken if isinstance(each, Incarnation)]
        assert owners
        assert last.marker.over == max(owners)
        assert last.rows["counts"].all == [(b"k", b"1")]

    run(body)


def test_what_an_owner_does_after_another_has_claimed_counts_for_nobody(kafka: str) -> None:
    place = Place(kafka)

    async def body() -> None:
        async with place.reader() as session:
            place.sender().send([1, 2, 3])
            batches = await read(session, 3)
            first, second, _ = positions_of(batches)
            await session.commit(
                Checkpoint([], change({b"k": b"1"}), settled(place, first).positions)
            )
            successor = await asyncio.to_thread(place.take)
            await session.commit(
                Checkpoint([], change({b"k": b"2"}), settled(place, second).positions)
            )
            third = await asyncio.to_thread(place.take)

        assert successor.rows["counts"].all == third.rows["counts"].all == [(b"k", b"1")]
        assert third.marker.over == successor.marker.incarnation
        assert third.marker.positions == {"count": {place.words: first}}
        assert place.last_rows() == {b"k": b"1"}

    run(body)


def test_a_claim_that_missed_a_checkpoint_is_made_again_from_that_checkpoint(
    kafka: str,
) -> None:
    place = Place(kafka)

    async def body() -> None:
        async with place.reader() as session:
            await session.commit(Checkpoint([], change({b"k": b"1"})))
            recovery = place.recovery()
            loop = asyncio.get_running_loop()
            written: list[list[Row]] = []
            put = recovery._put

            def put_late(rows: list[Row]) -> None:
                if any(row.topic == place.markers and row.value for row in rows):
                    if not written:
                        late = session.commit(Checkpoint([], change({b"k": b"2"})))
                        asyncio.run_coroutine_threadsafe(late, loop).result(30)
                    written.append(rows)
                put(rows)

            recovery._put = put_late
            taken = (await asyncio.to_thread(recovery.take, [0]))[0]
            recovery.close()

        assert len(written) == 2
        assert taken.rows["counts"].all == [(b"k", b"2")]
        assert place.last_rows() == {b"k": b"2"}

    run(body)


def test_an_owner_ends_when_somebody_else_has_written_to_its_changelog(kafka: str) -> None:
    place = Place(kafka)

    async def body() -> None:
        async with place.reader() as session:
            await session.commit(Checkpoint([], change({b"k": b"1"})))
            foreign = Row(place.changelog, 0, b"k", b"\0" * 12 + b"9")
            await asyncio.to_thread(place.write, [foreign])
            with pytest.raises(Fenced, match="another process has written to"):
                for number in range(2, 100):
                    await session.commit(Checkpoint([], change({b"j": b"%d" % number})))
                    await asyncio.sleep(0.05)
        async with place.reader() as session:
            assert dict(await session.load("counts", 0))[b"k"] == b"1"
        assert place.last_rows()[b"k"] == b"1"

    run(body)


def test_a_transaction_that_was_open_at_the_claim_is_waited_for(kafka: str) -> None:
    # The cluster ends one that is open for longer than a session.
    place = Place(kafka, "exactly_once", session_s=30.0)

    async def body() -> None:
        async with place.reader() as session:
            place.sender().send([1, 2])
            batches = await read(session, 2)
            first, second = positions_of(batches)
            await session.commit(
                Checkpoint([], change({b"k": b"1"}), settled(place, first).positions)
            )
            loop = asyncio.get_running_loop()
            open_, go_on = asyncio.Event(), threading.Event()
            writer = session._writer
            assert writer is not None and writer._transactions is not None
            calling = writer._transactions._call

            def call_late(call: Any, *arguments: object) -> None:
                if call == writer._producer.commit_transaction:
                    loop.call_soon_threadsafe(open_.set)
                    go_on.wait(20)
                calling(call, *arguments)

            writer._transactions._call = call_late  # type: ignore[method-assign]
            late = asyncio.ensure_future(
                session.commit(
                    Checkpoint([], change({b"k": b"2"}), settled(place, second).positions)
                )
            )
            await open_.wait()
            claim = asyncio.ensure_future(asyncio.to_thread(place.take))
            await asyncio.wait([claim], timeout=0.5)
            assert not claim.done()
            go_on.set()
            await late
            taken = await claim

        assert taken.rows["counts"].all == [(b"k", b"2")]
        assert taken.marker.positions == {"count": {place.words: second}}

    run(body)


def test_what_is_committed_in_a_changelog_later_than_in_the_markers_is_waited_for(
    kafka: str,
) -> None:
    place = Place(kafka, "exactly_once")

    async def body() -> None:
        async with place.reader() as session:
            await session.commit(Checkpoint([], change({b"k": b"1"})))
        late = Producer({"bootstrap.servers": kafka, "transactional.id": place.app_id})
        late.init_transactions(30)
        late.begin_transaction()
        late.produce(place.changelog, b"\0" * 12 + b"9", b"j", 0)
        assert late.flush(30) == 0
        taking = asyncio.ensure_future(asyncio.to_thread(place.take))
        await asyncio.wait([taking], timeout=1.0)
        assert not taking.done()
        late.commit_transaction(30)
        await taking

        assert place.last_rows() == {b"k": b"1"}

    run(body)


def test_a_member_that_comes_again_fences_the_process_before_it(kafka: str) -> None:
    place = Place(kafka)

    async def body() -> None:
        async with place.reader() as before:
            async with place.reader() as session:
                await session.commit(Checkpoint([], change({b"k": b"2"})))
                with pytest.raises(BrokerLost, match="fenced"):
                    async with asyncio.timeout(30):
                        await before.poll(10)
                assert place.last_rows() == {b"k": b"2"}

    run(body)


def test_a_member_that_is_fenced_after_an_outage_joins_its_group_anew(kafka: str) -> None:
    place = Place(kafka)

    async def body() -> None:
        async with place.reader() as before:
            before._broker.health.on_error(KafkaError(KafkaError._TRANSPORT))
            generation = before.generation
            async with place.reader() as session:
                await session.commit(Checkpoint([], change({b"k": b"1"})))
            async with asyncio.timeout(WITHIN_S):
                # What it had is lost, and comes anew.
                while before.generation < generation + 2:
                    await asyncio.sleep(0.02)
            place.sender().send([1])
            batches = await read(before, 1)
            checkpoint = settled(place, positions_of(batches)[-1])
            checkpoint.changes += change({b"k": b"2"})
            await before.commit(checkpoint)

        assert dict(place.take().rows["counts"].all) == {b"k": b"2"}

    run(body)


def test_after_a_transaction_that_the_cluster_ended_a_session_goes_on_with_what_counts(
    kafka: str,
) -> None:
    place = Place(kafka, "exactly_once")

    async def body() -> None:
        async with place.reader() as session:
            place.sender().send([1, 2])
            batches = await read(session, 2)
            first, second = positions_of(batches)
            await session.commit(
                Checkpoint([], change({b"k": b"1"}), settled(place, first).positions)
            )
            writer = session._writer
            assert writer is not None and writer._transactions is not None
            calling = writer._transactions._call

            def call_late(call: Any, *arguments: object) -> None:
                if call == writer._producer.commit_transaction:
                    time.sleep(4)  # twice as long as one may be open
                calling(call, *arguments)

            writer._transactions._call = call_late  # type: ignore[method-assign]
            late = Checkpoint([], change({b"k": b"2"}), settled(place, second).positions)
            with pytest.raises(Outdated):
                await session.commit(late)
            writer._transactions._call = calling  # type: ignore[method-assign]
            with pytest.raises(Outdated, match="not this process's any more"):
                await session.commit(late)
            again = await read(session, 1)
            assert positions_of(again) == [second]
            assert await session.load("counts", 0) == [(b"k", b"1")]
            await session.commit(late)
        assert place.take().rows["counts"].all == [(b"k", b"2")]

    run(body)


def test_who_has_closed_does_not_answer_for_what_it_had(kafka: str) -> None:
    place = Place(kafka)

    async def body() -> None:
        async with place.reader() as session:
            assert session.is_sure()
        assert not session.is_sure()

    run(body)


# What is refused.


def test_a_topic_that_was_trimmed_is_not_read_by_a_group_that_lost_its_markers(
    kafka: str,
) -> None:
    place = Place(kafka)

    async def body() -> None:
        async with place.reader() as session:
            place.sender().send([1])
            place.sender().send([2])
            await read(session, 2)
        admin = place.broker().admin
        [deleted] = admin.delete_records([TopicPartition(place.words, 0, 1)]).values()
        await asyncio.to_thread(deleted.result, 30)
        other = Place(kafka)
        other.words = place.words
        subscription = other.subscription
        subscription.agents["count"][:] = [place.words]
        with pytest.raises(ConfigError, match="begins at offset 1"):
            async with asyncio.timeout(30):
                async with other.reader():
                    raise AssertionError("it was opened")

    run(body)


def test_a_record_that_says_it_is_a_pack_and_is_none_is_named(kafka: str) -> None:
    place = Place(kafka)

    async def body() -> None:
        async with place.reader() as session:
            producer = Producer({"bootstrap.servers": kafka})
            producer.produce(
                place.words, b"no pack", partition=0, headers=[("streamd-pack", b"2")]
            )
            producer.flush(30)
            with pytest.raises(BrokerError, match=r"\[0\]@0 says that it is a pack"):
                async with asyncio.timeout(30):
                    await session.poll(10)

    run(body)
