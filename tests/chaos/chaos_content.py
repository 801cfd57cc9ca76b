"""What the embedded log of an instance holds, read from its file: nothing is asked of it."""

import json
from pathlib import Path
from typing import Any

from streamd.agentproc.broker.reader import Reader
from streamd.agentproc.broker.turnstile import Turnstile
from streamd.agentproc.broker.writer import Writer
from streamd.tables import SCATTERED_MARK

Row = dict[str, Any]


class Content:
    """The topics, tables and positions of an instance's embedded log."""

    exactly_once = True

    def __init__(self, datadir: Path) -> None:
        self._datadir = datadir
        self._turnstile = Turnstile(datadir)
        self.reader = Reader(datadir, self._turnstile)

    def close(self) -> None:
        self.reader.close()
        self._turnstile.close()

    def behind(self) -> dict[str, int]:
        """Events that an agent has not settled, by agent and topic; only those behind."""
        rows = self.reader.db.execute(
            "SELECT reading.agent, topics.name, sum(heads.next - coalesce((SELECT position"
            " FROM positions JOIN agents ON agents.id = positions.agent"
            " WHERE agents.name = reading.agent AND positions.tp = heads.tp), 0))"
            " FROM reading JOIN topics ON topics.name = reading.topic"
            " JOIN heads ON heads.tp >= first_tp AND heads.tp < first_tp + partitions"
            " GROUP BY 1, 2"
        )
        return {f"{agent} {topic}": behind for agent, topic, behind in rows if behind}

    def topic(self, name: str) -> list[list[Row]]:
        """Every event of a topic, by partition, in order."""
        self.reader.catalog.load(self.reader.db)
        if name not in self.reader.catalog.topics:
            return []
        return [self._partition(name, p) for p in range(self._partitions(name))]

    def _partitions(self, name: str) -> int:
        return int(self.reader.catalog.topics[name].partitions)

    def _partition(self, name: str, partition: int) -> list[Row]:
        rows: list[Row] = []
        position = 0
        while batch := self.reader.fetch(name, partition, position, 10_000, 1 << 24):
            headers = batch.headers or [[]] * len(batch.values)
            for key, value, header in zip(batch.keys, batch.values, headers, strict=True):
                rows.append(
                    {
                        "key": (key or b"").decode(),
                        "value": json.loads(value or b"null"),
                        "headers": dict(header),
                    }
                )
            position = batch.end
        return rows

    def table(self, name: str, partitions: int) -> dict[tuple[int, str], Any]:
        """Every row of a table: (partition, key) → value."""
        return {
            (partition, json.loads(key)): json.loads(value)
            for partition in range(partitions)
            for key, value in self.reader.rows(name, partition, after=None, limit=1_000_000)
            if key != SCATTERED_MARK
        }

    def dead_letters(self) -> list[Row]:
        """Every dead letter of the app."""
        return [row for rows in self.topic("proj-dead-letters") for row in rows]

    def damage(self) -> list[str]:
        """What is wrong with the file itself. The instance is stopped."""
        writer = Writer(self._datadir, 4)
        try:
            answer = writer.db.execute("PRAGMA integrity_check").fetchall()
        finally:
            writer.close()
        return [] if answer == [("ok",)] else [f"integrity_check: {answer[:3]}"]
