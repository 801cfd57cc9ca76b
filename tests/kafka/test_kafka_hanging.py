"""Transactions that an outage left without a mark are ended as they were decided."""

import asyncio
import dataclasses
import functools
from collections.abc import Iterator

import msgspec
import pytest
from kafka_hanging import hang, unverified
from kafka_sessions import (
    Place,
    positions_of,
    read,
    read_nothing,
    run,
    settled,
    values_of,
)

from streamd.agentproc.broker import Checkpoint, TableChange
from streamd.agentproc.kafka.markers import encode_marker, marker_key


@pytest.fixture(autouse=True)
def with_unverified(kafka: str) -> Iterator[None]:
    """The broker takes records of transactions that it knows nothing of."""
    with unverified(kafka):
        yield


@pytest.mark.parametrize("commits", [False, True])
def test_a_checkpoint_without_its_marks_counts_as_it_was_decided(
    kafka: str, commits: bool
) -> None:
    place = Place(kafka, "exactly_once")

    async def body() -> None:
        async with place.reader() as session:
            place.sender().send([1, 2])
            first, second = positions_of(await read(session, 2))
            rows = [TableChange("counts", 0, [(b"k", b"1")])]
            await session.commit(Checkpoint([], rows, settled(place, first).positions))
            marker, id = session._markers[0], session._member_id()
        late = msgspec.structs.replace(
            marker, number=marker.number + 1, positions={"count": {place.words: second}}
        )
        row = late.incarnation.stamp(late.number) + b"2"
        key = marker_key(late.incarnation)
        leave = functools.partial(hang, kafka, id, commits=commits)
        await asyncio.to_thread(leave, (place.changelog, 0), b"k", row)
        await asyncio.to_thread(leave, (place.markers, 0), key, encode_marker(late))
        async with place.reader() as session:
            assert dict(await session.load("counts", 0)) == {b"k": b"2" if commits else b"1"}
            if not commits:
                assert values_of(await read(session, 1)) == [b"2.0"]
            await read_nothing(session)
        assert place.last_rows() == {b"k": b"2" if commits else b"1"}

    run(body)


def test_a_marker_of_a_checkpoint_that_was_aborted_never_comes_to_count(kafka: str) -> None:
    place = Place(kafka, "exactly_once")

    async def body() -> None:
        async with place.reader() as session:
            place.sender().send([1, 2])
            first, second = positions_of(await read(session, 2))
            await session.commit(settled(place, first))
            marker, id = session._markers[0], session._member_id()
        late = msgspec.structs.replace(
            marker, number=marker.number + 1, positions={"count": {place.words: second}}
        )
        key, value = marker_key(late.incarnation), encode_marker(late)
        await asyncio.to_thread(hang, kafka, id, (place.markers, 0), key, value, commits=False)
        async with place.reader() as session:
            assert values_of(await read(session, 1)) == [b"2.0"]

    run(body)


def test_after_an_outage_a_session_marks_what_it_sent_though_it_has_nothing_to_write(
    kafka: str,
) -> None:
    place = Place(kafka, "exactly_once")

    async def body() -> None:
        async with place.reader() as session:
            id = session._member_id()
            await asyncio.to_thread(session.partitions_of, place.out)  # it is made
            await asyncio.to_thread(
                hang, kafka, id, (place.words, 0), b"k", b"committed", commits=True
            )
            await asyncio.to_thread(
                hang, kafka, id, (place.out, 0), b"k", b"aborted", commits=False
            )
            session._broker.health.outages += 1
            assert values_of(await read(session, 1)) == [b"committed"]
            await read_nothing(session)
            # Its producer is another one: the one before was fenced.
            await session.commit(Checkpoint([], [TableChange("counts", 0, [(b"k", b"1")])]))
        assert place.records(place.out) == []
        assert place.last_rows() == {b"k": b"1"}

    run(body)


def test_a_process_waits_until_another_one_has_marked_what_it_left(kafka: str) -> None:
    place = Place(kafka, "exactly_once")
    one = dataclasses.replace(place.subscription, slots=2)
    two = dataclasses.replace(one, slot=1)

    async def body() -> None:
        async with place.reader(subscription=two) as session:
            await session.commit(Checkpoint([], [TableChange("counts", 0, [(b"k", b"1")])]))
            row, id = session._markers[0].incarnation.stamp(9) + b"2", session._member_id()
        await asyncio.to_thread(hang, kafka, id, (place.changelog, 0), b"k", row, commits=False)
        broker = place.broker()
        waiting = broker.session(one)
        opening = asyncio.ensure_future(waiting.open())
        try:
            async with asyncio.timeout(30):
                while "find-hanging" not in broker.waits_for:
                    await asyncio.sleep(0.05)
            assert not opening.done()
            async with place.reader(subscription=two):
                await opening
                assert dict(await waiting.load("counts", 0)) == {b"k": b"1"}
        finally:
            opening.cancel()
            await broker.close()

    run(body)
