"""What the log may forget.

A topic that the app owns keeps what one of its reading agents has not committed, and, if it has
a retention of its own, what is younger. A named topic, and one that nobody reads, keeps what is
younger than its retention, or that of the settings, and what a reading agent has not committed.
An event's age counts from when it was appended, whatever timestamp it has: an old event that is
read in anew is kept as long as any other. Whole packs go, a few in a turn.
"""

import math
from typing import Any

from streamd.agentproc.broker.catalog import Topic
from streamd.agentproc.broker.reader import OFFSET_MASK
from streamd.agentproc.broker.schema import OFFSET_BITS, query
from streamd.agentproc.broker.writer import Writer
from streamd.failpoints import failpoint

PACKS_A_TURN = 64


def trim_step(writer: Writer, now: float, usual_s: float | None) -> bool:
    """Delete up to 64 packs of each partition that has some to forget, in one turn.

    Args:
        now: unix seconds.
        usual_s: How long topics keep their records that name no time; None: for ever.

    Returns:
        True if there is more to delete.
    """
    old: list[tuple[int, int, int]] = []
    more = False
    for topic in writer.catalog.topics.values():
        for tp_id, low, limit, cutoff in _limits(writer, topic, now, usual_s):
            packs = _old_packs(writer, tp_id, limit, cutoff)
            if packs:
                new_low = (packs[-1][0] & OFFSET_MASK) + packs[-1][1]
                old.append((tp_id, max(low, new_low), sum(pack[2] for pack in packs)))
                more = more or len(packs) == PACKS_A_TURN
    if not old:
        return False
    with writer.transaction() as db:
        for tp_id, low, size in old:
            first = tp_id << OFFSET_BITS
            db.execute("DELETE FROM packs WHERE id >= ? AND id < ?", (first, first | low))
            db.execute(
                "UPDATE heads SET low = ?, bytes = bytes - ? WHERE tp = ?", (low, size, tp_id)
            )
        failpoint("trim.before-commit")
    return more


def _limits(
    writer: Writer, topic: Topic, now: float, usual_s: float | None
) -> list[tuple[int, int, int, float]]:
    """For each partition: id, low, the offset that stays, the age that stays (exclusive)."""
    readers = [
        agent
        for (agent,) in query(
            writer.db, "SELECT agent FROM reading WHERE topic = ?", (topic.name,)
        )
    ]
    cutoff = math.inf
    if topic.retention_s is not None:
        cutoff = now - topic.retention_s
    elif not (topic.owned and readers):
        cutoff = -math.inf if usual_s is None else now - usual_s
    # An agent that has no position yet has read nothing.
    committed: list[Any] = query(
        writer.db,
        "SELECT tp, low, next, (SELECT min(coalesce("
        "  (SELECT position FROM positions JOIN agents ON agents.id = positions.agent"
        "   WHERE agents.name = reading.agent AND positions.tp = heads.tp), 0))"
        " FROM reading WHERE reading.topic = ?) FROM heads WHERE tp >= ? AND tp < ?",
        (topic.name, topic.first_tp, topic.first_tp + topic.partitions),
    )
    return [
        (tp_id, low, end if limit is None else limit, cutoff)
        for tp_id, low, end, limit in committed
    ]


def _old_packs(
    writer: Writer, tp_id: int, limit: int, cutoff: float
) -> list[tuple[int, int, int]]:
    """The oldest packs (id, count, bytes) that lie below the limit and the cutoff."""
    first = tp_id << OFFSET_BITS
    packs = query(
        writer.db,
        "SELECT id, n, length(data), appended_at FROM packs WHERE id >= ? AND id < ?"
        " ORDER BY id LIMIT ?",
        (first, first | limit, PACKS_A_TURN),
    )
    old = []
    for id, count, size, appended_at in packs:
        if (id & OFFSET_MASK) + count > limit or appended_at >= cutoff:
            break
        old.append((id, count, size))
    return old
