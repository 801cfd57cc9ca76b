"""A session on Kafka: one slot of a group, as a static member of a consumer group.

Reading is done by a thread (`poller`), writing by another; the loop turns meanwhile. A
checkpoint is made durable as `markers` says, or, with exactly_once, in one transaction.
Partitions come and go: `Holder` is told, and settles what it has before they go.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NoReturn, TypeVar

import msgspec
from confluent_kafka import TopicPartition

from streamd.agentproc.broker import (
    TP,
    Batch,
    Checkpoint,
    Holder,
    Output,
    Subscription,
)
from streamd.agentproc.kafka import beginning, declaring, members, options, topics
from streamd.agentproc.kafka.access import Access
from streamd.agentproc.kafka.appending import Appender
from streamd.agentproc.kafka.limits import limits_of
from streamd.agentproc.kafka.markers import (
    NOBODY,
    Marker,
    encode_marker,
    marker_key,
    pack_highs,
    unpack_highs,
)
from streamd.agentproc.kafka.mending import KEY, Mending, Nothing
from streamd.agentproc.kafka.packs import count_header, no_events, offset_of, position_of
from streamd.agentproc.kafka.poller import Poller
from streamd.agentproc.kafka.producing import STAMP_HEADER, Changes, Offsets, Row, Writer
from streamd.agentproc.kafka.progress import Progress
from streamd.agentproc.kafka.reading import Read
from streamd.agentproc.kafka.recovery import Home, Recovery, Taken
from streamd.agentproc.kafka.sources import Tracer
from streamd.agentproc.kafka.sourcing import Sources
from streamd.agentproc.kafka.standby import FETCH_MS, Standby
from streamd.agentproc.kafka.storing import LocalTables
from streamd.agentproc.kafka.watching import Ends
from streamd.agentproc.store.rows import Rows
from streamd.errors import (
    BrokerError,
    BrokerLost,
    ConfigError,
    Fenced,
    Outdated,
    StreamdError,
)
from streamd.failpoints import failpoint
from streamd.patterns import is_pattern
from streamd.wire import StandbyRow

if TYPE_CHECKING:
    from streamd.agentproc.broker.kafka import KafkaBroker

log = logging.getLogger(__name__)

T = TypeVar("T")

TELL_OFFSETS_S = 1.0
WATCH_S = 1.0
MEND_S = 1.0
CLOSE_S = 5.0
SAVE_S = 5.0  # a group that gives partitions away waits for its stores
UNREAD_S = 30.0
MOST_ANEW = 3  # without a checkpoint between; then the process ends


class KafkaSession:
    """One slot of a group on a cluster; `streamd.agentproc.broker.Session`."""

    def __init__(
        self, broker: "KafkaBroker", subscription: Subscription, holder: Holder | None
    ) -> None:
        self.positions: dict[tuple[str, TP], int] = {}
        self.partitions: list[int] = []
        self.recovering: list[int] = []
        self.generation = 0
        self.topic_limits: dict[str, int] = {}
        self.table_limits: dict[str, int] = {}
        self._other_limits: dict[str, int] = {}  # of topics that replies are asked to
        self._broker = broker
        self._subscription = subscription
        self._holder = holder
        settings, app_id, group = broker.settings, subscription.app_id, subscription.group
        self._group = declaring.group_id(app_id, group)
        self._exactly_once = settings.processing_guarantee == "exactly_once"
        self._sources = Sources(broker, group, subscription.agents)
        self._topics = self._sources.named  # with patterns, what they mean as well
        self._agents = dict(subscription.agents)  # agent -> what it reads of them
        self._home = Home(
            self._topics,
            declaring.markers_topic(app_id, group),
            {table: declaring.changelog_topic(app_id, table) for table in subscription.tables},
            self._exactly_once,
            frozenset(filter(broker.packed, self._topics)),
            subscription.agents,
            subscription.resets,
        )
        kept = [*self._home.changelogs.values(), self._home.markers]
        self._access = Access(broker, group, self._group, self._topics, kept)
        self._tracer = Tracer()
        self._markers: dict[int, Marker] = {}  # partition -> the newest
        self._rows: dict[tuple[str, int], Rows] = {}  # recovered, not yet loaded
        self._progress: dict[TP, Progress] = {}
        self._turns: dict[TP, int] = {}  # partition -> seeks
        self._ends: dict[TP, int] = {}  # partition -> the position after what was read
        self._reads: deque[Read] = deque()
        self._arrived = asyncio.Event()
        self._opened: asyncio.Future[None] | None = None
        self._failure: BaseException | None = None
        self._told_at = 0.0
        self._written = Ends()
        self._watched_at = 0.0
        self._local: LocalTables | None = None
        if broker.stores is not None and self._home.changelogs:
            self._local = LocalTables(broker.stores, self._home.changelogs, self._alone)
        self._keeping: asyncio.Task[None] | None = None
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="kafka writes")
        self._recovering = ThreadPoolExecutor(1, thread_name_prefix="kafka recovery")
        self._writer: Writer | None = None
        self._appending = ThreadPoolExecutor(1, thread_name_prefix="kafka appends")
        self._appender = Appender(options.at_once(broker.reach))
        self._poller: Poller | None = None
        self._is_closed = False
        self._rebalancing = asyncio.Lock()
        self._lives: dict[
            int, int
        ] = {}  # partition -> the poller's life in which it was gained
        self._begun_anew = 0  # since the last checkpoint
        self._count = 0  # of the group's partitions
        self._is_new = True  # partitions have come, and nobody has looked at all of them
        self._looking: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._mending: asyncio.Task[None] | None = None
        self._finding: asyncio.Task[None] | None = None
        self._standby: Standby | None = None
        self._choosing: asyncio.Task[None] | None = None

    # Opening.

    async def open(self) -> None:
        broker = self._broker
        broker.opened(self)
        loop = asyncio.get_running_loop()
        failpoint("open.before-claim")
        await self._in_thread(self._recovering, self._prepare)
        if not self._subscription.agents and not self._subscription.tables:
            return
        subscribed = await self._in_thread(self._recovering, self._sources.find)
        if not self._sources.patterns:
            subscribed = subscribed or list(self._home.changelogs.values())[:1]
        self._opened = loop.create_future()
        self._poller = Poller(
            self._member_options(len(subscribed) > 1 and not self._sources.patterns),
            subscribed,
            loop,
            name=f"kafka {self._subscription.group}",
            lose=self._lose,
            gain=self._gain,
            take=self._take,
            failed=self._failed,
            astray=self._access.look_soon,
            anchor=self._home.markers if self._sources.patterns else "",
            transactional=self._exactly_once,
            health=self._broker.health,
            bound_s=self._broker.settings.grace,
            session_s=self._broker.settings.broker_session_timeout,
        )
        self._poller.start()
        if broker.settings.broker_group_protocol == "consumer":
            await members.wait_to_join(
                broker.roster, self._group, self._name(), self._opened, broker.health
            )
            if not self._opened.done():
                await self._gain(
                    set(), self._poller.life
                )  # it is a member, of more than there are partitions
        await self._access.wait_member(self._opened)
        if broker.settings.broker_group_protocol == "classic":
            self._looking = loop.create_task(self._look_for_unread(), name="unread")
        self._watching = loop.create_task(self._watch(), name="topics")
        if self._exactly_once:
            self._mending = loop.create_task(self._end_what_is_in_doubt(), name="mending")
        if self._sources.patterns:
            self._finding = loop.create_task(self._find(), name="patterns")
        if self._local is not None:
            self._keeping = loop.create_task(self._keep(self._local))
            self._follow_others(self._local.topic_ids)

    async def _watch(self) -> None:
        assert self._poller is not None
        try:
            await self._access.watch(self._held, self._poller.drop, self._poller.rejoin)
        except Exception as error:
            self._failed(error)

    async def _find(self) -> None:
        poller = self._poller
        assert poller is not None
        try:
            await self._sources.follow(lambda: poller.topics, poller.rejoin)
        except Exception as error:
            self._failed(error)

    def _adopt(self, topics: set[str]) -> None:
        """Read these topics with what is gained; what is held reads the same."""
        sources = self._sources
        before, self._topics = self._topics, sorted(topics)
        if self._topics != before:
            log.info("group %s reads %s", self._subscription.group, sources.said(self._topics))
        matched = frozenset(self._topics) - set(sources.named)
        self._agents = sources.agents(self._topics)
        self._home = self._home._replace(
            sources=self._topics,
            agents=self._agents,
            resets=sources.resets(self._topics, self._subscription.resets),
            packed=frozenset(filter(self._broker.packed, self._topics)),
            matched=matched,
        )
        self._access.read(self._topics, matched)

    def _held(self) -> set[tuple[str, str]]:
        """The sources as they were when their partitions were taken over, and their ids."""
        return {
            each for marker in self._markers.values() for each in marker.topics.items()
            if each[0] in self._topics
        }  # fmt: skip

    async def _keep(self, local: LocalTables) -> None:
        try:
            await local.run()
        except Exception as error:
            self._failed(error)

    def _prepare(self) -> None:
        """Make and check the topics; make the producer. Blocks."""
        broker, subscription = self._broker, self._subscription
        if self._sources.patterns and broker.settings.broker_group_protocol != "classic":
            raise ConfigError(
                f"group {subscription.group!r} reads topics by a pattern, and "
                "broker_group_protocol is 'consumer'",
                remedy="broker_group_protocol='classic'",
            )
        kept = [*self._home.changelogs.values(), self._home.markers]
        self._access.wait_permitted()
        there = broker.ensure(map(broker.wanted, self._sources.named), seen=kept)
        counts = {name: there[name].partitions for name in self._sources.named}
        counts |= {name: broker.wanted(name).partitions for name in self._sources.patterns}
        own = declaring.kept_by(
            broker.settings, subscription.group, subscription.tables, counts
        )
        topics.check_counts(own, there)
        # All of it is there mostly: the process `log` makes it while the app starts.
        if missing := [topic for topic in own if topic.name not in there]:
            there |= broker.ensure(missing)
        if self._local is not None:
            self._local.topic_ids = {
                topic: there[topic].id for topic in self._home.changelogs.values()
            }
        self._count = own[-1].partitions if own else 0  # of the markers
        self._access.count = self._count
        self._writer = self._writing.submit(self._make_writer).result()

    def _learn_limits(self) -> None:
        changelogs = self._home.changelogs
        declared = [name for name in self._broker.declared if not is_pattern(name)]
        limits = limits_of(self._broker.admin, {*declared, *changelogs.values()})
        self.table_limits = {table: limits.pop(topic) for table, topic in changelogs.items()}
        self.topic_limits = limits

    def _make_writer(self) -> Writer:
        self._learn_limits()
        id = self._member_id() if self._exactly_once else None
        mending = Mending(self._broker.reach, self._broker.admin, id or "", self._nothing_in)
        limits = [*self.topic_limits.values(), *self.table_limits.values()]
        return Writer(
            options.producer(
                self._broker.reach,
                transactional_id=id,
                batch_bytes=min(limits, default=options.MESSAGE_BYTES),
            ),
            self._broker.packed,
            self._tracer,
            self._broker.health,
            self._access.wait_writable,
            self._access.wait_timely,
            mending.mend,
        )

    def _nothing_in(self, topic: str) -> Nothing | None:
        if topic == self._home.markers or topic in self._home.changelogs.values():
            # The stamp of nobody: whoever reads it takes it for no row.
            return Nothing(KEY, None, [(STAMP_HEADER, NOBODY.stamp(0))])
        if self._broker.packed(topic):
            return Nothing(None, no_events(), count_header(1))
        return None

    async def _end_what_is_in_doubt(self) -> None:
        """After an outage, also where there is nothing to write: others wait to read."""
        writer, health = self._writer, self._broker.health
        assert writer is not None
        while True:
            await asyncio.sleep(MEND_S)
            if not writer.is_in_doubt or health.is_away:
                continue
            try:
                await self._in_thread(self._writing, writer.end_former)
            except BrokerLost as error:
                log.debug("what is in doubt has not ended: %s", error)
            except Exception as error:
                self._failed(error)

    def _member_id(self) -> str:
        sub = self._subscription
        return f"{sub.app_id}/{sub.group}/{self._broker.installation}/{sub.slot}"

    def _name(self) -> str:
        broker, sub = self._broker, self._subscription
        return members.client_id(broker.gateway, sub.group, sub.slot, broker.installation)

    def _member_options(self, together: bool) -> options.Options:
        broker = self._broker
        if broker.settings.broker_group_protocol == "consumer":
            return options.dynamic_member(
                broker.reach, self._group, self._name(), together=together
            )
        return options.member(
            broker.reach, self._group, self._name(), self._member_id(), together=together
        )

    # Partitions come and go.

    async def _look_for_unread(self) -> None:
        """Join the group anew where partitions stay nobody's.

        A static member that is killed between the two steps of a cooperative rebalance comes
        back to what the first left it, and nobody takes the second.
        """
        broker = self._broker
        before: list[int] = []
        while True:
            await asyncio.sleep(members.LOOK_S if before or self._is_new else UNREAD_S)
            if broker.health.is_away:
                continue
            self._is_new = False
            try:
                found = await asyncio.to_thread(broker.roster.ask, self._group)
            except BrokerError:
                continue
            unread = members.without_reader(found, self._count)
            first = min((member.name for member in found.members), default="")
            if unread and unread == before and first == self._name() and self._poller:
                log.warning(
                    "nobody in group %s reads its partitions %s; it is joined anew",
                    self._group, unread,
                )  # fmt: skip
                self._poller.rejoin()
                unread = []
            before = unread

    def _follow_others(self, topic_ids: dict[str, str]) -> None:
        """Follow what this session is to follow of other hosts' partitions, from now on."""
        broker = self._broker
        if not broker.settings.table_standby_replicas or broker.stores is None:
            return
        reader = options.reader(
            broker.reach, f"{self._group}.standby", fetch_wait_max_ms=FETCH_MS
        )
        follower = self._standby = Standby(
            reader, self._home, broker.stores, broker.admin, broker.health, topic_ids
        )
        follower.start()
        copies = broker.settings.table_standby_replicas
        choosing = follower.choose(
            broker.roster, self._group, self._name(), copies,
            lambda: {*self.partitions, *self.recovering},
        )  # fmt: skip
        self._choosing = asyncio.create_task(choosing, name="standbys")

    def standby(self) -> list[StandbyRow]:
        """What it follows, and how far behind that is."""
        return self._standby.rows if self._standby is not None else []

    async def _gain(self, tps: set[TP], life: int) -> None:
        async with self._rebalancing:
            assert self._poller is not None
            if life != self._poller.life:
                return  # lost meanwhile
            partitions = self.recovering = sorted({tp.partition for tp in tps})
            self._lives |= dict.fromkeys(partitions, life)
            if self._sources.patterns and tps:
                self._adopt({tp.topic for tp in tps} - {self._home.markers})
            if self._holder is not None and partitions:
                self._holder.recovers()
            if self._standby is not None:
                await self._standby.release(partitions)
            taken = await self._in_thread(self._recovering, self._recover, partitions)
            for partition in partitions:
                self._begin_with(partition, taken[partition])
            self.partitions = sorted({*self.partitions, *partitions})
            self.generation += 1
            self._is_new = True
            if self._opened is not None and not self._opened.done():
                self.recovering = []
                self._opened.set_result(None)
            elif self._holder is not None and partitions:
                await self._holder.gain(partitions)
                self.recovering = []
                self._holder.has_gained()
            self.recovering = []
            for tp, position in self._lowest_positions(partitions).items():
                self._turns[tp] = self._turns.get(tp, 0) + 1
                self._poller.begin(tp, self._turns[tp], position, self._progress[tp].highs)

    def _recover(self, partitions: list[int]) -> dict[int, Taken]:
        if not partitions:
            return {}
        ids = self._access.wait_clear()
        if self._sources.patterns:
            # What a pattern meant may be gone by now.
            self._adopt({topic for topic in self._topics if topic in ids})
        if self._local is not None:
            self._local.topic_ids |= ids
        reader = options.reader(self._broker.reach, f"{self._group}.recovery")
        health = self._broker.health
        recovery = Recovery(
            reader, self._home, self._put, health, self._says, self._handed_over, self._local,
            ids, self._ids_of,
        )  # fmt: skip
        try:
            assert self._writer is not None
            self._writing.submit(self._writer.end_former).result()
            taken = recovery.take(partitions)
            if self._home.changelogs:
                log.info(
                    "group %s takes partitions %s over: %d rows from stores, %d records read",
                    self._subscription.group, partitions, recovery.stored_rows,
                    recovery.read_rows,
                )  # fmt: skip
            return taken
        finally:
            recovery.close()
            health.doing("recovery", "")

    def _ids_of(self, names: set[str]) -> dict[str, str]:
        """The ids of those topics that are there; called by the thread that recovers."""
        broker = self._broker
        found = broker.patiently(lambda: topics.describe(broker.admin, names, topics.TRY_S))
        return {name: topic.id for name, topic in found.items()}

    def _handed_over(self, tps: list[TP]) -> dict[TP, int]:
        """What a Faust app of this id has committed; called by the thread that recovers."""
        broker, app_id = self._broker, self._subscription.app_id
        handed = broker.patiently(lambda: beginning.committed(broker.admin, app_id, tps))
        for tp, offset in handed.items():
            log.info(
                "%s is read from offset %d on, as consumer group %s was", tp, offset, app_id
            )
        if handed and self._subscription.tables:
            log.warning(
                "group %s goes on where consumer group %s was; its tables %s begin empty: what "
                "was counted before is not in them",
                self._subscription.group, app_id, ", ".join(self._subscription.tables),
            )  # fmt: skip
        return handed

    def _put(self, rows: list[Row]) -> None:
        """Make records durable; called by the thread that recovers."""
        assert self._writer is not None
        self._writing.submit(self._writer.put, rows).result()

    def _says(self, text: str) -> None:
        self._broker.health.doing("recovery", f"{self._subscription.group} {text}")
        log.info("group %s %s", self._subscription.group, text)

    def _begin_with(self, partition: int, taken: Taken) -> None:
        marker = self._markers[partition] = taken.marker
        self._tracer.resets[partition] = marker.resets
        for topic in self._topics:
            self._tracer.topics[TP(topic, partition)] = marker.topics[topic]
        self._written.begin(partition, taken.ends)
        for table, rows in taken.rows.items():
            self._rows[table, partition] = rows
        if self._local is not None:
            self._local.begin(partition, marker, taken.rows)
        for agent, names in self._agents.items():
            for topic in names:
                tp = TP(topic, partition)
                low = position_of(taken.sources[topic].low)
                stored = marker.positions[agent][topic]
                if lost := stored < low:
                    log.warning(
                        "%s holds nothing before offset %d any more; agent %s reads on there, "
                        "%d records after where it was",
                        tp, offset_of(low), agent, offset_of(low) - offset_of(stored),
                    )  # fmt: skip
                self.positions[agent, tp] = max(stored, low)
                self._ends[tp] = position_of(taken.sources[topic].high)
                # Behind records that are lost no gap can be told.
                highs = {} if lost else unpack_highs(marker.highs.get(topic, []))
                self._progress[tp] = Progress(highs)

    def _lowest_positions(self, partitions: list[int]) -> dict[TP, int]:
        lowest_of: dict[TP, int] = {}
        for (_, tp), position in self.positions.items():
            if tp.partition in partitions:
                lowest_of[tp] = min(position, lowest_of.get(tp, position))
        return lowest_of

    async def _lose(self, tps: set[TP], gone: bool) -> None:
        async with self._rebalancing:
            partitions = sorted({tp.partition for tp in tps})
            lost = set(partitions)
            self.partitions = [p for p in self.partitions if p not in lost]
            self.generation += 1
            if self._holder is not None:
                await self._holder.lose(partitions, gone=gone)
            if self._local is not None:
                await self._save(self._local, wanted=not gone)
                await self._local.release(lost)
            self._tracer.forget(lost)
            self._written.forget(lost)
            self.positions = {
                key: at for key, at in self.positions.items() if key[1].partition not in lost
            }
            for tp in [tp for tp in self._progress if tp.partition in lost]:
                del self._progress[tp], self._ends[tp]
            for key in [key for key in self._rows if key[1] in lost]:
                del self._rows[key]
            for partition in lost:
                self._markers.pop(partition, None)
                self._lives.pop(partition, None)

    # Reading.

    async def load(self, table: str, partition: int) -> list[tuple[bytes, bytes]]:
        failpoint("load.before-read")
        rows = self._rows.pop((table, partition), None)
        failpoint("load.after-read")
        return rows.all if rows is not None else []

    async def poll(self, max_events: int) -> list[Batch]:
        while True:
            if self._failure is not None:
                raise self._failure
            if batches := self._next_batches(max_events):
                return batches
            self._arrived.clear()
            await self._arrived.wait()

    def _next_batches(self, max_events: int) -> list[Batch]:
        batches: list[Batch] = []
        seen: set[TP] = set()
        while self._reads and max_events > 0 and self._reads[0].tp not in seen:
            read = self._reads.popleft()
            events = len(read.batch.values) if read.batch is not None else 0
            assert self._poller is not None
            self._poller.took(events, read.size_bytes)
            if read.turn != self._turns.get(read.tp) or read.tp not in self._progress:
                continue  # read before a seek, or before the partition went
            self._progress[read.tp].was_read(read)
            if read.batch is None:
                continue
            seen.add(read.tp)
            batches.append(read.batch)
            max_events -= events
        return batches

    def seek(self, tp: TP, position: int) -> None:
        if self._poller is None or tp not in self._progress:
            return
        self._turns[tp] += 1
        self._progress[tp].rewind()
        self._poller.seek(tp, self._turns[tp], position, self._progress[tp].highs)

    def _take(self, reads: list[Read]) -> None:
        self._reads += reads
        for read in reads:
            self._ends[read.tp] = max(read.end, self._ends.get(read.tp, 0))
        self._arrived.set()

    def _failed(self, error: BaseException) -> None:
        self._failure = error
        self._arrived.set()
        if self._opened is not None and not self._opened.done():
            self._opened.set_exception(error)

    # Writing.

    async def commit(self, checkpoint: Checkpoint) -> None:
        if not checkpoint:
            return
        if self._failure is not None:
            raise self._failure
        if self._local is None:
            await self._commit(checkpoint)
            return
        async with self._local.committing:
            touched = await self._commit(checkpoint)
            markers = {partition: self._markers[partition] for partition in touched}
            self._local.landed(checkpoint.changes, markers, self._written.ends)

    async def _commit(self, checkpoint: Checkpoint) -> set[int]:
        """Make a checkpoint durable; the partitions that it touched."""
        assert self._writer is not None, "the session is not open"
        touched = {tp.partition for _, tp in checkpoint.positions}
        touched |= {change.partition for change in checkpoint.changes}
        self._refuse_gone(touched)
        positions = {
            (agent, tp): self._progress[tp].beyond(at)
            for (agent, tp), at in checkpoint.positions.items()
        }
        self.positions.update(positions)
        changes: list[Changes] = []
        for partition in touched:
            marker = self._markers[partition]
            self._markers[partition] = msgspec.structs.replace(marker, number=marker.number + 1)
        for change in checkpoint.changes:
            marker = self._markers[change.partition]
            stamp = marker.incarnation.stamp(marker.number)
            topic = self._home.changelogs[change.table]
            changes.append(Changes(topic, change.partition, stamp, change.rows))
        for tp in {tp for _, tp in positions}:
            lowest = min(at for (_, other), at in self.positions.items() if other == tp)
            self._progress[tp].settled(lowest)
        markers = [self._marker_row(partition) for partition in sorted(touched)]
        offsets = self._offsets(touched)
        try:
            await self._in_thread(
                self._writing, self._writer.commit, checkpoint.outputs, changes, markers,
                Offsets(offsets, self._metadata()) if self._exactly_once else None,
            )  # fmt: skip
        except BrokerLost as error:
            self._begin_anew(error)
        self._begun_anew = 0
        for change in checkpoint.changes:
            topic = self._home.changelogs[change.table]
            self._written.wrote(topic, change.partition, len(change.rows))
        now = time.monotonic()
        if checkpoint.changes and now - self._watched_at >= WATCH_S:
            await self._alone()
        failpoint("commit.after-commit")
        now = time.monotonic()
        if self._poller is not None and now - self._told_at > TELL_OFFSETS_S:
            self._told_at = now
            if not self._exactly_once:
                self._poller.commit(offsets)
        return touched

    def _begin_anew(self, error: BrokerLost) -> NoReturn:
        """A transaction's end is not known: recover what is, with another producer.

        Raises:
            Outdated: It is under way.
            BrokerLost: It cannot be done, or was in vain.
        """
        assert self._writer is not None
        if not self._writer.transactional or self._begun_anew == MOST_ANEW:
            raise error
        self._begun_anew += 1
        if self._poller is not None:
            self._poller.join_anew()
        raise Outdated(str(error)) from error

    def _refuse_gone(self, partitions: set[int]) -> None:
        if self._poller is None:
            return
        gone = [p for p in sorted(partitions) if self._lives.get(p) != self._poller.life]
        if gone:
            raise Outdated(f"the partitions {gone} are not this process's any more")

    async def _alone(self) -> set[TP]:
        """The changelogs that nobody else has written to; while no checkpoint is under way.

        Raises:
            Fenced: Somebody has; the successor of this process repairs them.
        """
        written = self._written
        if self._exactly_once:
            # A transaction of somebody else's would not have been committed.
            return set(written.all())
        self._watched_at = time.monotonic()
        ends = await self._in_thread(
            self._writing, topics.ends, self._broker.admin, written.all()
        )
        if foreign := written.foreign(ends):
            raise Fenced(f"another process has written to {', '.join(map(str, foreign))}")
        return written.alone(ends)

    async def _save(self, local: LocalTables, wanted: bool) -> None:
        """Write to the stores what waits; what cannot be known to count is left out."""
        if not wanted or self._failure is not None:
            return
        try:
            async with asyncio.timeout(SAVE_S):
                await local.save()
        except (TimeoutError, StreamdError) as error:
            log.debug("group %s leaves its stores behind: %r", self._subscription.group, error)

    def _marker_row(self, partition: int) -> Row:
        positions: dict[str, dict[str, int]] = {}
        if self._sources.patterns:
            # Others may know of topics already that this session does not read yet.
            positions = {a: dict(all) for a, all in self._markers[partition].positions.items()}
        for (agent, tp), at in self.positions.items():
            if tp.partition == partition:
                positions.setdefault(agent, {})[tp.topic] = at
        highs = {
            tp.topic: pack_highs(progress.highs)
            for tp, progress in self._progress.items()
            if tp.partition == partition
        }
        marker = msgspec.structs.replace(
            self._markers[partition], positions=positions, highs=highs, moment=time.time()
        )
        self._markers[partition] = marker
        key = marker_key(marker.incarnation)
        return Row(self._home.markers, partition, key, encode_marker(marker))

    def _offsets(self, partitions: set[int]) -> list[TopicPartition]:
        return [
            TopicPartition(tp.topic, tp.partition, offset_of(at))
            for tp, at in self._lowest_positions(sorted(partitions)).items()
        ]

    def _metadata(self) -> object:
        return None if self._poller is None else self._poller.group_metadata

    async def append(self, outputs: list[Output], *, durable: bool = False) -> list[int]:
        offsets = await self._in_thread(self._appending, self._appender.append, outputs)
        return [places[0] for places in offsets]

    def partitions_of(self, topic: str) -> int:
        return self._broker.partitions_of(topic)

    async def most_bytes(self, topic: str) -> int:
        if topic not in self._other_limits:
            limits = await self._in_thread(
                self._appending, limits_of, self._broker.admin, [topic]
            )
            self._other_limits |= limits
        return self._other_limits[topic]

    def is_sure(self) -> bool:
        if self._is_closed:
            return False
        poller = self._poller
        return poller is None or poller.membership.is_sure(time.monotonic())

    def behind(self) -> dict[str, int]:
        behind = dict.fromkeys(self._subscription.agents, 0)
        for (agent, tp), position in self.positions.items():
            at = offset_of(self._progress[tp].beyond(position))
            behind[agent] += max(0, offset_of(self._ends.get(tp, 0)) - at)
        return behind

    async def close(self, *, leave: bool = False) -> None:
        self._broker.closed(self)
        # From now on others may have what the tables of a process that ends still hold.
        self._is_closed = True
        if self._keeping is not None:
            self._keeping.cancel()
            self._keeping = None
            assert self._local is not None
            await self._save(self._local, wanted=True)
            await self._local.close()
        for task in (
            self._looking, self._watching, self._finding, self._choosing, self._mending,
        ):  # fmt: skip
            if task is not None:
                task.cancel()
        if self._standby is not None:
            self._standby.end()
            await asyncio.to_thread(self._standby.join, CLOSE_S)
        poller, self._poller = self._poller, None
        if poller is not None:
            poller.end(leave)
            await asyncio.to_thread(poller.join, CLOSE_S)
        for thread in (self._writing, self._recovering, self._appending):
            # What waits for a cluster that is away is not waited for.
            thread.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(
        self, thread: ThreadPoolExecutor, work: Callable[..., T], *args: object
    ) -> T:
        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(thread, work, *args))
