"""What was read of a partition: records of a chunk, plain or packs, become one batch."""

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

from streamd.agentproc.broker import INDEX_BITS, TP, Batch, Headers
from streamd.agentproc.kafka.packs import (
    index_of,
    offset_of,
    open_pack,
    position_of,
    stamps_of,
)
from streamd.agentproc.kafka.sources import Gap, Highs, Run, sift

Message = Any  # the client's own type calls every field optional

MOST_LOOKS = 4  # for holes that stay: then a partition is one of transactions, or compacted


class Passed(NamedTuple):
    """A pack that was read: what the highs are behind it."""

    end: int  # the position after it
    runs: Sequence[Run]


class Read(NamedTuple):
    """What was read of one partition, in order; `turn` counts the seeks before it."""

    tp: TP
    turn: int
    batch: Batch | None  # None: all of it had been read before
    start: int  # positions that were passed
    end: int
    passed: list[Passed]
    size_bytes: int


class Reading:
    """How far a partition was read."""

    def __init__(self, turn: int, position: int, highs: Highs) -> None:
        self.turn = turn
        self.position = position  # the next one to hand over
        self.highs = highs
        self._holes: set[tuple[int, int]] = set()  # offsets around what is not in the log
        self._looks = 0

    def misses(self, offsets: list[int]) -> bool:
        """Do records seem to be missing before or between these offsets, of which the last may
        be the end? Then they are to be asked for once more.

        A hole that is there again is in the log: marks of transactions, aborted ones, or a
        compaction. One that is not was ours, e.g. records that were on their way when a seek
        was made.
        """
        wanted = offset_of(self.position)
        if self._looks == MOST_LOOKS or offsets[-1] - wanted + 1 == len(offsets):
            return False
        before = [wanted - 1, *offsets]
        holes = {pair for pair in zip(before, offsets, strict=False) if pair[1] - pair[0] > 1}
        if holes <= self._holes:
            return False
        self._holes |= holes
        self._looks += 1
        return True


class Columns:
    """The events of a partition's part of a chunk, gathered."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.keys: list[bytes | None] = []
        self.values: list[bytes | None] = []
        self.stamps: list[float] | Stamps = []
        self.headers: list[Headers] | None = None
        self.passed: list[Passed] = []
        self.size_bytes = 0

    def add_plain(
        self, records: list[Message], offsets: list[int], headers: list[Headers] | None
    ) -> None:
        if not self.values and headers is None:
            self.stamps = Stamps(records)
        else:
            self._add_stamps(Stamps(records))
        self._add_headers(headers, len(records))
        self.positions += [offset << INDEX_BITS for offset in offsets]
        self.keys += [message.key() for message in records]
        values = [message.value() for message in records]
        self.values += values
        self.size_bytes += sum(map(len, filter(None, values)))

    def add_pack(self, tp: TP, message: Message, highs: Highs, gaps: list[Gap]) -> None:
        offset, data = message.offset(), message.value()
        columns = open_pack(data, tp, offset)
        first = position_of(offset)
        count = len(columns.values)
        kept = [(0, count)]
        if columns.runs is not None:
            kept = sift(highs, columns.runs, gaps)
            self.passed.append(Passed(position_of(offset + 1), columns.runs))
        stamps = stamps_of(columns)
        assert columns.keys is not None
        for start, end in kept:
            self._add_headers(columns.headers and columns.headers[start:end], end - start)
            self.positions += range(first + start, first + end)
            self.keys += columns.keys[start:end]
            self.values += columns.values[start:end]
            self._add_stamps(stamps[start:end])
        self.size_bytes += len(data)

    def _add_stamps(self, stamps: Sequence[float]) -> None:
        if isinstance(self.stamps, Stamps):
            self.stamps = list(self.stamps)
        self.stamps += stamps

    def _add_headers(self, headers: list[Headers] | None, count: int) -> None:
        if headers is not None and self.headers is None:
            self.headers = [[] for _ in self.values]
        if self.headers is not None:
            self.headers += headers if headers is not None else [[] for _ in range(count)]

    def drop_below(self, position: int) -> None:
        """Leave out the events of a pack that were settled before it was opened again."""
        if not self.positions or self.positions[0] >= position or not index_of(position):
            return
        count = sum(1 for at in self.positions if at < position)
        for column in (self.positions, self.keys, self.values):
            del column[:count]
        self.stamps = list(self.stamps)[count:]
        if self.headers is not None:
            del self.headers[:count]

    def batch(self, tp: TP, end: int) -> Batch | None:
        if not self.values:
            return None
        headers = self.headers if self.headers and any(self.headers) else None
        return Batch(tp, self.positions, self.keys, self.values, self.stamps, headers, end)


class Stamps(Sequence[float]):
    """The timestamps of plain records, asked for one by one: few want them, and they cost."""

    def __init__(self, records: list[Message]) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> float: ...

    @overload
    def __getitem__(self, index: slice) -> "Stamps": ...

    def __getitem__(self, index: int | slice) -> "float | Stamps":
        if isinstance(index, slice):
            return Stamps(self._records[index])
        moment_ms: int = self._records[index].timestamp()[1]
        return moment_ms / 1000
