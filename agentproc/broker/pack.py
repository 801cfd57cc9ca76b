"""A pack: events of one partition in a row, as the embedded log stores them.

The columns travel as one msgpack array `[keys, values, timestamps, headers]`: keys are nil when
no event has one, headers too; timestamps are one number when all are alike, else the bytes of
native doubles. At most 1,000 events and, unless a single event is larger, 256 KiB.

The checksum covers the bytes, the place and the count, so that neither a flipped bit nor a pack
in the wrong place is taken for data.
"""

import zlib
from array import array
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from streamd.agentproc.broker import Headers, Output

MAX_PACK_EVENTS = 1000
MAX_PACK_BYTES = 256 * 1024


class Columns(msgspec.Struct, array_like=True):
    """The events of a pack, column by column."""

    keys: list[bytes | None] | None
    values: list[bytes | None]
    timestamps: float | bytes
    headers: list[Headers] | None


class Pack(NamedTuple):
    """An encoded pack that has no place yet."""

    events: int
    checksum: int  # of the bytes alone
    data: bytes


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Columns).decode


def encode_packs(output: Output) -> list[Pack]:
    """Cut an output into packs and encode them (pure)."""
    count = len(output.values)
    if not len(output.keys) == len(output.timestamps) == count > 0:
        raise ValueError(
            f"the columns of an output to {output.tp} have {len(output.keys)} keys, {count} "
            f"values and {len(output.timestamps)} timestamps, expected as many of each, not 0"
        )
    packs: list[Pack] = []
    for start in range(0, count, MAX_PACK_EVENTS):
        packs.extend(_encode_slice(output, start, min(start + MAX_PACK_EVENTS, count)))
    return packs


def _encode_slice(output: Output, start: int, stop: int) -> Iterator[Pack]:
    keys = output.keys[start:stop]
    values = output.values[start:stop]
    stamps = output.timestamps[start:stop]
    headers = output.headers[start:stop] if output.headers is not None else None
    count = stop - start
    timestamps: float | bytes = stamps[0]
    if stamps.count(stamps[0]) != count:
        timestamps = array("d", stamps).tobytes()
    data = _encode(
        (
            None if keys.count(None) == count else keys,
            values,
            timestamps,
            headers if headers and any(headers) else None,
        )
    )
    if len(data) > MAX_PACK_BYTES and count > 1:
        middle = start + count // 2
        yield from _encode_slice(output, start, middle)
        yield from _encode_slice(output, middle, stop)
    else:
        yield Pack(count, zlib.crc32(data), data)


def seal(checksum: int, id: int, count: int) -> int:
    """The checksum of a pack at its place: the one of its bytes, carried on (pure)."""
    return zlib.crc32(id.to_bytes(8, "big") + count.to_bytes(4, "big"), checksum)


def is_sound(id: int, count: int, sealed: int, data: bytes) -> bool:
    """True if a stored pack is what was written there (pure)."""
    return seal(zlib.crc32(data), id, count) == sealed


def decode_pack(
    data: bytes, count: int
) -> tuple[list[bytes | None], list[bytes | None], list[float], list[Headers] | None]:
    """Keys, values, timestamps and headers of a sound pack (pure)."""
    columns = _decode(data)
    keys: list[bytes | None] = [None] * count if columns.keys is None else columns.keys
    if isinstance(columns.timestamps, bytes):
        stamps = array("d", columns.timestamps).tolist()
    else:
        stamps = [columns.timestamps] * count
    return keys, columns.values, stamps, columns.headers
