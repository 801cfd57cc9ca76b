"""Taking partitions over: what counts of them, and making sure that nothing else ever will.

1. Read the markers to their end: the newest incarnation's last one says what counts.
2. Read each changelog to its end, with transactions to one behind which none is open, where a
   local store has its rows only what came since: rows that count make the table; keys that have
   later rows, written by an owner that died before its marker, are repaired: the row that
   counts is written again.
3. Claim: a marker of a new incarnation, with the changelogs' ends as its starts. From there on
   only rows of this incarnation count.
4. Read the markers again, until the claim is among them: with transactions that is when those
   of others that were open before it have ended. If it does not count, begin again.

Everything here blocks; it is run in a thread, with a consumer that is in no group, so that no
rebalance disturbs it.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from streamd.agentproc.broker import TP
from streamd.agentproc.kafka.beginning import first_positions, forgetting
from streamd.agentproc.kafka.health import Health
from streamd.agentproc.kafka.markers import (
    NOBODY,
    STAMP_BYTES,
    Incarnation,
    Marker,
    decode_marker,
    encode_marker,
    marker_key,
    newest,
)
from streamd.agentproc.kafka.options import Options
from streamd.agentproc.kafka.producing import STAMP_HEADER, Row
from streamd.agentproc.kafka.reading import Message
from streamd.agentproc.kafka.storing import LocalTables
from streamd.agentproc.kafka.topics import AWAY_CODES
from streamd.agentproc.store.rows import Rows
from streamd.errors import BrokerError, BrokerLost, ConfigError, Fenced
from streamd.failpoints import failpoint

log = logging.getLogger(__name__)

CHUNK_RECORDS = 1000  # more at a time are slower: they do not stay in the cache
QUIET_S = 30.0  # nothing came though something is there
PROGRESS_S = 1.0
TRIES = 5
PAUSE_S = 0.1
MOMENT_S = 0.02  # a topic that has just been made has its leaders soon


class Extent(NamedTuple):
    """What a partition holds: from `low` up to, and without, `high`."""

    low: int
    high: int


@dataclass(slots=True)
class Taken:
    """A partition of a group that was taken over."""

    marker: Marker  # this incarnation's claim
    sources: dict[str, Extent]  # topic -> what it holds
    rows: dict[str, Rows]  # table -> what it holds
    ends: dict[str, int] = field(default_factory=dict)  # changelog -> its end after the claim


class Home(NamedTuple):
    """Where a group keeps what it has."""

    sources: list[str]  # topics that it reads
    markers: str  # topic
    changelogs: dict[str, str]  # table -> topic
    transactional: bool  # offsets are taken up by the marks of transactions as well
    packed: frozenset[str]  # of the sources, those that are trimmed behind the group
    agents: Mapping[str, list[str]] = MappingProxyType({})  # agent -> topics
    resets: Mapping[str, str] = MappingProxyType(
        {}
    )  # topic -> where an agent without a position begins
    matched: frozenset[str] = frozenset()  # of the sources, those that a pattern means


class Recovery:
    """Takes partitions over; made for one such run, and closed after it.

    Args:
        put: Makes records durable; blocks.
        progress: Told each second how far it is.
        handed: The offsets of partitions of which no marker tells, where somebody else has
            committed any.
        local: Has what is on this machine's disk.
        ids: Of sources and changelogs: one that was made anew is another topic.
        ids_of: Tells the ids of other topics, those that are there.
    """

    def __init__(
        self,
        options: Options,
        home: Home,
        put: Callable[[list[Row]], None],
        health: Health,
        progress: Callable[[str], None],
        handed: Callable[[list[TP]], dict[TP, int]] = lambda tps: {},
        local: LocalTables | None = None,
        ids: Mapping[str, str] = MappingProxyType({}),
        ids_of: Callable[[set[str]], dict[str, str]] = lambda names: {},
    ) -> None:
        self._local = local
        self._ids = dict(ids)
        self._ids_of = ids_of
        self._home = home
        self._put = put
        self._health = health
        self._progress = progress
        self._handed = handed
        self._consumer = Consumer(options)
        self._uncommitted: Consumer | None = None
        if home.transactional:
            self._uncommitted = Consumer({**options, "isolation.level": "read_uncommitted"})
        self.stored_rows = 0  # that were found in stores
        self.read_rows = 0  # that were read from changelogs

    def close(self) -> None:
        """Let go of the connection."""
        self._consumer.close()
        if self._uncommitted is not None:
            self._uncommitted.close()

    def take(self, partitions: Iterable[int]) -> dict[int, Taken]:
        """Take partitions over; what counts of each.

        Raises:
            Fenced: Others take them over at the same time, again and again.
            BrokerError: The cluster does not let it.
        """
        taken: dict[int, Taken] = {}
        left = list(partitions)
        for number in range(TRIES):
            if not left:
                return taken
            time.sleep(number * PAUSE_S)
            tried = self._take(left)
            taken |= tried
            left = [partition for partition in left if partition not in tried]
            if left:
                log.warning("partitions %s were written by another owner; trying again", left)
        if left:
            raise Fenced(f"the partitions {left} are taken over by another process each time")
        return taken

    def _take(self, partitions: list[int]) -> dict[int, Taken]:
        home = self._home
        # All ends in this order, before anything is fetched: behind a fetch they would wait.
        # Whatever a marker below its end covers lies below the ends that are asked for later.
        ends = self._ends(TP(home.markers, partition) for partition in partitions)
        tables = self._whole_ends(
            TP(topic, partition)
            for topic in home.changelogs.values()
            for partition in partitions
        )
        sources = self._ends(
            TP(topic, partition) for topic in home.sources for partition in partitions
        )
        found = self._markers(ends)
        before = {
            partition: self._of_these_topics(newest(found[partition]), partition)
            for partition in partitions
        }
        failpoint("kafka.before-restore")
        rows, repairs = self._rows(before, tables)
        failpoint("kafka.before-repair")
        new = [tp for tp in sources if before[tp.partition].incarnation == NOBODY]
        handed = self._handed(new) if new else {}
        for partition in partitions:
            self._refuse_unknown(before[partition], partition, sources, handed)
        # Above whatever there is: also above claims that came to nothing.
        successors = {
            p: max((m.incarnation for m in found[p]), default=NOBODY).successor()
            for p in partitions
        }
        self._put(
            [
                Row(tp.topic, tp.partition, key, _stamped(value, successors[tp.partition]),
                    successors[tp.partition].stamp(0))
                for tp, changed in repairs.items()
                for key, value in changed.items()
            ]
        )  # fmt: skip
        after = self._ends(tables)
        taken: dict[int, Taken] = {}
        claims: list[Row] = []
        for partition in partitions:
            logs = {tp.topic: after[tp].high for tp in tables if tp.partition == partition}
            if not home.transactional and any(
                after[tp].high != tables[tp].high + len(repairs.get(tp, ()))
                for tp in tables
                if tp.partition == partition
            ):
                continue  # somebody wrote in between
            claim = msgspec.structs.replace(
                before[partition],
                incarnation=successors[partition],
                number=0,
                starts=logs,
                # First ones are kept at once: the end of a topic is another one later.
                positions=first_positions(
                    before[partition],
                    partition,
                    home.agents,
                    home.resets,
                    sources,
                    handed,
                    home.matched,
                ),
                topics=dict(self._ids),
                moment=time.time(),
                over=before[partition].incarnation,
                over_number=before[partition].number,
            )
            key = marker_key(claim.incarnation)
            claims.append(Row(home.markers, partition, key, encode_marker(claim)))
            tables_of = {
                table: rows[TP(topic, partition)] for table, topic in home.changelogs.items()
            }
            holds = {topic: sources[TP(topic, partition)] for topic in home.sources}
            taken[partition] = Taken(claim, holds, tables_of, logs)
        failpoint("kafka.before-claim")
        self._put(claims)
        failpoint("kafka.after-claim")
        self._drop_rivals(taken, ends, found)
        return taken

    def _of_these_topics(self, before: Marker, partition: int) -> Marker:
        """What counts of it where topics were deleted and made anew since.

        Raises:
            ConfigError: A table's rows went with its changelog.
        """
        if not self._ids:
            return before
        if unread := before.topics.keys() - self._ids.keys():
            self._ids |= self._ids_of(unread)
        gone = before.topics.keys() - self._ids.keys()
        anew = {topic for topic, id in before.topics.items() if self._ids.get(topic, id) != id}
        for table, topic in self._home.changelogs.items():
            if topic in anew and before.positions:
                raise ConfigError(
                    f"topic {topic!r} was deleted and made anew: the rows of table {table!r} "
                    "are gone, and the group is further than its first event",
                    remedy="`streamd reset` makes them again of what the topics still hold",
                )
        for topic in sorted(anew.intersection(self._home.sources)):
            log.warning(
                "%s[%d] was deleted and made anew; it is read from its beginning",
                topic, partition,
            )  # fmt: skip
        return forgetting(before, anew, gone)

    def _refuse_unknown(
        self,
        before: Marker,
        partition: int,
        sources: dict[TP, Extent],
        handed: dict[TP, int],
    ) -> None:
        """Without markers a group begins where its topics begin; those must be whole."""
        if before.incarnation != NOBODY:
            return
        for topic in sorted(self._home.packed):
            tp = TP(topic, partition)
            if tp not in handed and (low := sources[tp].low):
                raise ConfigError(
                    f"{topic}[{partition}] begins at offset {low}: what was before was read, "
                    f"and {self._home.markers} does not say how far",
                    remedy="`streamd reset` begins with what is left; or give the agent "
                    "the group that it had, with group=",
                )

    def _drop_rivals(
        self, taken: dict[int, Taken], ends: dict[TP, Extent], before: dict[int, list[Marker]]
    ) -> None:
        """See whether each claim counts; forget the markers of all who were before it."""
        home = self._home
        mine = {tp: extent for tp, extent in ends.items() if tp.partition in taken}
        again = self._markers_with_claims(taken, mine)
        old: list[Row] = []
        for partition in list(taken):
            claim = taken[partition].marker
            markers = [*before[partition], *again[partition]]
            if newest(markers).incarnation != claim.incarnation:
                del taken[partition]
                continue
            done = {m.incarnation for m in markers} - {claim.incarnation}
            old += [Row(home.markers, partition, marker_key(each), None) for each in done]
        self._put(old)

    def _markers_with_claims(
        self, taken: dict[int, Taken], ends: dict[TP, Extent]
    ) -> dict[int, list[Marker]]:
        """The markers behind those that were read, once the claims are among them."""
        asked_at = time.monotonic()
        while True:
            found = self._markers(
                {tp: Extent(e.high, self._high(tp)) for tp, e in ends.items()}
            )
            unseen = [
                p for p, each in taken.items()
                if all(m.incarnation != each.marker.incarnation for m in found[p])
            ]  # fmt: skip
            if not unseen:
                return found
            if time.monotonic() - asked_at > PROGRESS_S:
                self._progress(
                    f"waits for transactions of others that are open in partitions {unseen}"
                )
                asked_at = time.monotonic()
            time.sleep(PAUSE_S)

    # Reading.

    def _markers(self, extents: dict[TP, Extent]) -> dict[int, list[Marker]]:
        found: dict[int, list[Marker]] = {tp.partition: [] for tp in extents}
        for tp, records in self._records(extents, "markers"):
            for value in filter(None, [record.value() for record in records]):
                try:
                    found[tp.partition].append(decode_marker(value))
                except msgspec.DecodeError as error:
                    raise BrokerError(
                        f"{tp} holds a record that is no marker: {error}",
                        remedy=f"find who writes to {tp.topic!r}; only streamd does",
                    ) from None
        return found

    def _rows(
        self, before: dict[int, Marker], extents: dict[TP, Extent]
    ) -> tuple[dict[TP, Rows], dict[TP, dict[bytes, bytes | None]]]:
        """The rows that count, and what is to be written again for those that came later."""
        rows, unread = self._stored(before, extents)
        late: dict[TP, set[bytes]] = {}
        for tp, records in self._records(unread, "rows"):
            self.read_rows += len(records)
            marker, changes = before[tp.partition], rows[tp].changes
            start = marker.starts.get(tp.topic, 0)
            if records[-1].offset() < start:
                # All of them count. This loop is what the time of a recovery goes to.
                for record in records:
                    value = record.value()
                    changes[record.key()] = None if value is None else value[STAMP_BYTES:]
                continue
            first, last = marker.incarnation.stamp(0), marker.incarnation.stamp(marker.number)
            for record in records:
                key, value = record.key(), record.value()
                stamp = stamp_of(record.headers()) if value is None else value[:STAMP_BYTES]
                if record.offset() < start or first <= stamp <= last:
                    changes[key] = None if value is None else value[STAMP_BYTES:]
                else:
                    late.setdefault(tp, set()).add(key)
        repairs = {tp: rows[tp].values_of(keys) for tp, keys in late.items()}
        for each in rows.values():
            each.fold()
        return rows, repairs

    def _stored(
        self, before: dict[int, Marker], extents: dict[TP, Extent]
    ) -> tuple[dict[TP, Rows], dict[TP, Extent]]:
        """What stores have of the changelogs, and what is to be read beside it."""
        rows = {tp: Rows() for tp in extents}
        unread = dict(extents)
        told_at = time.monotonic()
        for count, (tp, (low, high)) in enumerate(extents.items()):
            if self._local is None:
                break
            if time.monotonic() - told_at > PROGRESS_S:
                told_at = time.monotonic()
                self._progress(f"reads its stores: {100 * count / len(extents):.0f} %")
            if known := self._local.known(tp, before[tp.partition], low, high):
                rows[tp].stored = known.rows
                self.stored_rows += len(known.rows)
                unread[tp] = Extent(known.offset, high)
        return rows, unread

    def _records(
        self, extents: dict[TP, Extent], what: str
    ) -> Iterator[tuple[TP, list[Message]]]:
        """Every record of the extents, in pieces of one partition; never an empty one."""
        consumer = self._consumer
        wanted = {tp: extent for tp, extent in extents.items() if extent.low < extent.high}
        if not wanted:
            return
        total = sum(extent.high - extent.low for extent in wanted.values())
        began_at = told_at = heard_at = time.monotonic()
        count = 0
        consumer.assign([TopicPartition(*tp, extent.low) for tp, extent in wanted.items()])
        while wanted:
            first: Any = consumer.poll(0.05)
            messages: list[Message] = []
            if first is not None:
                # `consume` alone would wait its whole time for a full chunk.
                messages = [first, *consumer.consume(CHUNK_RECORDS - 1, 0)]
            now = time.monotonic()
            if messages:
                heard_at = now
            elif now - heard_at > QUIET_S:
                log.warning("the cluster has not sent %s of %s for %.0f s", what,
                            ", ".join(map(str, wanted)), QUIET_S)  # fmt: skip
                heard_at = now
            pieces, ended = _pieces(messages, extents)
            for tp, piece in pieces.items():
                high, last = extents[tp].high, piece[-1].offset()
                if last >= high:
                    piece = [message for message in piece if message.offset() < high]
                if tp in wanted and piece:
                    count += len(piece)
                    yield tp, piece
                if last + 1 >= high:
                    ended.add(tp)
            for tp in ended:
                wanted.pop(tp, None)
            if now - told_at > PROGRESS_S:
                told_at = now
                self._progress(_progress(count, total, now - began_at, what))
        consumer.unassign()

    def _whole_ends(self, tps: Iterable[TP]) -> dict[TP, Extent]:
        """As `_ends`, once no transaction is open below what is written now.

        A transaction ends in one partition after the other: where its marker is told already,
        its rows may not be.
        """
        places = list(tps)
        if self._uncommitted is None:
            return self._ends(places)
        written = {tp: self._watermarks(self._uncommitted, tp)[1] for tp in places}
        told_at, quiet_s = time.monotonic(), PROGRESS_S
        while True:
            ends = self._ends(places)
            if not (open_ := [tp for tp in places if ends[tp].high < written[tp]]):
                return ends
            if time.monotonic() - told_at > quiet_s:
                # One of a broker that crashed may stay open until somebody aborts it.
                self._progress(
                    f"waits for transactions that are open in {open_[0]}; where that stays so, "
                    "`kafka-transactions.sh find-hanging` names them"
                )
                told_at, quiet_s = time.monotonic(), min(2 * quiet_s, 60.0)
            time.sleep(PAUSE_S)

    def _ends(self, tps: Iterable[TP]) -> dict[TP, Extent]:
        return {tp: Extent(*self._watermarks(self._consumer, tp)) for tp in tps}

    def _high(self, tp: TP) -> int:
        return self._watermarks(self._consumer, tp)[1]

    def _watermarks(self, consumer: Consumer, tp: TP) -> tuple[int, int]:
        asked_at = time.monotonic()
        while True:
            try:
                return consumer.get_watermark_offsets(TopicPartition(*tp), timeout=10)
            except KafkaException as error:
                cause = error.args[0]
                if self._health.is_away:
                    asked_at = time.monotonic()  # nothing is known of a cluster that is away
                unknown_yet = cause.code() in _UNKNOWN and time.monotonic() - asked_at < QUIET_S
                if not (cause.retriable() or unknown_yet or cause.code() in AWAY_CODES):
                    raise BrokerError(f"{tp} cannot be read: {cause.str()}") from None
                if not unknown_yet and cause.code() not in _MOMENTS:
                    self._health.suspect(f"{tp} cannot be read: {cause.str()}")
                time.sleep(MOMENT_S)


_HOPELESS = (
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError._UNKNOWN_PARTITION,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError._AUTO_OFFSET_RESET,
)
# A broker that has just come back does not know all its topics at once.
_UNKNOWN = (
    KafkaError._UNKNOWN_PARTITION,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
)
_MOMENTS = (KafkaError.LEADER_NOT_AVAILABLE, KafkaError.NOT_LEADER_FOR_PARTITION)


def _pieces(
    messages: list[Message], extents: dict[TP, Extent]
) -> tuple[dict[TP, list[Message]], set[TP]]:
    """The records of each partition, and the partitions that were read to their end.

    Raises:
        BrokerLost: One cannot be read.
    """
    pieces: dict[TP, list[Message]] = {}
    ended: set[TP] = set()
    place: tuple[str, int] | None = None
    piece: list[Message] = []
    for message in messages:
        here = message.topic(), message.partition()
        if (error := message.error()) is None:
            if here != place:
                place, piece = here, pieces.setdefault(TP(*here), [])
            piece.append(message)
        elif error.code() == KafkaError._PARTITION_EOF:
            # The end, whatever the last offsets are: they may hold no record.
            if message.offset() >= extents[TP(*here)].high:
                ended.add(TP(*here))
        elif error.fatal() or error.code() in _HOPELESS:
            raise BrokerLost(f"{TP(*here)} cannot be read: {error.str()}")
    return pieces, ended


def _stamped(value: bytes | None, incarnation: Incarnation) -> bytes | None:
    return None if value is None else incarnation.stamp(0) + value


def stamp_of(headers: list[tuple[str, bytes]] | None) -> bytes:
    """The stamp of a deleted row; b"" where it has none (pure)."""
    return next((value for name, value in headers or () if name == STAMP_HEADER), b"")


def _progress(count: int, total: int, took_s: float, what: str) -> str:
    rate = count / took_s if took_s else 0.0
    left = f", {max(0, total - count) / rate:.0f} s left" if rate else ""
    done = f"{100 * count / max(1, total):.0f} %"
    return f"recovers {what}: {done}, {rate / 1000:.0f} k {what}/s{left}"
