"""Reading the embedded log, on a connection of its own.

Each call is one short read transaction: a long one would keep the WAL from being emptied.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apsw

from streamd.agentproc.broker import TP, Batch
from streamd.agentproc.broker.catalog import Catalog
from streamd.agentproc.broker.pack import decode_pack, is_sound
from streamd.agentproc.broker.schema import OFFSET_BITS, connect, explained, log_path, query
from streamd.agentproc.broker.turnstile import Turnstile
from streamd.errors import BrokerError, LogDamaged

OFFSET_MASK = (1 << OFFSET_BITS) - 1

# Packs are read once, and each commit of another process has SQLite forget what it kept.
CACHE_KIB = 32

# From the pack that holds the position on: the last one that begins at or before it.
_PACKS = """
SELECT id, n, crc, data FROM packs WHERE id >= coalesce(
    (SELECT id FROM packs WHERE id BETWEEN ?1 AND ?2 ORDER BY id DESC LIMIT 1), ?2)
AND id < ?3 ORDER BY id
"""


class Reader:
    """A reading connection; used by one thread.

    Raises:
        BrokerError: The log cannot be opened; LogDamaged: it cannot be trusted.
    """

    def __init__(self, datadir: Path, turnstile: Turnstile) -> None:
        self.path = log_path(datadir)
        self.db = connect(datadir, turnstile, cache_kib=CACHE_KIB)
        self.catalog = Catalog()
        self.catalog.load(self.db)

    def close(self) -> None:
        self.db.close()

    def ends(self, tp_ids: Sequence[int]) -> dict[int, int]:
        """The next offset of each of these partitions."""
        marks = ",".join("?" * len(tp_ids))
        try:
            return dict(
                query(self.db, f"SELECT tp, next FROM heads WHERE tp IN ({marks})", tp_ids)
            )
        except apsw.Error as error:
            raise explained(error, self.path) from error

    def read(
        self, tp: TP, tp_id: int, position: int, max_events: int, max_bytes: int
    ) -> Batch | None:
        """Whole packs from `position` on, at least one if there is any.

        Raises:
            LogDamaged: A pack is not what was written.
        """
        first = tp_id << OFFSET_BITS
        keys: list[bytes | None] = []
        values: list[bytes | None] = []
        timestamps: list[float] = []
        headers: list[list[tuple[str, bytes]]] | None = None
        start, size_bytes = -1, 0
        try:
            cursor = self.db.execute(
                _PACKS, (first, first | position, (tp_id + 1) << OFFSET_BITS)
            )
            for id, count, crc, data in cursor:
                offset = id & OFFSET_MASK
                if offset + count <= position:
                    continue
                if not is_sound(id, count, crc, data):
                    raise damaged(self.path, tp, offset, count)
                more = decode_pack(data, count)
                if start < 0:
                    start = max(position, offset)
                    skip = start - offset
                    keys, values, timestamps, headers = (
                        more
                        if skip == 0
                        else (
                            more[0][skip:],
                            more[1][skip:],
                            more[2][skip:],
                            more[3][skip:] if more[3] else None,
                        )
                    )
                else:
                    if headers is not None or more[3] is not None:
                        headers = headers or [[] for _ in values]
                        headers += more[3] or [[] for _ in range(count)]
                    keys += more[0]
                    values += more[1]
                    timestamps += more[2]
                size_bytes += len(data)
                if len(values) >= max_events or size_bytes >= max_bytes:
                    break
            cursor.close(True)
        except apsw.Error as error:
            raise explained(error, self.path) from error
        if start < 0:
            return None
        end = start + len(values)
        return Batch(tp, range(start, end), keys, values, timestamps, headers, end)

    def fetch(
        self, topic: str, partition: int, position: int, max_events: int, max_bytes: int
    ) -> Batch | None:
        """The same by name, without the ends that sessions keep.

        Raises:
            BrokerError: The log has no such partition.
        """
        tp = TP(topic, partition)
        tp_id = self.catalog.tp_id(tp)
        if tp_id is None:
            self.catalog.load(self.db)
            tp_id = self.catalog.tp_id(tp)
        if tp_id is None:
            known = self.catalog.topics.get(topic)
            raise BrokerError(
                f"the log has no topic {topic!r}: it has "
                f"{', '.join(sorted(self.catalog.topics)) or 'none'}"
                if known is None
                else f"topic {topic!r} has the partitions 0 to {known.partitions - 1}, "
                f"not {partition}"
            )
        return self.read(tp, tp_id, position, max_events, max_bytes)

    def extents(self) -> dict[int, tuple[int, int, int]]:
        """Low, next offset and size in bytes of every partition, by id; loads the catalog."""
        try:
            self.catalog.load(self.db)
            heads = query(self.db, "SELECT tp, low, next, bytes FROM heads")
        except apsw.Error as error:
            raise explained(error, self.path) from error
        return {tp_id: (low, end, size) for tp_id, low, end, size in heads}

    def readers(self) -> list[tuple[str, str]]:
        """Agent and topic, for each topic that an agent reads, by name."""
        return self._query("SELECT agent, topic FROM reading ORDER BY agent, topic")

    def positions(self) -> dict[tuple[str, int], int]:
        """Where each agent reads on: (agent, id of the partition) -> offset."""
        found = self._query(
            "SELECT name, tp, position FROM positions JOIN agents ON agents.id = agent"
        )
        return {(agent, tp_id): position for agent, tp_id, position in found}

    def _query(self, text: str) -> list[Any]:
        try:
            return query(self.db, text)
        except apsw.Error as error:
            raise explained(error, self.path) from error

    def rows(
        self, table: str, partition: int, *, after: bytes | None, limit: int
    ) -> list[tuple[bytes, bytes]]:
        """Up to `limit` rows of a partition of a table by key, from the key `after` on."""
        bound = "" if after is None else " AND k > ?"
        try:
            rows: list[tuple[bytes, bytes]] = query(
                self.db,
                "SELECT k, v FROM rows WHERE tid = (SELECT id FROM tables WHERE name = ?)"
                f" AND part = ?{bound} ORDER BY k LIMIT ?",
                (table, partition, limit)
                if after is None
                else (table, partition, after, limit),
            )
        except apsw.Error as error:
            raise explained(error, self.path) from error
        return rows


def damaged(path: Path, tp: TP, offset: int, count: int) -> LogDamaged:
    """The error for a pack that is not what was written (pure)."""
    return LogDamaged(
        f"the {count} events of {tp}@{offset} in {path} do not match their checksum: the disk "
        "or something else changed them",
        remedy="restore a copy of the data directory, or start with another --datadir",
    )
