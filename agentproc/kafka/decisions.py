"""What became of the transactions of one transactional id, by their coordinator's own log.

The coordinator writes each step of a transaction to `__transaction_state`, with the partitions
that it touched, before it marks the partitions. So this tells what a mark that is missing in a
partition would say. The topic is the cluster's: it is read only where something is wrong, and
where it cannot be read nothing is known.
"""

import struct
from collections.abc import Iterable
from typing import NamedTuple

TOPIC = "__transaction_state"
PREPARE_COMMIT, PREPARE_ABORT = 2, 3


class Step(NamedTuple):
    """A decision: everything that a transaction wrote counts, or nothing."""

    commits: bool
    partitions: list[tuple[str, int]]  # topic and number


def place_of(transactional_id: str, count: int) -> int:
    """The partition of the topic, of `count`, that tells of an id (pure).

    >>> [place_of(f"trouble-b0cc326c/count/aca3bde1c02b/{slot}", 4) for slot in (0, 1)]
    [3, 0]
    """
    units = struct.unpack(f"<{len(transactional_id.encode('utf-16-le')) // 2}H",
                          transactional_id.encode("utf-16-le"))  # fmt: skip
    code = 0
    for unit in units:
        code = (31 * code + unit) & 0xFFFFFFFF  # as Java's String.hashCode
    return min(code, (1 << 32) - code) % (1 << 31) % count


def key_of(transactional_id: str) -> bytes:
    """The key of its records (pure)."""
    id = transactional_id.encode()
    return struct.pack("!hh", 0, len(id)) + id


def decided(values: Iterable[bytes | None]) -> dict[tuple[str, int], bool]:
    """Whether the last transaction that touched each partition was committed (pure).

    Args:
        values: Of the records of one id, in the order of the log.

    Raises:
        ValueError: They are of a form that is not known.
    """
    found: dict[tuple[str, int], bool] = {}
    for value in values:
        if value is not None and (step := decode(value)) is not None:
            found |= dict.fromkeys(step.partitions, step.commits)
    return found


def decode(value: bytes) -> Step | None:
    """The decision that a record tells; None: it tells another step (pure).

    Raises:
        ValueError: It is of a form that is not known.
    """
    try:
        version, _, _, _, status = struct.unpack_from("!hqhib", value)
        if version not in (0, 1):
            raise ValueError(f"version {version} of a transaction's state is not known")
        if status not in (PREPARE_COMMIT, PREPARE_ABORT):
            return None
        reader = _Reader(value, 17, is_compact=version == 1)
        return Step(status == PREPARE_COMMIT, reader.partitions())
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"a transaction's state cannot be read: {error}") from None


class _Reader:
    def __init__(self, data: bytes, at: int, *, is_compact: bool) -> None:
        self._data = data
        self._at = at
        self._is_compact = is_compact

    def partitions(self) -> list[tuple[str, int]]:
        found = []
        for _ in range(self._count()):
            topic = self._text()
            for _ in range(self._count()):
                found.append((topic, int(self._take("!i"))))
            if self._is_compact and self._varint():
                raise ValueError("a transaction's state has fields that are not known")
        return found

    def _count(self) -> int:
        return max(0, self._varint() - 1 if self._is_compact else self._take("!i"))

    def _text(self) -> str:
        size = self._varint() - 1 if self._is_compact else self._take("!h")
        text = self._data[self._at : self._at + size]
        self._at += size
        return text.decode()

    def _take(self, form: str) -> int:
        [number] = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return int(number)

    def _varint(self) -> int:
        number, shift = 0, 0
        while True:
            byte = self._data[self._at]
            self._at += 1
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
            shift += 7
