"""Every write to the embedded log, as steps of one thread.

All is encoded before the turn is taken; inside the turn nothing waits and no user code runs, so
a turn lasts about 20 µs, 0.3 µs an event and 2 µs a changed row. Rows are written many to a
statement: each statement is a point where the interpreter's lock must be had again, and while
the loop is busy that costs a switch interval.
"""

import contextlib
import functools
import itertools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import apsw

from streamd.agentproc.broker import TP, Checkpoint, Output, Subscription
from streamd.agentproc.broker.beginning import beginning
from streamd.agentproc.broker.bell import Ringer
from streamd.agentproc.broker.catalog import Catalog, Topic
from streamd.agentproc.broker.pack import Pack, encode_packs, seal
from streamd.agentproc.broker.schema import OFFSET_BITS, connect, explained, log_path, query
from streamd.agentproc.broker.turnstile import Turnstile
from streamd.agentproc.broker.watermark import Watermark
from streamd.errors import BrokerError, ConfigError, Fenced, LogDamaged, StreamdError
from streamd.failpoints import failpoint
from streamd.wire import GroupInfo, TableInfo, TopicInfo

log = logging.getLogger(__name__)

MAX_TP = 1 << (63 - OFFSET_BITS)
_ROWS_A_STATEMENT = (256, 64, 16, 4, 1)


class Claim(NamedTuple):
    """A slot's right to commit: valid while every partition has its epoch."""

    group: str
    group_id: int
    epoch: int
    partitions: list[int]
    positions: dict[tuple[str, TP], int]


class _Encoded(NamedTuple):
    tp: TP
    tp_id: int
    packs: list[Pack]


class Writer:
    """The writing connection of one process. Blocks; used by one thread at a time.

    Raises:
        BrokerError: The log cannot be opened; LogDamaged: it cannot be trusted.
    """

    def __init__(self, datadir: Path, default_partitions: int) -> None:
        self.path = log_path(datadir)
        self.default_partitions = default_partitions
        self.turnstile = Turnstile(datadir)
        self.db = connect(datadir, self.turnstile)
        self.catalog = Catalog()
        self.catalog.load(self.db)
        self.ringer = Ringer()
        self.watermark = Watermark(datadir)
        self._full = False  # synchronous=FULL is set
        self._pid = os.getpid()

    def close(self) -> None:
        self.db.close()
        self.turnstile.close()
        self.ringer.close()
        self.watermark.close()

    # Checkpoints and appends.

    def commit(self, checkpoint: Checkpoint, claim: Claim | None) -> list[int]:
        """Write a checkpoint whole, or nothing of it; the first offset of each output.

        Raises:
            Fenced: The claim is not valid any more.
            BrokerError: Nothing was written.
        """
        failpoint("commit.before-encode")
        encoded = [
            _Encoded(output.tp, self._tp_id(output.tp), encode_packs(output))
            for output in checkpoint.outputs
        ]
        written: list[Any] = []
        deleted: list[tuple[int, int, list[bytes]]] = []
        for change in checkpoint.changes:
            table_id = self._table_id(change.table)
            keys = []
            for key, value in change.rows:
                if value is None:
                    keys.append(key)
                else:
                    written += (table_id, change.partition, key, value)
            if keys:
                deleted.append((table_id, change.partition, keys))
        positions: list[Any] = []
        for (agent, tp), position in checkpoint.positions.items():
            positions += (self._agent_id(agent), self._tp_id(tp), position)
        failpoint("commit.before-turnstile")

        with self._turn(checkpoint.durable):
            self._check_claim(claim)
            failpoint("commit.after-begin")
            firsts, ends = self._append(encoded)
            failpoint("commit.after-outputs")
            _insert(self.db, "INSERT OR REPLACE INTO rows VALUES ", 4, written)
            for table_id, partition, keys in deleted:
                _delete_rows(self.db, table_id, partition, keys)
            failpoint("commit.after-tables")
            _insert(self.db, "INSERT OR REPLACE INTO positions VALUES ", 3, positions)
            failpoint("commit.after-positions")
            failpoint("commit.before-commit")
            self.db.execute("COMMIT")
            failpoint("commit.after-commit")
            if checkpoint.durable:
                self._acknowledge(ends)
        failpoint("commit.after-leave")
        self.ringer.ring({output.tp for output in encoded})
        failpoint("commit.after-wake")
        return firsts

    def append(self, outputs: Sequence[Output], durable: bool) -> list[int]:
        """Append outside any checkpoint; the first offset of each output."""
        return self.commit(Checkpoint(outputs=list(outputs), durable=durable), None)

    def _check_claim(self, claim: Claim | None) -> None:
        group_id, epoch = (claim.group_id, claim.epoch) if claim else (0, 0)
        held, bells = query(
            self.db,
            "SELECT (SELECT count(*) FROM claims WHERE grp = ? AND epoch = ?),"
            " (SELECT value FROM meta WHERE name = 'bells')",
            (group_id, epoch),
        )[0]
        if claim and claim.partitions and held != len(claim.partitions):
            raise Fenced(
                f"{claim.group} lost {len(claim.partitions) - held} of its partitions "
                f"{claim.partitions} to another process; nothing was written",
                remedy="this process must end; its successor has the work",
            )
        self.ringer.refresh(self.db, bells)

    def _append(self, encoded: list[_Encoded]) -> tuple[list[int], dict[int, int]]:
        if not encoded:
            return [], {}
        tp_ids = list({output.tp_id for output in encoded})
        marks = ",".join("?" * len(tp_ids))
        ends: dict[int, int] = dict(
            query(self.db, f"SELECT tp, next FROM heads WHERE tp IN ({marks})", tp_ids)
        )
        sizes = dict.fromkeys(tp_ids, 0)
        now = time.time()
        firsts: list[int] = []
        packs: list[Any] = []
        for output in encoded:
            tp_id, offset = output.tp_id, ends[output.tp_id]
            firsts.append(offset)
            for count, checksum, data in output.packs:
                id = tp_id << OFFSET_BITS | offset
                packs += (id, count, now, seal(checksum, id, count), data)
                offset += count
                sizes[tp_id] += len(data)
            ends[tp_id] = offset
        _insert(self.db, "INSERT INTO packs VALUES ", 5, packs)
        _insert(
            self.db,
            "INSERT INTO heads VALUES ",
            4,
            [part for tp_id in tp_ids for part in (tp_id, 0, ends[tp_id], sizes[tp_id])],
            " ON CONFLICT (tp) DO UPDATE SET next = excluded.next,"
            " bytes = bytes + excluded.bytes",
        )
        return firsts, ends

    def _acknowledge(self, ends: dict[int, int]) -> None:
        try:
            self.watermark.raise_to(ends)
        except OSError as error:
            # The events are on the disk; a mark that is too low misleads nobody.
            log.warning("%s was not written: %s", self.watermark.path, error.strerror)

    # Claims.

    def claim(self, subscription: Subscription, address: str) -> Claim:
        """Take the slot's partitions; who had them before can commit no more."""
        failpoint("open.before-claim")
        topics = sorted({topic for names in subscription.agents.values() for topic in names})
        group = f"{subscription.app_id}.{subscription.group}"
        with self.transaction():
            for topic in topics:
                if topic not in self.catalog.topics:
                    self._make_topic(TopicInfo(topic, 0, False, None, "", ""))
            for table, partitions in subscription.tables.items():
                self._make_table(table, partitions)
            partitions_had = sorted(
                {
                    partition
                    for count in itertools.chain(
                        (self.catalog.topics[topic].partitions for topic in topics),
                        subscription.tables.values(),
                    )
                    for partition in subscription.partitions(count)
                }
            )
            group_id = self._intern("groups", self.catalog.groups, group)
            epoch = self._raise_epoch(group_id, partitions_had)
            positions = self._take_up(subscription)
            self._note_bell(group_id, subscription, topics, address)
            failpoint("open.inside-claim")
        failpoint("open.after-claim")
        return Claim(group, group_id, epoch, partitions_had, positions)

    def _raise_epoch(self, group_id: int, partitions: list[int]) -> int:
        # The epoch is new in the whole group, so counting the rows that have it tells whether
        # all of a claim still stands.
        epoch: int = query(
            self.db, "SELECT coalesce(max(epoch), 0) + 1 FROM claims WHERE grp = ?", (group_id,)
        )[0][0]
        _insert(
            self.db,
            "INSERT OR REPLACE INTO claims VALUES ",
            3,
            [part for p in partitions for part in (group_id, p, epoch)],
        )
        return epoch

    def _take_up(self, subscription: Subscription) -> dict[tuple[str, TP], int]:
        positions: dict[tuple[str, TP], int] = {}
        for agent, names in subscription.agents.items():
            agent_id = self._intern("agents", self.catalog.agents, agent)
            wanted = {
                topic.first_tp + partition: TP(topic.name, partition)
                for topic in map(self.catalog.topics.__getitem__, names)
                for partition in subscription.partitions(topic.partitions)
            }
            marks = ",".join("?" * len(wanted))
            found = query(
                self.db,
                "SELECT tp, (SELECT position FROM positions WHERE agent = ? AND tp = heads.tp),"
                f" low, next FROM heads WHERE tp IN ({marks})",
                (agent_id, *wanted),
            )
            taken = {
                tp_id: beginning(
                    subscription.resets.get(wanted[tp_id].topic, "earliest"),
                    agent,
                    wanted[tp_id],
                    low,
                    end,
                )
                if stored is None
                else _next_position(agent, wanted[tp_id], stored, low, end)
                for tp_id, stored, low, end in found
            }
            positions.update({(agent, tp): taken[tp_id] for tp_id, tp in wanted.items()})
            # A first one too, so that retention keeps what this agent has not read.
            changed = {tp_id: taken[tp_id] for tp_id, stored, _, _ in found
                       if stored != taken[tp_id]}  # fmt: skip
            _insert(
                self.db,
                "INSERT OR REPLACE INTO positions VALUES ",
                3,
                [part for tp_id, at in changed.items() for part in (agent_id, tp_id, at)],
            )
        return positions

    def _note_bell(
        self, group_id: int, subscription: Subscription, topics: list[str], address: str
    ) -> None:
        slot, slots = subscription.slot, subscription.slots
        self.db.execute(
            "DELETE FROM bells WHERE grp = ? AND (slot = ? OR slot >= ?)",
            (group_id, slot, slots),
        )
        _insert(
            self.db,
            "INSERT INTO bells VALUES ",
            5,
            [part for topic in topics for part in (group_id, slot, slots, topic, address)],
        )
        self.db.execute("UPDATE meta SET value = value + 1 WHERE name = 'bells'")

    # Topics and tables.

    def declare(
        self, topics: list[TopicInfo], tables: list[TableInfo], groups: list[GroupInfo]
    ) -> None:
        """Make what an app names; note which agent reads what, for retention.

        Raises:
            ConfigError: A topic or table is there with another number of partitions.
        """
        with self.transaction(durable=True):
            for topic in topics:
                self._make_topic(topic)
            for table in tables:
                self._make_table(table.name, table.partitions)
            self.db.execute("DELETE FROM reading")
            for group in groups:
                for agent in group.agents:
                    for name in agent.topics:
                        self.db.execute(
                            "INSERT OR IGNORE INTO reading VALUES (?, ?)", (agent.name, name)
                        )

    def make_topic(self, name: str) -> Topic:
        """The topic of this name, made with the default number of partitions if need be."""
        if name not in self.catalog.topics:
            with self.transaction():
                self._make_topic(TopicInfo(name, 0, False, None, "", ""))
        return self.catalog.topics[name]

    def _make_topic(self, wanted: TopicInfo) -> None:
        there = self.catalog.topics.get(wanted.name)
        if there is not None:
            if wanted.partitions not in (0, there.partitions):
                raise _changed("topic", wanted.name, there.partitions, wanted.partitions)
            self.db.execute(
                "UPDATE topics SET owned = ?, retention_s = ? WHERE id = ?",
                (wanted.owned, wanted.retention_s, there.id),
            )
            self.catalog.topics[wanted.name] = there._replace(
                owned=wanted.owned, retention_s=wanted.retention_s
            )
            return
        count = wanted.partitions or self.default_partitions
        first: int = query(
            self.db, "SELECT coalesce(max(first_tp + partitions), 1) FROM topics"
        )[0][0]
        if first + count > MAX_TP:
            raise ConfigError(
                f"the log has {first} partitions; {count} more for topic {wanted.name!r} are "
                f"more than {MAX_TP}",
                remedy="use fewer partitions",
            )
        self.db.execute(
            "INSERT INTO topics (name, partitions, first_tp, owned, retention_s)"
            " VALUES (?, ?, ?, ?, ?)",
            (wanted.name, count, first, wanted.owned, wanted.retention_s),
        )
        _insert(
            self.db,
            "INSERT INTO heads VALUES ",
            4,
            [part for tp_id in range(first, first + count) for part in (tp_id, 0, 0, 0)],
        )
        self.catalog.topics[wanted.name] = Topic(
            self.db.last_insert_rowid(),
            wanted.name,
            count,
            first,
            wanted.owned,
            wanted.retention_s,
        )

    def _make_table(self, name: str, partitions: int) -> None:
        there = self.catalog.tables.get(name)
        if there is None:
            self.db.execute(
                "INSERT INTO tables (name, partitions) VALUES (?, ?)", (name, partitions)
            )
            self.catalog.tables[name] = (self.db.last_insert_rowid(), partitions)
        elif there[1] != partitions:
            raise _changed("table", name, there[1], partitions)

    def _tp_id(self, tp: TP) -> int:
        if (id := self.catalog.tp_id(tp)) is not None:
            return id
        # Another process may have made the topic since.
        self.catalog.load(self.db)
        topic = self.make_topic(tp.topic)
        if not 0 <= tp.partition < topic.partitions:
            raise BrokerError(
                f"topic {tp.topic!r} has the partitions 0 to {topic.partitions - 1}, "
                f"not {tp.partition}"
            )
        return topic.first_tp + tp.partition

    def _table_id(self, name: str) -> int:
        if name not in self.catalog.tables:
            self.catalog.load(self.db)
        if name not in self.catalog.tables:
            raise BrokerError(f"the log has no table {name!r}: it was not declared")
        return self.catalog.tables[name][0]

    def _agent_id(self, name: str) -> int:
        if (id := self.catalog.agents.get(name)) is not None:
            return id
        with self.transaction():
            return self._intern("agents", self.catalog.agents, name)

    def _intern(self, table: str, known: dict[str, int], name: str) -> int:
        if name not in known:
            self.db.execute(f"INSERT INTO {table} (name) VALUES (?)", (name,))
            known[name] = self.db.last_insert_rowid()
        return known[name]

    # The turn.

    @contextlib.contextmanager
    def transaction(self, durable: bool = False) -> Iterator[apsw.Connection]:
        """A turn with a transaction that sees the catalog as it is; commits at the end."""
        with self._turn(durable):
            self.catalog.load(self.db)
            try:
                yield self.db
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                self.catalog.load(self.db)
                raise

    @contextlib.contextmanager
    def _turn(self, durable: bool) -> Iterator[None]:
        # Whoever enters commits; what is not committed on the way out is rolled back.
        if os.getpid() != self._pid:
            raise BrokerError(
                f"the log was opened by pid {self._pid} and is used by pid {os.getpid()}, "
                "which was forked from it",
                remedy="use the app's topics and tables in the agent's own process only",
            )
        try:
            if durable != self._full:
                self.db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                self._full = durable
            self.turnstile.enter()
            try:
                failpoint("commit.before-begin")
                self.db.execute("BEGIN IMMEDIATE")
                yield
            finally:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                self.turnstile.leave()
        except apsw.Error as error:
            raise explained(error, self.path) from error


def _changed(kind: str, name: str, there: int, wanted: int) -> StreamdError:
    return ConfigError(
        f"{kind} {name!r} has {there} partitions in the log, the app says {wanted}: "
        "their number cannot change",
        remedy=f"give it {there} partitions again, or start with another --datadir",
    )


@functools.cache
def _values(prefix: str, width: int, count: int, suffix: str) -> str:
    row = "(" + ",".join("?" * width) + ")"
    return prefix + ",".join([row] * count) + suffix


def _next_position(agent: str, tp: TP, stored: int, low: int, end: int) -> int:
    """Where an agent goes on that was at `stored`, in a log that reaches from `low` to `end`.

    Raises:
        LogDamaged: The log ends before that.
    """
    if stored > end:
        raise LogDamaged(
            f"{agent} has worked on {tp} up to {stored}, but the log ends at {end}: "
            "events are gone",
            remedy="restore a copy of the data directory, or streamd reset",
        )
    if stored < low:
        log.warning(
            "%s was at %s@%d, which is not kept any more; it goes on at %d",
            agent,
            tp,
            stored,
            low,
        )
    return max(stored, low)


def _insert(
    db: apsw.Connection, prefix: str, width: int, flat: list[Any], suffix: str = ""
) -> None:
    """Insert the rows whose values lie one after the other in `flat`."""
    start, end = 0, len(flat)
    for count in _ROWS_A_STATEMENT:
        size = count * width
        while end - start >= size:
            db.execute(_values(prefix, width, count, suffix), flat[start : start + size])
            start += size


def _delete_rows(db: apsw.Connection, table_id: int, partition: int, keys: list[bytes]) -> None:
    start = 0
    for count in _ROWS_A_STATEMENT:
        while len(keys) - start >= count:
            db.execute(
                _values("DELETE FROM rows WHERE tid = ? AND part = ? AND k IN ", count, 1, ""),
                (table_id, partition, *keys[start : start + count]),
            )
            start += count
