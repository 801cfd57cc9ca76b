"""What the master and a process share besides their link, and the master keeps when it dies.

The beat page says that the loop turns and what is in work; the dump file takes stacks. Both are
memory files that exist as long as somebody holds them. `docs/internals.md` has the layout.
"""

import mmap
import os
from enum import IntEnum

import msgspec

from streamd.supervisor.policy import Place

PAGE_BYTES = 4096
MAX_DUMP_BYTES = 256 * 1024
END_OF_TASKS = b"-- end of tasks --"

_BEAT, _SETTLED, _IN_WORK, _OLDEST, _STAGE, _STAGE_SINCE = range(6)
_PLACE_LENGTH = 1016 // 8
_PLACE_AT = 1024


class Stage(IntEnum):
    """How far a process is."""

    STARTING = 0
    RECOVERING = 1
    RUNNING = 2
    DRAINING = 3


class _PlaceText(msgspec.Struct):
    agent: str
    topic: str
    partition: int
    position: int


class BeatPage:
    """The reading end of a process's page."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("streamd-beat", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, PAGE_BYTES)
        self._map = mmap.mmap(self.fd, PAGE_BYTES)
        # Casts read a number in one load; struct.unpack_from may see half of it.
        self._doubles = memoryview(self._map).cast("d")
        self._numbers = memoryview(self._map).cast("q")

    @property
    def beat(self) -> float:
        """When the loop turned last, monotonic; 0.0: not yet."""
        return float(self._doubles[_BEAT])

    @property
    def settled(self) -> int:
        """Events settled in this run."""
        return int(self._numbers[_SETTLED])

    @property
    def in_work(self) -> int:
        """Events that are being worked on."""
        return int(self._numbers[_IN_WORK])

    @property
    def oldest_since(self) -> float:
        """When the oldest of the events in work was handed out, monotonic; 0.0: none is."""
        return float(self._doubles[_OLDEST])

    @property
    def stage(self) -> Stage:
        """How far the process says it is."""
        number = int(self._numbers[_STAGE])
        return Stage(number) if 0 <= number < len(Stage) else Stage.STARTING

    @property
    def stage_since(self) -> float:
        """When the process came to its stage, monotonic; 0.0: not yet."""
        return float(self._doubles[_STAGE_SINCE])

    @property
    def place(self) -> Place | None:
        """The event in work that was written down last, if one was."""
        size = int(self._numbers[_PLACE_LENGTH])
        if not 0 < size <= PAGE_BYTES - _PLACE_AT:
            return None
        try:
            text = msgspec.json.decode(self._map[_PLACE_AT : _PLACE_AT + size], type=_PlaceText)
        except msgspec.DecodeError:
            # Killed while it wrote.
            return None
        return text.agent, text.topic, text.partition, text.position

    def close(self) -> None:
        """Give the page back."""
        self._doubles.release()
        self._numbers.release()
        self._map.close()
        os.close(self.fd)


class DumpFile:
    """Where a process writes its stacks when it is asked by USR1."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("streamd-dump", os.MFD_CLOEXEC)

    def clear(self) -> None:
        """Empty it; the offset is shared with the process, so it writes from the start."""
        os.ftruncate(self.fd, 0)
        os.lseek(self.fd, 0, os.SEEK_SET)

    def read(self) -> bytes:
        """What is in it now."""
        size = min(os.fstat(self.fd).st_size, MAX_DUMP_BYTES)
        return os.pread(self.fd, size, 0)

    def is_whole(self) -> bool:
        """True once the tasks' stacks are there too, which come last, or nothing will come."""
        return self.fd < 0 or self.read().rstrip().endswith(END_OF_TASKS)

    def close(self) -> None:
        """Give the file back."""
        # Its number is another's soon, who must not be read in its place.
        fd, self.fd = self.fd, -1
        os.close(fd)
