"""Packs on Kafka: events of one partition as one record, for the topics that the app owns.

The value is one msgpack array `[keys, values, timestamps, headers, runs]`, the columns of
`streamd.agentproc.broker.pack` and the runs of `sources`. A record header names the format and
holds the count, so that lag can be told without opening a pack.

A position is `offset << INDEX_BITS | index in the pack`; a plain record is a pack of one.
"""

import itertools
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import msgspec

from streamd.agentproc.broker import INDEX_BITS, TP, Headers, Output
from streamd.agentproc.broker.pack import MAX_PACK_BYTES, MAX_PACK_EVENTS
from streamd.agentproc.kafka.sources import Run, Tracer
from streamd.errors import BrokerError

PACK_HEADER = "streamd-pack"


class Columns(msgspec.Struct, array_like=True):
    """The events of a pack, column by column."""

    keys: list[bytes | None] | None
    values: list[bytes | None]
    timestamps: float | bytes
    headers: list[Headers] | None
    runs: list[Run] | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Columns).decode


def position_of(offset: int, index: int = 0) -> int:
    """The position of an event (pure)."""
    return offset << INDEX_BITS | index


def offset_of(position: int) -> int:
    """The offset of the record that holds an event (pure)."""
    return position >> INDEX_BITS


def index_of(position: int) -> int:
    """The index of an event in its pack (pure)."""
    return position & ((1 << INDEX_BITS) - 1)


def count_header(count: int) -> list[tuple[str, bytes]]:
    """The record headers of a pack of `count` events (pure)."""
    return [(PACK_HEADER, b"%d" % count)]


def packed_count(headers: Headers | None) -> int:
    """How many events a record holds by its headers; 0: it is a plain record (pure)."""
    for name, value in headers or ():
        if name == PACK_HEADER and value is not None:
            return int(value) if value.isdigit() else 0
    return 0


def no_events() -> bytes:
    """A pack that is empty (pure)."""
    return _encode(Columns(None, [], 0.0, None))


def open_pack(data: bytes, tp: TP, offset: int) -> Columns:
    """The columns of a pack, of one length.

    Raises:
        BrokerError: It is none.
    """
    try:
        columns = _decode(data)
    except msgspec.DecodeError as error:
        raise _no_pack(tp, offset, str(error)) from None
    count = len(columns.values)
    if columns.keys is None:
        columns.keys = [None] * count
    if not count == len(columns.keys) <= MAX_PACK_EVENTS:
        raise _no_pack(tp, offset, f"{len(columns.keys)} keys and {count} values")
    if columns.runs is not None and sum(run.count for run in columns.runs) != count:
        raise _no_pack(tp, offset, f"its runs do not cover its {count} events")
    return columns


def stamps_of(columns: Columns) -> list[float]:
    """The timestamp of each event, unix seconds (pure)."""
    if isinstance(columns.timestamps, bytes):
        return array("d", columns.timestamps).tolist()
    return [columns.timestamps] * len(columns.values)


def _no_pack(tp: TP, offset: int, why: str) -> BrokerError:
    return BrokerError(
        f"the record at {tp}@{offset} says that it is a pack of events, and is none: {why}",
        remedy=f"find who writes to {tp.topic!r}; only streamd sets the header {PACK_HEADER!r}",
    )


def cut(output: Output, tracer: Tracer) -> Iterator[tuple[int, bytes]]:
    """Cut an output into packs: (count, data) in order.

    Each holds at most 1,000 events and, unless a single event is larger, about 256 KiB, and
    whole events only: what was sent for one event is in one pack, unless it alone is more.
    """
    for piece, part in _pieces(output):
        start, end = piece
        runs = _runs(output, start, end, part, tracer)
        keys = output.keys[start:end]
        stamps = output.timestamps[start:end]
        headers = output.headers[start:end] if output.headers is not None else None
        alike = stamps.count(stamps[0]) == len(stamps)
        yield (
            end - start,
            _encode(
                (
                    keys if any(keys) or keys.count(None) < len(keys) else None,
                    output.values[start:end],
                    stamps[0] if alike else array("d", stamps).tobytes(),
                    headers if headers and any(headers) else None,
                    runs,
                )
            ),
        )


def _pieces(output: Output) -> Iterator[tuple[tuple[int, int], int]]:
    """Slices of an output that make a pack each, and their part of an event, 0 mostly."""
    count = len(output.values)
    may_cut = _cuts(output)
    start = 0
    while start < count:
        end = min(start + MAX_PACK_EVENTS, count)
        while end - start > 1 and _size(output, start, end) > MAX_PACK_BYTES:
            end = start + (end - start) // 2
        whole = end
        while start < whole < count and not may_cut(whole):
            whole -= 1
        if whole > start:
            yield (start, whole), 0
            start = whole
            continue
        while end < count and not may_cut(end):
            end += 1
        yield from _parts(output, start, end)
        start = end


def _parts(output: Output, start: int, stop: int) -> Iterator[tuple[tuple[int, int], int]]:
    """One event's records alone, cut where their sizes say, so the same at each try."""
    part = 0
    while start < stop:
        end, size = start, 0
        while end < stop and end - start < MAX_PACK_EVENTS:
            size += _size(output, end, end + 1)
            if size > MAX_PACK_BYTES and end > start:
                break
            end += 1
        yield (start, end), part
        start, part = end, part + 1


def _size(output: Output, start: int, end: int) -> int:
    return _bytes_of(output.values[start:end]) + _bytes_of(output.keys[start:end])


def _bytes_of(column: list[bytes | None]) -> int:
    try:
        # To join them is quicker than to ask each for its length.
        return len(b"".join(cast(list[bytes], column)))
    except TypeError:
        return sum(map(len, filter(None, column)))


def _cuts(output: Output) -> Callable[[int], bool]:
    """Tells whether a pack may begin with a record: whether another event's do."""
    segments = output.sources
    if segments is None:
        return lambda index: True
    ends = list(itertools.accumulate(segment.count for segment in segments))

    def may_cut(index: int) -> bool:
        at = bisect_right(ends, index)
        positions = segments[at].positions
        inside = index - (ends[at - 1] if at else 0)
        return inside == 0 or positions is None or positions[inside] != positions[inside - 1]

    return may_cut


def _runs(output: Output, start: int, end: int, part: int, tracer: Tracer) -> list[Run] | None:
    if output.sources is None:
        return None
    runs: list[Run] = []
    at = 0
    for segment in output.sources:
        low, high = max(start, at), min(end, at + segment.count)
        if low < high:
            positions: Sequence[int] | None = segment.positions
            if positions is None:
                runs.append(Run(high - low))
            else:
                assert segment.tp is not None
                mine = positions[low - at : high - at]
                runs.append(tracer.run(output.tp, segment.agent, segment.tp, mine, part))
        at += segment.count
    return runs
