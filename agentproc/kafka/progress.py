"""How far a partition was read and settled, where not all that is read counts.

Records that were sent twice are dropped before anybody sees them, and marks of transactions
are no records at all: a position just before some of them is moved over them, so that what is
stored is where something is to be read.
"""

from collections import deque

from streamd.agentproc.kafka.reading import Passed, Read
from streamd.agentproc.kafka.sources import Highs, sift


class Progress:
    """Of one partition, since it was taken over.

    Args:
        highs: Before the record that is read first.
    """

    def __init__(self, highs: Highs) -> None:
        self.highs = highs  # before the record that the lowest settled position is in
        self._passed: deque[Passed] = deque()  # packs that were read, and are not settled
        self._skipped: dict[int, int] = {}  # position -> where what counts goes on

    def was_read(self, read: Read) -> None:
        """More was read, in order."""
        self._passed += read.passed
        goes_on = read.end if read.batch is None else read.batch.positions[0]
        if goes_on > read.start:
            self._skipped[read.start] = goes_on

    def beyond(self, position: int) -> int:
        """A position, moved over what was read there and dropped."""
        while position in self._skipped:
            position = self._skipped[position]
        return position

    def settled(self, position: int) -> None:
        """All below this position, the lowest of any agent, is settled.

        The highs become those before the record that it is in, not those of the position: where
        that is in the middle of a pack, it may be between two records of one event, and the
        second would be taken for a replay of the first. Who opens the pack again sifts it
        whole, as it was the first time.
        """
        while self._passed and self._passed[0].end <= position:
            sift(self.highs, self._passed.popleft().runs, [])
        for start in [start for start in self._skipped if start < position]:
            del self._skipped[start]

    def rewind(self) -> None:
        """What was read and not settled is read again."""
        self._passed.clear()
        self._skipped.clear()
