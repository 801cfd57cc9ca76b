"""The thread that owns a group's consumer, in its callbacks too.

It reads chunks, opens packs, drops what its sender has sent twice, and hands batches to the
loop. What the loop wants of the consumer (read on elsewhere, commit, begin with partitions
that were recovered) it says in commands, which this thread carries out between two reads.

A rebalance happens inside `poll`: before partitions are given away, the loop is asked to settle
and make durable what it has of them, and this thread waits for it, carrying out commands.
Partitions that are gone are not waited for. They are, all of them, where the session ended or
where the group is joined anew, with another consumer: each of these begins a new *life*, and
what was gained in an earlier one is not to be committed.
"""

import asyncio
import logging
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from confluent_kafka import (
    OFFSET_END,
    Consumer,
    KafkaError,
    KafkaException,
    TopicPartition,
)

from streamd.agentproc.broker import TP
from streamd.agentproc.kafka.health import Health
from streamd.agentproc.kafka.membership import Membership
from streamd.agentproc.kafka.obstacles import OBSTRUCTED
from streamd.agentproc.kafka.options import Options
from streamd.agentproc.kafka.packs import (
    offset_of,
    packed_count,
    position_of,
)
from streamd.agentproc.kafka.reading import Columns, Message, Read, Reading
from streamd.agentproc.kafka.sources import Gap, Highs
from streamd.errors import BrokerError, BrokerLost, StreamdError

log = logging.getLogger(__name__)

CHUNK_RECORDS = 1000
POLL_S = 0.1
IDLE_POLL_S = 0.2  # where nothing came or was asked for, for `IDLE_S`
IDLE_S = 5.0
FULL_EVENTS = 32_000  # handed to the loop and not taken: read no more
FULL_BYTES = 16 * 1024 * 1024
PATIENCE_S = 0.2  # for the loop to take some, before partitions are paused
SEEK_S = 30.0
SEEK_AGAIN_S = 0.005
SOON_S = 0.02  # where the loop is about to say from where to read
WAKE_S = 0.2
FENCES = 3  # after an outage; more are those of another process
FENCES_S = 60.0
_FENCED = KafkaError(KafkaError.FENCED_INSTANCE_ID).str()


class Poller(threading.Thread):
    """See the module.

    Args:
        lose, gain: Coroutine functions of the session, run on `loop`.
        take: Called on the loop with what was read.
        failed: Called on the loop with what ended this thread.
        astray: Called on the loop where a place cannot be read from, with why; with None where
            topics seem to be gone, or forbidden.
        session_s: How long the cluster waits for a silent member.
        bound_s: How long `lose` may take before partitions are given away all the same.
        anchor: A topic to subscribe to in place of `topics`: who is assigned a partition of it
            reads the partition of this number of each of them.
        transactional: Keep `group_metadata` as new as can be; to ask for it wakes a thread.
    """

    def __init__(
        self,
        options: Options,
        topics: list[str],
        loop: asyncio.AbstractEventLoop,
        *,
        name: str,
        lose: Callable[[set[TP], bool], Awaitable[None]],
        gain: Callable[[set[TP], int], Awaitable[None]],
        take: Callable[[list[Read]], None],
        failed: Callable[[BaseException], None],
        astray: Callable[[StreamdError | None], None],
        health: Health,
        bound_s: float,
        session_s: float,
        anchor: str = "",
        transactional: bool = False,
    ) -> None:
        super().__init__(name=name, daemon=True)
        # By the protocol of KIP-848 partitions come and go one by one, whoever assigns them.
        self._together = options.get("partition.assignment.strategy") == "range"
        self._options = {**options, "error_cb": self._problem}
        self._consumer = Consumer(self._options)
        self.topics = topics  # that are read, as of the last time that it joined the group
        self._loop = loop
        self._lose, self._gain = lose, gain
        self._take, self._failed, self._astray = take, failed, astray
        self._health = health
        self._bound_s = bound_s
        self._anchor = anchor
        self._transactional = transactional
        self._commands: deque[Callable[[], None]] = deque()
        self._moves: deque[Callable[[], None]] = deque()  # not to be made inside a rebalance
        self._reading: dict[TP, Reading] = {}  # partitions that are read
        self._seeks: dict[TP, tuple[Reading, float]] = {}  # to be made, and until when
        self._assigned: set[TP] = set()
        self._gaining = 0  # calls of `gain` that are under way
        self._resumed: list[TP] = []  # and not asked for since
        self._dropped: set[str] = set()  # topics that are gone
        self._room = threading.Condition()
        self._waiting_events = self._waiting_bytes = 0
        self._paused = False
        self._came_at = time.monotonic()  # the last record, or command
        self._ending = threading.Event()
        self.membership = Membership(session_s)
        self._leave = False
        self._fatal: BaseException | None = None
        self._fenced = ""  # by what this consumer was refused for good
        self._fenced_at: deque[float] = deque(maxlen=FENCES)  # monotonic
        self.group_metadata: object = None  # of the group as this member knows it
        self.life = 0  # raised when all partitions are gone

    # What the loop says.

    def begin(self, tp: TP, turn: int, position: int, highs: Highs) -> None:
        """Read a partition that was gained from `position` on."""
        self._commands.append(lambda: self._begin(tp, turn, position, dict(highs)))

    def seek(self, tp: TP, turn: int, position: int, highs: Highs) -> None:
        """Read on elsewhere; what is handed over from then on has this `turn`."""
        self._commands.append(lambda: self._begin(tp, turn, position, dict(highs)))

    def commit(self, offsets: list[TopicPartition]) -> None:
        """Tell the cluster's tools how far the group is; nothing depends on it."""
        self._commands.append(lambda: self._commit(offsets))

    def took(self, events: int, size_bytes: int) -> None:
        """The loop has taken what was handed over: there is room for more."""
        with self._room:
            self._waiting_events -= events
            self._waiting_bytes -= size_bytes
            self._room.notify()

    def drop(self, topics: set[str]) -> None:
        """Read nothing more of these topics until their partitions were gained anew."""
        self._commands.append(lambda: self._drop(topics))

    def rejoin(self, topics: list[str] | None = None) -> None:
        """Leave the group and join it anew: all of its partitions are shared out again.

        Args:
            topics: To read from then on; None: the same.
        """
        self._moves.append(lambda: self._rejoin(topics or self.topics))

    def join_anew(self) -> None:
        """Be another member in the same place: all that it has is gone, and comes anew."""
        self.life += 1
        self._moves.append(self._join_anew)

    def end(self, leave: bool) -> None:
        """Stop reading; `leave`: others may have the partitions at once, for good."""
        self._leave = leave
        self._ending.set()
        with self._room:
            self._room.notify()

    # The thread.

    def run(self) -> None:
        try:
            self._subscribe()
            while not self._ending.is_set():
                self.membership.turned(time.monotonic())
                while self._moves:
                    self._moves.popleft()()
                self._obey()
                if self._transactional:
                    self.group_metadata = self._consumer.consumer_group_metadata()
                self._wait_room()
                self._hand_over(self._read())
                if self._fenced:
                    self._replace_fenced()
                if self._fatal is not None:
                    raise self._fatal
        except BaseException as error:
            if not self._ending.is_set():  # else nobody listens, and the loop may be closed
                self._loop.call_soon_threadsafe(self._failed, error)
        finally:
            self._close()

    def _subscribe(self) -> None:
        self._consumer.subscribe(
            [self._anchor] if self._anchor else self.topics,
            on_assign=self._on_assign,
            on_revoke=self._on_revoke,
            on_lost=self._on_lost,
        )

    def _rejoin(self, topics: list[str]) -> None:
        self._dropped.clear()
        self._consumer.unsubscribe()
        deadline = time.monotonic() + self._bound_s
        while self._assigned and not self._ending.is_set() and time.monotonic() < deadline:
            # What comes meanwhile is read again by who gets it.
            self._consumer.poll(POLL_S)
        if not self._ending.is_set():
            self.topics = topics
            self._subscribe()

    def _replace_fenced(self) -> None:
        """Join anew where no other process need have done it.

        A member that lost its session to an outage joins twice at times, and its second request
        fences the first: the client takes that for its end.
        """
        why, self._fenced = self._fenced, ""
        now = time.monotonic()
        is_ours = self._health.was_shaken() or not self.membership.is_sure(now)
        often = len(self._fenced_at) == FENCES and now - self._fenced_at[0] < FENCES_S
        if not is_ours or often:
            self._fatal = BrokerLost(
                f"the consumer cannot go on: {why}",
                remedy="see that no other process has this data directory, or this "
                "STREAMD_INSTANCE",
            )
            return
        self._fenced_at.append(now)
        log.info("the cluster took this member for another one's; it joins its group anew")
        self._join_anew()

    def _join_anew(self) -> None:
        self.life += 1
        lost, self._assigned = self._assigned, set()
        for places in (self._reading, self._seeks, self._resumed, self._dropped):
            places.clear()
        self._paused = False
        self._forget(lost)
        old, self._consumer = self._consumer, Consumer(self._options)
        # Its partitions are nobody's yet: as the same member it has them again.
        old.close()
        self._subscribe()

    def _close(self) -> None:
        try:
            if self._leave and self._fatal is None:
                # `close` alone keeps a static member's partitions until its session ends.
                self._consumer.unsubscribe()
                deadline = time.monotonic() + 2
                while self._consumer.assignment() and time.monotonic() < deadline:
                    self._consumer.poll(0.05)
            self._consumer.close()
        except (KafkaException, RuntimeError, StreamdError) as error:
            log.warning("the consumer did not close: %s", error)

    def _read(self) -> list[Message]:
        """A chunk of what came; nothing where something else is to be done, too."""
        poll, turned = self._consumer.poll, self.membership.turned
        while (first := poll(self._wait_s())) is None:
            # An idle process does little else than to wait here: it stays in this loop.
            if self._commands or self._moves or self._is_busy():
                return []
            turned(time.monotonic())
        self._came_at = time.monotonic()
        return [first, *self._consumer.consume(CHUNK_RECORDS - 1, 0)]

    def _wait_s(self) -> float:
        if self._seeks:
            return SEEK_AGAIN_S
        if self._gaining:
            return SOON_S
        return POLL_S if time.monotonic() - self._came_at < IDLE_S else IDLE_POLL_S

    def _is_busy(self) -> bool:
        return bool(
            self._seeks
            or self._resumed
            or self._paused
            or self._transactional
            or self._fenced
            or self._fatal is not None
            or self._ending.is_set()
        )

    def _obey(self) -> None:
        while self._commands:
            self._commands.popleft()()
            self._came_at = time.monotonic()
        self._try_seeks()
        if self._resumed:
            self._wake()

    def _wake(self) -> None:
        """Have what was resumed fetched at once.

        The client's thread for a node that has nothing to fetch from sleeps for up to a second,
        and no seek or resume wakes it; a request to its node does.
        """
        places = [TopicPartition(*tp, OFFSET_END) for tp in self._resumed]
        self._resumed.clear()
        try:
            self._consumer.offsets_for_times(places, timeout=WAKE_S)
        except KafkaException as error:
            log.debug("what was resumed is fetched later: %s", error)

    def _wait_room(self) -> None:
        with self._room:
            if not self._is_full():
                room = True
            else:
                room = self._room.wait_for(lambda: not self._is_full(), PATIENCE_S)
        if room == self._paused and self._reading:
            tps = [TopicPartition(*tp) for tp in self._reading]
            if room:
                self._consumer.resume(tps)
                self._resumed += self._reading
            else:
                self._consumer.pause(tps)
            self._paused = not room

    def _is_full(self) -> bool:
        return (
            self._waiting_events > FULL_EVENTS or self._waiting_bytes > FULL_BYTES
        ) and not self._ending.is_set()

    # Records.

    def _hand_over(self, messages: list[Message]) -> None:
        chunk: dict[TP, list[Message]] = {}
        ends: dict[TP, int] = {}
        for message in messages:
            if message.error() is not None:
                if message.error().code() == KafkaError._PARTITION_EOF:
                    ends[TP(message.topic(), message.partition())] = message.offset()
                elif message.topic() is None or self._is_read(message):
                    self._refused(message.error())
                # Else it is about the place that was given until the right one is known.
                continue
            # Equal to a TP, and made in a fraction of the time.
            place: Any = message.topic(), message.partition()
            if place in chunk:
                chunk[place].append(message)
            elif place in self._reading:
                # Else it was polled before the partition was given away: another's now.
                chunk[TP(*place)] = [message]
        reads: list[Read] = []
        for tp, records in chunk.items():
            reading = self._reading[tp]
            offsets = [message.offset() for message in records]
            # After a seek a few records of before may still come.
            behind = bisect_left(offsets, offset_of(reading.position))
            if behind == len(offsets):
                continue
            if reading.misses(offsets[behind:]):
                # Records seem to be missing before or between these: all are read once more.
                self._seek(tp, reading)
                ends.pop(tp, None)  # the end will be told again, too
                continue
            reads.append(self._open(tp, reading, records[behind:], offsets[behind:]))
        reads += [read for tp, offset in ends.items() if (read := self._end(tp, offset))]
        if reads:
            with self._room:
                for read in reads:
                    self._waiting_events += len(read.batch.values) if read.batch else 0
                    self._waiting_bytes += read.size_bytes
            self._loop.call_soon_threadsafe(self._take, reads)

    def _is_read(self, message: Message) -> bool:
        return TP(message.topic(), message.partition()) in self._reading

    def _open(
        self, tp: TP, reading: Reading, records: list[Message], offsets: list[int]
    ) -> Read:
        start, end = reading.position, position_of(offsets[-1] + 1)
        headers = [message.headers() for message in records]
        gaps: list[Gap] = []
        columns = Columns()
        if not any(headers):
            columns.add_plain(records, offsets, None)
        else:
            for message, offset, header in zip(records, offsets, headers, strict=True):
                if packed_count(header):
                    columns.add_pack(tp, message, reading.highs, gaps)
                else:
                    columns.add_plain([message], [offset], [header or []])
        columns.drop_below(start)
        for gap in gaps:
            log.error(
                "%s: what %s sent after %d never came; its sender comes again",
                tp, gap.origin[0], gap.high,
            )  # fmt: skip
        reading.position = end
        batch = columns.batch(tp, end)
        return Read(tp, reading.turn, batch, start, end, columns.passed, columns.size_bytes)

    def _end(self, tp: TP, offset: int) -> Read | None:
        """Nothing more is there: what lies before are marks of transactions, not events."""
        reading = self._reading.get(tp)
        if reading is None or position_of(offset) <= reading.position:
            return None
        if reading.misses([offset]):
            # It may be the end that was named when the partition was gained: that of a fetch
            # from before the seek. What lies before it would never be read.
            self._seek(tp, reading)
            return None
        start, reading.position = reading.position, position_of(offset)
        return Read(tp, reading.turn, None, start, reading.position, [], 0)

    def _refused(self, error: KafkaError) -> None:
        match error.code():
            case KafkaError._TRANSPORT:
                return
            case KafkaError._AUTO_OFFSET_RESET | KafkaError.OFFSET_OUT_OF_RANGE:
                lost: StreamdError = BrokerLost(
                    f"where this group reads on is no more on the cluster: {error.str()}",
                    remedy="`streamd check` shows the positions, `streamd reset` begins anew",
                )
                self._loop.call_soon_threadsafe(self._astray, lost)
            case _:
                self._problem(error)

    # Commands.

    def _have_gained(self) -> None:
        self._gaining -= 1

    def _begin(self, tp: TP, turn: int, position: int, highs: Highs) -> None:
        if tp not in self._assigned or tp.topic in self._dropped:
            return  # it was given away meanwhile, or is no more
        self._seek(tp, Reading(turn, position, highs))

    def _drop(self, topics: set[str]) -> None:
        self._dropped |= topics
        for places in (self._reading, self._seeks):
            for tp in [tp for tp in places if tp.topic in topics]:
                del places[tp]

    def _seek(self, tp: TP, reading: Reading) -> None:
        """Read on from where `reading` is; what comes until then is dropped."""
        self._reading.pop(tp, None)
        self._seeks[tp] = reading, time.monotonic() + SEEK_S
        self._try_seeks()

    def _try_seeks(self) -> None:
        """A partition that was just assigned cannot be sought in before `poll` was called.

        Nor can any while a rebalance is under way; so who is refused waits for its next turn.
        """
        for tp, (reading, deadline) in list(self._seeks.items()):
            place = TopicPartition(tp.topic, tp.partition, offset_of(reading.position))
            try:
                self._consumer.seek(place)
            except KafkaException as error:
                if time.monotonic() > deadline:
                    raise BrokerLost(
                        f"{tp} cannot be read from {place.offset} on: {error.args[0].str()}"
                    ) from None
                continue
            del self._seeks[tp]
            self._reading[tp] = reading
            if not self._paused:
                self._consumer.resume([TopicPartition(*tp)])
                self._resumed.append(tp)

    def _commit(self, offsets: list[TopicPartition]) -> None:
        mine = [
            place for place in offsets if TP(place.topic, place.partition) in self._assigned
        ]
        if mine:
            try:
                self._consumer.commit(offsets=mine, asynchronous=True)
            except KafkaException as error:
                log.debug("the group's offsets were not told: %s", error)

    # Rebalances, inside `poll`.

    def _on_assign(self, consumer: Consumer, gained: list[TopicPartition]) -> None:
        if consumer is not self._consumer:
            return  # it is being closed
        # It is read after a seek, once it is known what it has. Until then the end is named,
        # which is always there: a fetch from before the log begins would stop the partition
        # for good, and no seek in it succeeds any more.
        gained = self._with_topics(gained)
        places = [TopicPartition(place.topic, place.partition, OFFSET_END) for place in gained]
        if self._together:
            consumer.assign(places)
        else:
            consumer.incremental_assign(places)
        if places:
            consumer.pause(places)
        self.group_metadata = consumer.consumer_group_metadata()
        mine = {TP(place.topic, place.partition) for place in gained}
        self._assigned |= mine
        self._gaining += 1
        asyncio.run_coroutine_threadsafe(self._have(mine, self.life), self._loop)

    def _with_topics(self, anchors: list[TopicPartition]) -> list[TopicPartition]:
        if not self._anchor:
            return anchors
        beside = [TopicPartition(t, each.partition) for t in self.topics for each in anchors]
        return [*anchors, *beside]

    async def _have(self, mine: set[TP], life: int) -> None:
        try:
            await self._gain(mine, life)
        except BaseException as error:
            self._failed(error)
        self._commands.append(self._have_gained)

    def _on_revoke(self, consumer: Consumer, lost: list[TopicPartition]) -> None:
        if consumer is not self._consumer:
            self._unassign(consumer, consumer.assignment())
            return
        # The last checkpoint of what goes is made as a member of the group as it is now.
        self.group_metadata = consumer.consumer_group_metadata()
        mine = self._mine(lost)
        if not self._ending.is_set():
            self._await(asyncio.run_coroutine_threadsafe(self._losing(mine), self._loop))
        self._let_go(mine)

    def _on_lost(self, consumer: Consumer, lost: list[TopicPartition]) -> None:
        if consumer is not self._consumer:
            self._unassign(consumer, consumer.assignment())
            return
        log.warning(
            "%d partitions are not this process's any more: the cluster has heard nothing of "
            "it for too long",
            len(lost),
        )
        # Where not even a refusal comes back, the client itself complains a minute late.
        self._health.suspect("nothing is heard of it")
        if not self._ending.is_set():
            self._loop.call_soon_threadsafe(self._astray, None)  # or it may not be one
        self.life += 1
        mine = self._mine(lost)
        self._forget(mine)
        self._let_go(mine)

    def _mine(self, lost: list[TopicPartition]) -> set[TP]:
        """What goes with what the group takes away."""
        if not self._anchor:
            return {TP(place.topic, place.partition) for place in lost}
        numbers = {place.partition for place in lost}
        return {tp for tp in self._assigned if tp.partition in numbers}

    def _let_go(self, mine: set[TP]) -> None:
        self._assigned -= mine
        for tp in mine:
            self._reading.pop(tp, None)
            self._seeks.pop(tp, None)
        self._unassign(self._consumer, [TopicPartition(*tp) for tp in mine])

    def _unassign(self, consumer: Consumer, lost: list[TopicPartition]) -> None:
        if self._together:
            consumer.unassign()
        elif lost:
            consumer.incremental_unassign(lost)

    def _forget(self, gone: set[TP]) -> None:
        """Nothing of these can be made durable; whoever has them does not wait for us."""
        if gone and not self._ending.is_set():
            asyncio.run_coroutine_threadsafe(self._forgetting(gone), self._loop)

    async def _forgetting(self, gone: set[TP]) -> None:
        try:
            await self._lose(gone, True)
        except BaseException as error:
            self._failed(error)

    async def _losing(self, mine: set[TP]) -> None:
        await self._lose(mine, False)

    def _await(self, losing: "Future[None]") -> None:
        deadline = time.monotonic() + self._bound_s
        while not (losing.done() or self._ending.is_set()) and time.monotonic() < deadline:
            self._obey()
            self.membership.turned(time.monotonic())
            if self._health.is_away:
                deadline = time.monotonic() + self._bound_s  # nobody gets them meanwhile
            try:
                losing.result(0.005)
            except TimeoutError:
                continue
            except StreamdError as error:
                self._fatal = error
                return
        if not losing.done() and not self._ending.is_set():
            losing.cancel()
            self._fatal = BrokerError(
                f"partitions were to be given away, and were not settled in {self._bound_s:g} s"
            )

    def _problem(self, error: KafkaError) -> None:
        # As a message, what a fenced member gets says so by its code alone.
        if _FENCED in error.str():
            self._fenced = error.str()
        elif error.fatal() or error.code() == KafkaError._FATAL:
            self._fatal = BrokerLost(f"the consumer cannot go on: {error.str()}")
        else:
            self._health.on_error(error)
            if error.code() in OBSTRUCTED and not self._ending.is_set():
                self._loop.call_soon_threadsafe(self._astray, None)
