"""Finding values of tables that were changed in place: what the setting `debug` does to tables.

A table hands out copies: `table[key].append(1)` changes one, and nothing is kept. With `debug`
each copy is looked at again at the next checkpoint, which holds whole events only: one that is
no longer as it was, and was not assigned since, is told.
"""

import logging
from typing import Any

from streamd.tables import Checked, HeldValues, Stored, Table

log = logging.getLogger(__name__)

TOLD_KEYS = 5  # of a table at one checkpoint


class Watching(HeldValues):
    """A held table that remembers what it has handed out since the last checkpoint."""

    __slots__ = ()

    def _live(self, value: Any, key: Any) -> Any:
        return self._hand_out(key, super()._live(value, key))

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        # What was not written in this very step has come through `_live`.
        return self._hand_out(key, value) if dict.__contains__(self, key) else value

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self._handed.pop(key, None)
        self._hand_out(key, value)

    def snapshot(self) -> list[tuple[int, list[tuple[bytes, bytes | None]]]]:
        """See `Table.snapshot`."""
        handed = dict(self._handed)
        self._handed.clear()
        changed = [
            key
            for key, copies in handed.items()
            if any(self._bytes_of(value) != data for value, data in copies)
        ]
        for key in changed[:TOLD_KEYS]:
            log.warning(
                "table %s: the value of key %r was changed in place and not assigned, so the "
                "change is lost: table[key] = value keeps it",
                self.name,
                key,
            )
        if len(changed) > TOLD_KEYS:
            log.warning(
                "table %s: the same with %d keys more", self.name, len(changed) - TOLD_KEYS
            )
        return super().snapshot()

    def drop(self) -> None:
        """See `Table.drop`."""
        self._handed.clear()
        super().drop()

    def _hand_out(self, key: Any, value: Any) -> Any:
        if value.__class__ not in self._plain and value.__class__ is not Stored:
            self._handed.setdefault(key, []).append((value, self._bytes_of(value)))
        return value

    def _bytes_of(self, value: Any) -> bytes | None:
        try:
            return self.value_codec.encode(value)
        except Exception:
            return None  # it is told where it is assigned


class WatchingChecked(Watching, Checked):
    """The same in a process that runs several groups."""

    __slots__ = ()


def watch(table: Table) -> None:
    """Let a table that this process holds tell what is changed in place."""
    table.__class__ = WatchingChecked if isinstance(table, Checked) else Watching
