"""What the log holds by name: topics, tables, agents, groups, and their ids.

A copy in memory of small tables that only grow. Each connection has its own.
"""

from typing import NamedTuple

import apsw

from streamd.agentproc.broker import TP
from streamd.agentproc.broker.schema import query_once


class Topic(NamedTuple):
    """A topic of the log; its partition p has the id first_tp + p."""

    id: int
    name: str
    partitions: int
    first_tp: int
    owned: bool
    retention_s: float | None


class Catalog:
    """Names and ids as the log had them at the last `load`."""

    def __init__(self) -> None:
        self.topics: dict[str, Topic] = {}
        self.agents: dict[str, int] = {}
        self.groups: dict[str, int] = {}
        self.tables: dict[str, tuple[int, int]] = {}  # name -> id, partitions

    def load(self, db: apsw.Connection) -> None:
        """Read all of it anew."""
        topics = query_once(
            db,
            "SELECT id, name, partitions, first_tp, owned, retention_s FROM topics ORDER BY id",
        )
        self.topics = {
            row[1]: Topic(row[0], row[1], row[2], row[3], bool(row[4]), row[5])
            for row in topics
        }
        self.agents = dict(query_once(db, "SELECT name, id FROM agents"))
        self.groups = dict(query_once(db, "SELECT name, id FROM groups"))
        self.tables = {
            name: (id, partitions)
            for name, id, partitions in query_once(
                db, "SELECT name, id, partitions FROM tables"
            )
        }

    def tp_id(self, tp: TP) -> int | None:
        """The id of a partition; None if there is no such one."""
        topic = self.topics.get(tp.topic)
        if topic is None or not 0 <= tp.partition < topic.partitions:
            return None
        return topic.first_tp + tp.partition

    def tp_of(self, tp_id: int) -> TP:
        """The partition that has this id; "?" for the topic when the log has none."""
        for topic in self.topics.values():
            if 0 <= tp_id - topic.first_tp < topic.partitions:
                return TP(topic.name, tp_id - topic.first_tp)
        return TP("?", tp_id)
