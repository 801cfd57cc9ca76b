"""Which process has a partition, and which partition a key of a URL belongs to. No I/O.

The partition is the one that the producer of the table's events chose: same partitioner, same
key bytes. Who has it is what the master said last; an older word never replaces a newer one.
"""

from collections.abc import Sequence

from streamd.codecs import key_bytes
from streamd.partition import partition_for
from streamd.wire import Owner, Owners, TableInfo


class OwnerMap:
    """Who has what, as of one generation."""

    def __init__(self, generation: int = 0, owners: Sequence[Owner] = ()) -> None:
        self.generation = generation
        self._members: dict[str, list[Owner]] = {}  # group -> its processes, by slot
        self._active: dict[tuple[str, int], Owner] = {}
        self._recovering: dict[tuple[str, int], Owner] = {}
        self._scattered = {table for owner in owners for table in owner.scattered}
        for owner in sorted(owners, key=lambda owner: owner.slot):
            self._members.setdefault(owner.group, []).append(owner)
            for partition in owner.active:
                self._active[owner.group, partition] = owner
            for partition in owner.recovering:
                self._recovering[owner.group, partition] = owner

    def updated(self, news: Owners) -> "OwnerMap":
        """The map after `news`, or this one if it knows as much already."""
        if news.generation < self.generation:
            return self
        return OwnerMap(news.generation, news.owners)

    def owner(self, group: str, partition: int) -> Owner | None:
        """The process that may answer for `partition`, or None."""
        return self._active.get((group, partition))

    def recovering(self, group: str, partition: int) -> Owner | None:
        """The process that is about to have `partition`, or None."""
        return self._recovering.get((group, partition))

    def is_scattered(self, table: str) -> bool:
        """True when keys of `table` may be elsewhere than in the partition they hash to."""
        return table in self._scattered

    def members(self, group: str) -> list[Owner]:
        """All processes of `group`, by slot."""
        return self._members.get(group, [])

    def still_recovering(self) -> list[tuple[str, int]]:
        """Each (group, partition) that nobody can answer for yet, in order."""
        return sorted(key for key in self._recovering if key not in self._active)


def route_partition(table: TableInfo, text: str) -> int | None:
    """The partition of the key that `text` writes, or None if only the app can tell.

    Raises:
        ValueError: `text` is no key of the table's type.
    """
    key = key_bytes(text, table.route_codec, table.route_type)
    return None if key is None else partition_for(key, table.partitions)
