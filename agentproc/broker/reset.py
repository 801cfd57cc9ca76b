"""Forgetting tables and positions, so that agents work through the log again."""

from pathlib import Path

from streamd.agentproc.broker import TP
from streamd.agentproc.broker.client import locked
from streamd.agentproc.broker.schema import query
from streamd.agentproc.broker.writer import Writer


def reset(datadir: Path, tables: list[str], agents: list[str]) -> dict[TP, int]:
    """Delete all rows of `tables` and set `agents` back, in one transaction.

    Args:
        tables: Names as the app has them; one that the log does not have is ignored.
        agents: Agents' names, e.g. `proj.count_words`.

    Returns:
        The offset that each partition which these agents read will be read from: the oldest
        that the log retains.

    Raises:
        Busy: The instance runs.
        LogDamaged: The log cannot be trusted.
        BrokerError: Nothing was deleted.
    """
    with locked(datadir):
        writer = Writer(datadir, default_partitions=1)
        try:
            with writer.transaction(durable=True) as db:
                for table in tables:
                    id, _ = writer.catalog.tables.get(table, (-1, 0))
                    db.execute("DELETE FROM rows WHERE tid = ?", (id,))
                marks = ",".join("?" * len(agents))
                read = query(
                    db,
                    "SELECT DISTINCT heads.tp, low FROM heads JOIN positions USING (tp)"
                    " JOIN agents ON agents.id = positions.agent"
                    f" WHERE agents.name IN ({marks}) ORDER BY heads.tp",
                    agents,
                )
                # Not deleted: without one an agent may begin at the end of its topic.
                db.execute(
                    "UPDATE positions SET position ="
                    " (SELECT low FROM heads WHERE heads.tp = positions.tp) WHERE agent IN"
                    f" (SELECT id FROM agents WHERE name IN ({marks}))",
                    agents,
                )
            return {writer.catalog.tp_of(tp_id): low for tp_id, low in read}
        finally:
            writer.close()
