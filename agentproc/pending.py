"""What a group has settled and sent since its last checkpoint, and who waits for the next."""

import asyncio
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from streamd.agentproc.broker import TP, Checkpoint, Output, TableChange
from streamd.agentproc.delivery import Sent
from streamd.agentproc.errand import Errand
from streamd.agentproc.outbox import outputs_of
from streamd.context import Callback, Lanes, RecordMetadata
from streamd.errors import StreamdError

Positions = dict[tuple[str, TP], int]  # (agent, tp) -> the next one to settle


class RolledBack(StreamdError):
    """What this code wrote was taken back with a failed event of its group; ask again."""


class Waiter(NamedTuple):
    """Somebody who waits for a checkpoint."""

    done: asyncio.Future[None]
    errand: Errand | None  # whose code it is, a task's or a view's

    def refuse(self) -> None:
        """Raise `RolledBack` where it waits."""
        if not self.done.done():
            self.done.set_exception(RolledBack())
            self.done.exception()  # it may have been given up: then nobody looks at it


class Taken(NamedTuple):
    """A checkpoint that is to be committed, and who is told then."""

    checkpoint: Checkpoint
    callbacks: list[tuple[Callback, RecordMetadata]]
    waiters: list[Waiter]


class Pending:
    """All that a roll-back drops, but for the tables' rows."""

    def __init__(self) -> None:
        self.positions: Positions = {}
        self.committed: Positions = {}  # as of the last checkpoint
        self.outbox: list[Lanes] = []  # of settled events
        self.letters: list[Output] = []  # of events that were given up
        self.callbacks: list[tuple[Callback, RecordMetadata]] = []
        self.events = 0  # settled
        self.dirty = asyncio.Event()  # something is there to make durable
        self.due = asyncio.Event()  # a checkpoint is to begin now
        self._waiters: list[Waiter] = []
        self._is_urgent = False  # somebody waits for power-safe durability

    def gain(self, positions: Positions) -> None:
        """Go on from what earlier checkpoints of these partitions say."""
        self.committed |= positions
        self.positions |= positions

    def lose(self, partitions: Collection[int]) -> None:
        """The last checkpoint is without these partitions; to be followed by `drop`."""
        self.committed = {
            key: at for key, at in self.committed.items() if key[1].partition not in partitions
        }

    def release(self, settled: Iterable[Sent]) -> None:
        """What settled events sent goes into the next checkpoint."""
        for sent in settled:
            self.outbox.append(sent.lanes)
            self.callbacks += sent.callbacks

    async def durable(self, errand: Errand | None = None, *, urgent: bool = True) -> None:
        """Wait until everything that was sent, written and settled so far is durable.

        Args:
            errand: Whose code waits, if it is one's.
            urgent: It must survive a power cut as well.

        Raises:
            RolledBack: It was taken back instead.
        """
        waiter = Waiter(asyncio.get_running_loop().create_future(), errand)
        self._waiters.append(waiter)
        self._is_urgent = self._is_urgent or urgent
        self.dirty.set()
        self.due.set()
        await waiter.done

    def take(self, changes: list[TableChange]) -> Taken:
        """Make a checkpoint of it; what comes from now on is the next one's.

        Args:
            changes: Rows that the tables have changed.
        """
        self.dirty.clear()
        self.due.clear()
        self.events = 0
        outbox, self.outbox = self.outbox, []
        letters, self.letters = self.letters, []
        callbacks, self.callbacks = self.callbacks, []
        waiters, self._waiters = self._waiters, []
        committed = self.committed
        checkpoint = Checkpoint(
            outputs=_joined(outputs_of(outbox), letters),
            changes=changes,
            positions={
                key: position
                for key, position in self.positions.items()
                if committed.get(key) != position
            },
            durable=self._is_urgent,
        )
        self._is_urgent = False
        return Taken(checkpoint, callbacks, waiters)

    def drop(self, errands: Collection[Errand]) -> None:
        """Back to the last checkpoint; who waited for more than that is refused.

        Args:
            errands: Those that run: one that has lost nothing waits on.
        """
        self.outbox.clear()
        self.letters.clear()
        self.callbacks.clear()
        self.events = 0
        self.positions = dict(self.committed)
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            errand = waiter.errand if waiter.errand in errands else None
            if errand is not None and not errand.rolled_back and not errand.whole:
                self._waiters.append(waiter)
            else:
                waiter.refuse()


def _joined(outputs: list[Output], letters: Sequence[Output]) -> list[Output]:
    """Dead letters as one output, beside the others."""
    if letters:
        first = letters[0]
        for letter in letters[1:]:
            first.keys += letter.keys
            first.values += letter.values
            first.timestamps += letter.timestamps
            assert first.headers is not None and letter.headers is not None
            first.headers += letter.headers
        outputs.append(first)
    return outputs
