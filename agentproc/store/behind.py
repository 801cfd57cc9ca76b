"""The stores of one session, written behind its checkpoints in a thread of their own.

What a checkpoint has changed waits here until `save` says up to where it counts. Nothing waits
for a store, and a store that cannot be written is given up with one line: its partition is
recovered from the changelog the next time.

`open`, `read` and `wipe` are called by the thread that recovers, all else on the loop's.
"""

import asyncio
import logging
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import apsw

from streamd.agentproc.broker import TP
from streamd.agentproc.store.file import Changed, Mark, StoreFile, StoreHeld
from streamd.agentproc.store.rows import Rows

log = logging.getLogger(__name__)

SLICE_ROWS = 20_000  # of a store that is filled, between two looks whether that is wanted still


class Stores:
    """See the module; of a session's changelogs (by topic and partition)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[TP, StoreFile] = {}
        self._changes: dict[TP, dict[bytes, bytes | None]] = {}  # not handed to the thread yet
        self._whole: dict[TP, list[tuple[bytes, bytes]]] = {}  # what a new store is to hold
        self._unwanted: set[TP] = set()  # what is filled now, and is not to be any more
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stores")
        self.saved_at = time.monotonic()

    @property
    def waiting(self) -> int:
        """How many rows are to be written."""
        return sum(map(len, self._changes.values())) + sum(map(len, self._whole.values()))

    @property
    def filling(self) -> bool:
        """Is there a store that holds nothing yet of what it is to hold?"""
        return bool(self._whole)

    # While a partition is recovered.

    def open(self, tp: TP) -> Mark | None:
        """Have the store of a changelog from now on; what it holds. Blocks."""
        if tp not in self._open:
            try:
                self._open[tp] = self._thread.submit(
                    StoreFile, self._folder, f"{tp.topic}-{tp.partition}"
                ).result()
            except StoreHeld as error:
                log.warning("%s is recovered without a store: %s", tp, error)
            except (OSError, apsw.Error) as error:
                log.warning("%s has no store: %s", tp, error)
        store = self._open.get(tp)
        return store.mark if store is not None else None

    def read(self, tp: TP) -> list[tuple[bytes, bytes]] | None:
        """The rows of a store that is open; None: it was damaged, and is empty. Blocks."""
        try:
            return self._thread.submit(self._open[tp].rows).result()
        except apsw.Error as error:
            self.wipe(tp, f"it is damaged: {error}")
            return None

    def wipe(self, tp: TP, why: str) -> None:
        """Empty a store that is open. Blocks."""
        try:
            self._thread.submit(self._open[tp].wipe, why).result()
        except (OSError, apsw.Error) as error:
            self._give_up(tp, error)

    # While it is owned.

    def begin(self, tp: TP, rows: Rows) -> None:
        """A partition was recovered; a later `save` brings its store up to that."""
        if (store := self._open.get(tp)) is None:
            return
        if store.mark is None:
            self._whole[tp] = rows.all
            self._changes.pop(tp, None)
        else:
            self._changes[tp] = dict(rows.changes)

    def change(self, tp: TP, rows: Iterable[Changed]) -> None:
        """Rows that are durable; a later `save` writes them."""
        if tp in self._open:
            self._changes.setdefault(tp, {}).update(rows)

    def save(self, marks: dict[TP, Mark]) -> "asyncio.Future[None]":
        """Write all that waits now of these changelogs; each mark says up to where that is."""
        self.saved_at = time.monotonic()
        pieces = [
            _Piece(tp, store, self._whole.pop(tp, None), self._changes.pop(tp, {}), mark)
            for tp, mark in marks.items()
            if (store := self._open.get(tp)) is not None
        ]
        return asyncio.get_running_loop().run_in_executor(self._thread, self._write, pieces)

    def _write(self, pieces: list["_Piece"]) -> None:
        for tp, store, whole, changes, mark in pieces:
            try:
                if whole is not None:
                    store.begin_anew()
                    for at in range(0, len(whole), SLICE_ROWS):
                        if tp in self._unwanted:
                            break
                        store.add(whole[at : at + SLICE_ROWS])
                    else:
                        store.save(list(changes.items()), mark)
                elif store.mark is not None:
                    store.save(list(changes.items()), mark)
            except apsw.Error as error:
                self._give_up(tp, error)

    def _give_up(self, tp: TP, error: Exception) -> None:
        log.warning("the store of %s cannot be written, and is given up: %s", tp, error)
        self._close([tp])

    async def release(self, tps: Iterable[TP]) -> None:
        """Let go of stores as they are: another process may have them."""
        mine = [tp for tp in tps if tp in self._open]
        self._unwanted.update(mine)
        # What is written now comes first.
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close, mine)
        self._unwanted.difference_update(mine)

    def _close(self, tps: Iterable[TP]) -> None:
        for tp in tps:
            self._changes.pop(tp, None)
            self._whole.pop(tp, None)
            if (store := self._open.pop(tp, None)) is not None:
                store.close()

    async def close(self) -> None:
        """Let go of all of them; one that is filled now is broken off."""
        self._unwanted.update(self._open)
        await asyncio.get_running_loop().run_in_executor(
            self._thread, self._close, list(self._open)
        )
        self._thread.shutdown(wait=False)


class _Piece(NamedTuple):
    """What the thread writes of one store."""

    tp: TP
    store: StoreFile
    whole: list[tuple[bytes, bytes]] | None
    changes: dict[bytes, bytes | None]
    mark: Mark
