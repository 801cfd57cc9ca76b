"""What was acknowledged, kept beside the log.

SQLite takes a WAL that was cut, deleted or damaged for a shorter one, without a word. This file
holds, for each partition, the end of what was acknowledged as durable; a log that ends below it
has lost records and is refused.

Written after the log's own fsync and before the acknowledgement, by whoever has the turn, so it
is never above what the log holds on the disk. It is not synced: losing it to a power cut loses
a check, not data.
"""

import os
import struct
import zlib
from pathlib import Path

_MAGIC = b"streamd-acked-01"
_SLOT = struct.Struct("<qI4x")  # end, checksum of partition id and end


class Watermark:
    """The file `acknowledged` in the data directory."""

    def __init__(self, datadir: Path) -> None:
        self.path = datadir / "acknowledged"
        self._fd = -1

    def raise_to(self, ends: dict[int, int]) -> None:
        """Note the new ends: partition id -> next offset. Only while having the turn."""
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.pwrite(self._fd, _MAGIC, 0)
        for tp_id, end in ends.items():
            os.pwrite(self._fd, _SLOT.pack(end, _check(tp_id, end)), _place(tp_id))

    def read(self) -> dict[int, int]:
        """The acknowledged end of each partition id; what is not readable is left out."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        ends = {}
        for place in range(_place(0), len(data) - _SLOT.size + 1, _SLOT.size):
            end, check = _SLOT.unpack_from(data, place)
            tp_id = (place - _place(0)) // _SLOT.size
            if end > 0 and check == _check(tp_id, end):
                ends[tp_id] = end
        return ends

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _place(tp_id: int) -> int:
    return len(_MAGIC) + tp_id * _SLOT.size


def _check(tp_id: int, end: int) -> int:
    return zlib.crc32(struct.pack("<qq", tp_id, end))
