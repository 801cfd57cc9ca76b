"""The rows of one changelog as its owner makes them, by markers that come beside them. No I/O.

As in a recovery a row counts only once a marker covers it, but here both come bit by bit, and
in no order between them: a row that nothing covers yet waits, and with it all that come after
it. So what was applied is always what counts of all rows below some offset, and whoever takes
over goes on from there by the rules of a recovery.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from streamd.agentproc.kafka.markers import STAMP_BYTES, Incarnation, Marker
from streamd.agentproc.kafka.reading import Message
from streamd.agentproc.kafka.recovery import stamp_of


class _Row(NamedTuple):
    offset: int
    key: bytes
    stamp: bytes
    value: bytes | None


class Following:
    """See the module.

    Args:
        topic: The changelog.
        offset: All that counts before it is known.

    Attributes:
        offset: The same, by now.
        position: Everything before it was read.
        changes: What counts and was not taken by `take`; key -> value, None: deleted.
    """

    def __init__(self, topic: str, offset: int, marker: Marker) -> None:
        self.offset = self.position = offset
        self.changes: dict[bytes, bytes | None] = {}
        self._topic = topic
        self._waiting: deque[_Row] = deque()
        self._know(marker)

    @property
    def waits(self) -> bool:
        """Are there rows that no marker covers yet?"""
        return bool(self._waiting)

    def knows(self, marker: Marker) -> bool:
        """The newest marker; False: what was applied does not count by it, and is spoiled."""
        is_new = marker.incarnation != self._incarnation
        self._know(marker)
        if is_new and self.offset > self._start:
            return False
        while self._waiting and self._settles(self._waiting[0]):
            self._waiting.popleft()
        return True

    def read(self, records: Sequence[Message]) -> None:
        """Records, in order; those that were read before are passed over."""
        if records[-1].offset() < self._start:
            # All of them count. A copy that is made from nothing comes through here.
            changes, position = self.changes, self.position
            for record in records:
                if record.offset() >= position:
                    value = record.value()
                    changes[record.key()] = None if value is None else value[STAMP_BYTES:]
            self.offset = self.position = max(position, records[-1].offset() + 1)
            return
        for record in records:
            if (offset := record.offset()) < self.position:
                continue
            self.position = offset + 1
            value = record.value()
            if value is None:
                row = _Row(offset, record.key(), stamp_of(record.headers()), None)
            else:
                row = _Row(offset, record.key(), value[:STAMP_BYTES], value[STAMP_BYTES:])
            if self._waiting or not self._settles(row):
                self._waiting.append(row)

    def read_to(self, offset: int) -> None:
        """No record lies before `offset` that was not read."""
        self.position = max(self.position, offset)

    def take(self) -> list[tuple[bytes, bytes | None]]:
        """What was not taken yet."""
        taken, self.changes = list(self.changes.items()), {}
        return taken

    def _know(self, marker: Marker) -> None:
        self._incarnation: Incarnation = marker.incarnation
        self._start = marker.starts.get(self._topic, 0)
        self._first = marker.incarnation.stamp(0)
        self._last = marker.incarnation.stamp(marker.number)

    def _settles(self, row: _Row) -> bool:
        """Is it known whether this row counts? One that does is applied."""
        if row.offset >= self._start:
            if row.stamp > self._last:
                return False  # of a checkpoint, or an owner, that may still come to count
            if row.stamp < self._first:
                return True  # of one who was replaced
        self.changes[row.key] = row.value
        self.offset = row.offset + 1
        return True
