"""Standbys: partitions of a group's tables that another host has, followed on this one.

A thread reads their markers and changelogs as they are written, and keeps a store of each that
is only some seconds behind. It is the file that a recovery opens: whoever gets such a partition
on this host reads the end of its changelog and no more. Nothing else is known of it here, and
nobody is answered from it.

Before a partition is recovered, whoever follows it saves what it has and lets go of its files:
in the same process it is told to, in another one it sees that they are wanted.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from streamd.agentproc.broker import TP
from streamd.agentproc.kafka import members, topics
from streamd.agentproc.kafka.choosing import followed
from streamd.agentproc.kafka.following import Following
from streamd.agentproc.kafka.health import Health
from streamd.agentproc.kafka.markers import Marker, Newest, decode_marker
from streamd.agentproc.kafka.options import Options
from streamd.agentproc.kafka.reading import Message
from streamd.agentproc.kafka.recovery import Home
from streamd.agentproc.kafka.trusting import STALE_S, distrust
from streamd.agentproc.store.file import Mark, StoreFile, StoreHeld
from streamd.errors import BrokerError, BrokerLost
from streamd.wire import StandbyRow

log = logging.getLogger(__name__)

CHUNK_RECORDS = 1000
POLL_S = 0.1
SAVE_S = 2.0
SAVE_ROWS = 50_000  # of one changelog: save at once
TELL_S = 1.0
ENDS_S = 600.0
AGAIN_S = 5.0
RELEASE_S = 5.0
FETCH_MS = 500  # an idle cluster is asked that seldom; it answers at once where something comes


def _steady() -> float:
    """Seconds that go by in a host's sleep, too, and that no setting of its clock changes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(slots=True)
class _Kept:
    """One changelog, and its store."""

    store: StoreFile
    low: int
    high: int  # when it began
    following: Following | None = None  # None until its partition's markers are known
    whole_at: float = 0.0  # by `_steady`; when all was known that there was
    saved_at: float = 0.0  # monotonic


@dataclass(slots=True)
class _Copy:
    """One partition of the group."""

    markers_next: int  # offset
    markers_end: int  # when it began: the newest marker is known from there on
    kept: dict[TP, _Kept]
    newest: Newest = field(default_factory=Newest)


class Standby(threading.Thread):
    """What one session follows.

    Args:
        options: Of a consumer in no group.
        folder: Where the stores are.
        topic_ids: Changelog -> id.
    """

    def __init__(
        self,
        options: Options,
        home: Home,
        folder: Path,
        admin: AdminClient,
        health: Health,
        topic_ids: Mapping[str, str],
    ) -> None:
        super().__init__(name=f"kafka {options['group.id']}", daemon=True)
        self._options = options
        self._home = home
        self._folder = folder
        self._admin = admin
        self._health = health
        self._topic_ids = topic_ids
        self._tables = {topic: table for table, topic in home.changelogs.items()}
        self._commands: deque[Callable[[], None]] = deque()
        self._called = threading.Event()
        self._ending = threading.Event()
        self._consumer: Consumer | None = None
        self._copies: dict[int, _Copy] = {}
        self._given_up: set[int] = set()  # their stores cannot be written
        self._again_at = self._saved_at = self._told_at = 0.0  # monotonic
        self._looked_at = time.monotonic()
        self.rows: list[StandbyRow] = []  # how far each is, as of the last second

    # On the loop.

    async def choose(
        self,
        roster: members.Roster,
        group: str,
        name: str,
        copies: int,
        mine: Callable[[], set[int]],
    ) -> None:
        """Follow what `choosing` says, asked again each few seconds, for ever.

        Args:
            group, name: Of the member of a group that this is for.
            copies: On so many hosts beside the owner's.
            mine: What this member has by now, whatever is said of it.
        """
        while True:
            if not self._health.is_away:
                with contextlib.suppress(BrokerError):
                    found = await asyncio.to_thread(roster.ask, group)
                    if found.settled:
                        self.follow(followed(found, name, copies) - mine())
            await asyncio.sleep(members.LOOK_S)

    def follow(self, partitions: set[int]) -> None:
        """Follow these, and no others, from now on."""
        self._call(lambda: self._choose(partitions))

    async def release(self, partitions: Iterable[int]) -> None:
        """Let go of partitions that this process is to have: their stores hold all it knew."""
        if not self.is_alive():
            return
        released: Future[None] = Future()
        mine = set(partitions)

        def drop() -> None:
            self._drop(mine)
            released.set_result(None)

        self._call(drop)
        try:
            async with asyncio.timeout(RELEASE_S):
                await asyncio.wrap_future(released)
        except TimeoutError:
            log.warning("the standbys of partitions %s were not let go of", sorted(mine))

    def end(self) -> None:
        """Save what there is, and end soon."""
        self._ending.set()
        self._called.set()

    def _call(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._called.set()

    # The thread.

    def run(self) -> None:
        while not self._ending.is_set():
            try:
                self._turn()
            except (KafkaException, BrokerError, RuntimeError, OSError, apsw.Error) as error:
                log.warning("%s begins again with its standbys: %s", self.name, error)
                self._again_at = time.monotonic() + AGAIN_S
                self._drop(set(self._copies))
        self._drop(set(self._copies))

    def _turn(self) -> None:
        while self._commands:
            self._commands.popleft()()
        if self._consumer is None:
            self._called.wait()
            self._called.clear()
            return
        self._hear(self._messages(self._consumer))
        for partition, copy in list(self._copies.items()):
            if any(kept.store.is_wanted() for kept in copy.kept.values()):
                self._drop({partition})
        now = time.monotonic()
        is_due = now - self._saved_at >= SAVE_S
        if is_due:
            self._saved_at = now
        for partition in list(self._copies):
            self._save(partition, is_due)
        if now - self._looked_at >= ENDS_S:
            self._look_at_ends()
        if now - self._told_at >= TELL_S:
            self._tell()

    def _messages(self, consumer: Consumer) -> list[Message]:
        first = consumer.poll(POLL_S)
        return [] if first is None else [first, *consumer.consume(CHUNK_RECORDS - 1, 0)]

    # Which ones.

    def _choose(self, partitions: set[int]) -> None:
        self._drop(self._copies.keys() - partitions)
        new = partitions - self._copies.keys() - self._given_up
        if new and time.monotonic() >= self._again_at:
            self._begin(new)

    def _begin(self, partitions: set[int]) -> None:
        """Begin with the markers of these; those that cannot be begun are tried again later."""
        changelogs = self._home.changelogs.values()
        tps = {
            partition: [TP(topic, partition) for topic in (self._home.markers, *changelogs)]
            for partition in partitions
        }
        every = [tp for some in tps.values() for tp in some]
        lows, ends = topics.lows(self._admin, every), topics.ends(self._admin, every)
        places: list[TopicPartition] = []
        for partition, (markers, *of_tables) in sorted(tps.items()):
            if not all(tp in lows and tp in ends for tp in tps[partition]):
                continue
            kept: dict[TP, _Kept] = {}
            try:
                for tp in of_tables:
                    name = f"{tp.topic}-{tp.partition}"
                    store = StoreFile(self._folder, name, patience_s=0)
                    kept[tp] = _Kept(store, lows[tp], ends[tp])
            except StoreHeld as error:
                log.debug("partition %d is not followed here: %s", partition, error)
                _close(kept)
            except (OSError, apsw.Error) as error:
                self._give_up(partition, kept, error)
            else:
                copy = _Copy(lows[markers], ends[markers], kept)
                self._copies[partition] = copy
                places.append(TopicPartition(*markers, copy.markers_next))
        if not places:
            return
        if self._consumer is None:
            self._consumer = Consumer(self._options)
        self._consumer.incremental_assign(places)
        for partition in partitions & self._copies.keys():
            self._know(partition)

    def _drop(self, partitions: Iterable[int]) -> None:
        """Save what is known of them, and let go of them."""
        for partition in [p for p in partitions if p in self._copies]:
            self._save(partition, is_due=True)
        self._forget([p for p in partitions if p in self._copies])

    def _forget(self, partitions: Iterable[int]) -> None:
        places: list[TopicPartition] = []
        for partition in partitions:
            copy = self._copies.pop(partition)
            places.append(TopicPartition(self._home.markers, partition))
            places += [TopicPartition(*tp) for tp, kept in copy.kept.items() if kept.following]
            _close(copy.kept)
        if self._consumer is not None and not self._copies:
            # An idle one would go on asking.
            consumer, self._consumer = self._consumer, None
            consumer.close()
        elif self._consumer is not None and places:
            self._consumer.incremental_unassign(places)
        self._tell()

    def _give_up(self, partition: int, kept: dict[TP, _Kept], error: Exception) -> None:
        log.warning("partition %d is not followed any more: %s", partition, error)
        self._given_up.add(partition)
        if partition in self._copies:
            self._forget([partition])
        else:
            _close(kept)

    # What comes of them.

    def _hear(self, messages: list[Message]) -> None:
        told: set[int] = set()  # partitions whose markers were read on
        for tp, records, end in _pieces(messages):
            copy = self._copies.get(tp.partition)
            if copy is None:
                continue  # it was let go of meanwhile
            if tp.topic == self._home.markers:
                told.add(tp.partition)
                for record in records:
                    _note(copy.newest, tp, record.value())
                last = records[-1].offset() + 1 if records else 0
                copy.markers_next = max(copy.markers_next, last, end)
            elif (following := copy.kept[tp].following) is not None:
                if records:
                    following.read(records)
                following.read_to(end)
                if end:
                    self._is_whole(tp, copy, end)
        for partition in told & self._copies.keys():
            self._know(partition)

    def _know(self, partition: int) -> None:
        """Go by the newest marker of a partition, once it is known."""
        copy = self._copies[partition]
        if copy.markers_next < copy.markers_end:
            return
        marker = copy.newest.marker
        try:
            for tp, kept in copy.kept.items():
                if kept.following is None:
                    self._start(tp, kept, marker)
                elif not kept.following.knows(marker):
                    self._begin_anew(tp, "it was written by an owner that was replaced")
                    return
        except (OSError, apsw.Error) as error:
            self._give_up(partition, copy.kept, error)

    def _start(self, tp: TP, kept: _Kept, marker: Marker) -> None:
        """Go on where the store is, or from the beginning."""
        store, id, now = kept.store, self._topic_ids[tp.topic], time.time()
        mark = store.mark
        if mark and (why := distrust(mark, marker, tp.topic, id, kept.low, kept.high, now)):
            store.wipe(why)
            mark = None
        if mark is None:
            store.begin_anew()
        offset = kept.low if mark is None else mark.offset
        kept.whole_at = _steady() - (max(0.0, now - mark.moment) if mark else 0.0)
        kept.following = Following(tp.topic, offset, marker)
        assert self._consumer is not None
        self._consumer.incremental_assign([TopicPartition(*tp, offset)])

    def _begin_anew(self, tp: TP, why: str) -> None:
        """Empty a store. Its partition is begun at the next choice: what is on its way to here
        is not for what will be read then."""
        self._copies[tp.partition].kept[tp].store.wipe(why)
        self._forget([tp.partition])

    def _is_whole(self, tp: TP, copy: _Copy, end: int) -> None:
        """Was everything read that there is? A copy that is not for long cannot become so.

        What was deleted meanwhile may have left the changelog without a trace.
        """
        kept, now = copy.kept[tp], _steady()
        if kept.following is None or kept.following.waits or kept.following.position < end:
            return
        if now - kept.whole_at > STALE_S:
            self._begin_anew(tp, f"it was behind for {(now - kept.whole_at) / 3600:.0f} h")
        kept.whole_at = now

    def _look_at_ends(self) -> None:
        """An end is told once; where nothing comes, it is to be asked for now and then."""
        self._looked_at = time.monotonic()
        places = {tp: copy for copy in self._copies.values() for tp in copy.kept}
        for tp, end in topics.ends(self._admin, places).items():
            if tp.partition in self._copies:
                self._is_whole(tp, places[tp], end)
                places[tp].kept[tp].saved_at = 0.0

    def _save(self, partition: int, is_due: bool) -> None:
        copy = self._copies[partition]
        marker = copy.newest.marker
        try:
            for tp, kept in copy.kept.items():
                following = kept.following
                if following is None:
                    continue
                count = len(following.changes)
                if count >= SAVE_ROWS or (is_due and (count or not kept.saved_at)):
                    # Whether all of the newest checkpoint is there is not known here.
                    mark = Mark(
                        self._topic_ids[tp.topic], following.offset, marker.incarnation,
                        marker.number - 1, marker.resets,
                        time.time() - (_steady() - kept.whole_at),
                    )  # fmt: skip
                    kept.store.save(following.take(), mark)
                    kept.saved_at = time.monotonic()
        except apsw.Error as error:
            self._give_up(partition, copy.kept, error)

    def _tell(self) -> None:
        self._told_at = time.monotonic()
        self.rows = [
            StandbyRow(self._tables[tp.topic], tp.partition, self._behind(tp, kept))
            for _, copy in sorted(self._copies.items())
            for tp, kept in copy.kept.items()
        ]

    def _behind(self, tp: TP, kept: _Kept) -> int | None:
        if kept.following is None or self._consumer is None:
            return None
        _, high = self._consumer.get_watermark_offsets(TopicPartition(*tp), cached=True)
        return max(0, max(high, kept.high) - kept.following.position)


def _close(kept: Mapping[TP, _Kept]) -> None:
    for each in kept.values():
        each.store.close()


def _note(newest: Newest, tp: TP, value: bytes | None) -> None:
    if value is None:
        return
    try:
        newest.add(decode_marker(value))
    except msgspec.DecodeError as error:
        raise BrokerError(
            f"{tp} holds a record that is no marker: {error}",
            remedy=f"find who writes to {tp.topic!r}; only streamd does",
        ) from None


def _pieces(messages: list[Message]) -> Iterator[tuple[TP, list[Message], int]]:
    """Partition, records of it that come together, and its end where that was reached, or 0.

    Raises:
        BrokerLost: One cannot be read.
    """
    place: TP | None = None
    piece: list[Message] = []
    for message in messages:
        here = TP(message.topic(), message.partition())
        error: Any = message.error()
        if here != place and piece:
            assert place is not None
            yield place, piece, 0
            piece = []
        place = here
        if error is None:
            piece.append(message)
        elif error.code() == KafkaError._PARTITION_EOF:
            yield here, piece, message.offset()
            piece = []
        elif error.fatal() or error.code() == KafkaError._AUTO_OFFSET_RESET:
            raise BrokerLost(f"{here} cannot be read: {error.str()}")
    if piece and place is not None:
        yield place, piece, 0
