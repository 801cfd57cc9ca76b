"""A session's tables on its own disk, so that whoever comes after it reads no changelog whole.

Only what counts gets there: after a checkpoint its rows wait, and each few seconds, while no
checkpoint is under way, the session makes sure that nobody else has written to its changelogs;
what waits then is written with the number of the checkpoint and the changelog's end.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from streamd.agentproc.broker import TP, TableChange
from streamd.agentproc.kafka.markers import Marker
from streamd.agentproc.kafka.trusting import distrust
from streamd.agentproc.store.behind import Stores
from streamd.agentproc.store.file import Mark
from streamd.agentproc.store.rows import Rows

log = logging.getLogger(__name__)

SAVE_S = 10.0
SAVE_ROWS = 100_000  # that wait: save at once
LOOK_S = 1.0


class Known(NamedTuple):
    """What a store has of a changelog."""

    rows: list[tuple[bytes, bytes]]
    offset: int  # read on from here


class LocalTables:
    """See the module.

    Args:
        folder: Where the stores are.
        changelogs: Table -> topic.
        alone: Which changelogs nobody else has written to, while no checkpoint is under way.
    """

    def __init__(
        self,
        folder: Path,
        changelogs: Mapping[str, str],
        alone: Callable[[], Awaitable[set[TP]]],
    ) -> None:
        self.topic_ids: dict[str, str] = {}  # changelog -> id; set before anything is recovered
        self.committing = asyncio.Lock()  # held by a checkpoint, and while marks are taken
        self._changelogs = changelogs
        self._alone = alone
        self._stores = Stores(folder)
        self._marks: dict[TP, Mark] = {}
        self._behind = asyncio.Event()  # a store is behind its changelog

    def known(self, tp: TP, marker: Marker, low: int, high: int) -> Known | None:
        """What the store has of a changelog, if it may be used; else it is emptied. Blocks.

        Args:
            marker: The one that counts.
            low, high: What the changelog holds.
        """
        stores = self._stores
        if (mark := stores.open(tp)) is None:
            return None
        id = self.topic_ids[tp.topic]
        if why := distrust(mark, marker, tp.topic, id, low, high, time.time()):
            stores.wipe(tp, why)
            return None
        rows = stores.read(tp)
        return None if rows is None else Known(rows, mark.offset)

    def begin(self, partition: int, marker: Marker, rows: Mapping[str, Rows]) -> None:
        """A partition was taken over by the claim `marker`; table -> what it held."""
        for table, topic in self._changelogs.items():
            tp = TP(topic, partition)
            self._stores.begin(tp, rows[table])
            self._marks[tp] = self._mark(topic, marker, marker.starts[topic])
        self._behind.set()

    def landed(
        self,
        changes: Iterable[TableChange],
        markers: Mapping[int, Marker],
        ends: Mapping[TP, int],
    ) -> None:
        """A checkpoint is durable.

        Args:
            markers: Of the partitions that it touched.
            ends: Where each changelog ends by what was written.
        """
        for partition, marker in markers.items():
            for topic in self._changelogs.values():
                tp = TP(topic, partition)
                self._marks[tp] = self._mark(topic, marker, ends[tp])
        for change in changes:
            tp = TP(self._changelogs[change.table], change.partition)
            self._stores.change(tp, change.rows)
        self._behind.set()

    def _mark(self, topic: str, marker: Marker, offset: int) -> Mark:
        return Mark(
            self.topic_ids[topic],
            offset,
            marker.incarnation,
            marker.number,
            marker.resets,
            time.time(),
        )

    async def run(self) -> None:
        """Bring the stores up to date each few seconds, for ever.

        Raises:
            Fenced: Somebody else writes to the changelogs.
        """
        while True:
            await self._behind.wait()
            while not self._is_due():
                await asyncio.sleep(LOOK_S)
            await self.save()

    def _is_due(self) -> bool:
        stores = self._stores
        return (
            stores.filling
            or stores.waiting >= SAVE_ROWS
            or time.monotonic() - stores.saved_at >= SAVE_S
        )

    async def save(self) -> None:
        """Bring the stores up to date. Raises as `run`."""
        async with self.committing:
            alone = await self._alone()
            self._behind.clear()
            saved = self._stores.save({tp: m for tp, m in self._marks.items() if tp in alone})
            if not alone.issuperset(self._marks):
                self._behind.set()
        await saved

    async def release(self, partitions: set[int]) -> None:
        """They are another process's; what is not saved of them is not any more."""
        lost = [tp for tp in self._marks if tp.partition in partitions]
        for tp in lost:
            del self._marks[tp]
        await self._stores.release(lost)

    async def close(self) -> None:
        """Let go of all of them."""
        await self._stores.close()
