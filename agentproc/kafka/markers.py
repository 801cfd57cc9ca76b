"""Markers: up to where everything counts that a group did on Kafka.

A group has one compacted topic of markers, with as many partitions as its topics. A checkpoint
first makes outputs and changed rows durable; then one marker for each partition says: what
this incarnation wrote up to checkpoint `number` counts, these are the positions to read on
from, and these the highs of what was dropped below them. So one record commits a partition
whole, whatever the group's tables are, and a crash before it leaves nothing behind.

An incarnation is one owner's time with one partition. It begins with a claim, which says from
which marker it goes on; the highest counts. The order of the log decides between an owner and
who takes over: a marker that comes after the claim is nothing, a claim that comes after a
marker that it does not know of is nothing. Markers have their incarnation as key, so that
compaction never keeps a late one of an owner that is no more in place of the owner's.
"""

import os
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from streamd.agentproc.kafka.sources import Highs

STAMP_BYTES = 12


class Incarnation(NamedTuple):
    """One owner's time with one partition of a group; ordered."""

    epoch: int
    luck: int  # tells owners apart that took over at the same moment

    def successor(self) -> "Incarnation":
        """That of whoever takes over."""
        return Incarnation(self.epoch + 1, int.from_bytes(os.urandom(4), "big"))

    def stamp(self, number: int) -> bytes:
        """What is put before a row's value: who wrote it, in which checkpoint. 12 bytes."""
        return (
            self.epoch.to_bytes(4, "big")
            + self.luck.to_bytes(4, "big")
            + number.to_bytes(4, "big")
        )


NOBODY = Incarnation(0, 0)


class Marker(msgspec.Struct, array_like=True):
    """What counts of one partition of a group. Fields may only be added, with defaults."""

    incarnation: Incarnation
    number: int  # of the last checkpoint that counts
    starts: dict[str, int]  # changelog -> offset from which only this incarnation's rows count
    positions: dict[str, dict[str, int]]  # agent -> topic -> the position to read on from
    highs: dict[str, list[tuple[str, str, str, int, int, int]]]  # topic -> origin and place
    resets: int = 0  # raised by each `reset`: what is sent anew is no replay
    moment: float = 0.0  # unix seconds
    over: Incarnation = NOBODY  # whom this one took over from,
    over_number: int = 0  # after which checkpoint
    topics: dict[str, str] = {}  # source or changelog -> its id at the claim


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Marker).decode


def marker_key(incarnation: Incarnation) -> bytes:
    """The key under which the markers of an incarnation are compacted (pure)."""
    return b"m" + incarnation.stamp(0)[:8]


def encode_marker(marker: Marker) -> bytes:
    """As bytes (pure)."""
    return _encode(marker)


def decode_marker(data: bytes) -> Marker:
    """From bytes (pure).

    Raises:
        msgspec.DecodeError: They are no marker.
    """
    return _decode(data)


class Newest:
    """The marker that counts of a partition, as they come in the order of the log.

    Attributes:
        marker: The one that counts of those that were added.
    """

    def __init__(self) -> None:
        self.marker = Marker(NOBODY, 0, {}, {}, {})
        self._numbers: dict[Incarnation, int] = {}

    def add(self, marker: Marker) -> None:
        """The next one."""
        if not marker.number and self._numbers.get(marker.over, 0) > marker.over_number:
            return  # a claim over what was no more as it says
        self._numbers[marker.incarnation] = marker.number
        if marker.incarnation >= self.marker.incarnation:
            self.marker = marker


def newest(markers: Iterable[Marker]) -> Marker:
    """The one that counts, of all of a partition in the order of the log (pure)."""
    found = Newest()
    for marker in markers:
        found.add(marker)
    return found.marker


def counts(data: bytes, offset: int, marker: Marker, start: int) -> bool:
    """Does a changelog's value count, by its stamp and place? (pure)"""
    if offset < start:
        return True
    return data[:8] == marker.incarnation.stamp(0)[:8] and (
        int.from_bytes(data[8:STAMP_BYTES], "big") <= marker.number
    )


def pack_highs(highs: Highs) -> list[tuple[str, str, str, int, int, int]]:
    """Highs as a marker holds them (pure)."""
    return [(*origin, *place) for origin, place in highs.items()]


def unpack_highs(rows: list[tuple[str, str, str, int, int, int]]) -> Highs:
    """Highs from a marker (pure)."""
    return {(agent, generation, topic, partition): (position, part)
            for agent, generation, topic, partition, position, part in rows}  # fmt: skip
