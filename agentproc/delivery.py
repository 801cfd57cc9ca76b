"""Handing events to an agent, and settling them.

A `Feed` holds an agent's runs (runs.py). An `Actor` is one running instance of the agent: the
source of its stream and the scope of its code. Events are handed out in strides: a slice of a
run that the stream walks through by index. A stride is settled when its agent asks beyond it;
its length follows the time that events take, so that fast events cost next to nothing and a
slow one stands alone.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

from streamd.agentproc.beats import Place
from streamd.agentproc.broker import INDEX_BITS, TP
from streamd.agentproc.offsets import Window
from streamd.agentproc.outbox import new_lanes, trace
from streamd.agentproc.runs import Run
from streamd.agents import CORRELATION_ID, REPLY_TO, Agent
from streamd.context import Buffered, Callback, Lanes, Placed, Record, RecordMetadata
from streamd.events import Event
from streamd.streams import Stream

if TYPE_CHECKING:
    from streamd.agentproc.engine import Engine

STRIDE_MAX = 1024
STRIDE_LOW_S = 0.0005  # a stride that took less is doubled
STRIDE_HIGH_S = 0.002  # one that took more is cut
HELD_BACK_EVENTS = 8000  # of a partition, in work or settled behind one that is
SLOW_S = 0.02  # a stride that takes longer ends with the event in work
TURN_S = 0.005  # after so long without a suspension an agent lets the loop turn


class Sent(NamedTuple):
    """What settled events sent, and who wants to know once it is durable."""

    lanes: Lanes
    callbacks: list[tuple[Callback, RecordMetadata]]


class Feed:
    """What one agent reads: its runs, and how far it has settled each partition."""

    def __init__(self, engine: "Engine", agent: Agent) -> None:
        self.engine = engine
        self.agent = agent
        self.runs: deque[Run] = deque()
        self.waiting = 0  # events in `runs` that were not handed out
        self.windows: dict[TP, Window[Sent]] = {}  # only with concurrency above 1
        self._sleepers: set[asyncio.Future[None]] = set()

    def add(self, run: Run) -> None:
        """Take one more run, after those that are there."""
        self.runs.append(run)
        self.waiting += len(run) - run.cursor
        self.wake()

    def take_back(self, run: Run, start: int, end: int) -> None:
        """Events that were handed out and not worked on are handed out again, as the next."""
        self.waiting += end - start
        if self.agent.concurrency > 1:
            # Later events of the run may be in work elsewhere.
            self.runs.appendleft(run.part(start, end))
            return
        run.cursor = start
        if not self.runs or self.runs[0] is not run:
            self.runs.appendleft(run)

    def put_behind(self, tp: TP) -> bool:
        """Let other partitions go first while the next event of this one rests.

        False: none of them has an event whose time has come.
        """
        now = time.monotonic()
        firsts: dict[TP, Run] = {}
        for run in self.runs:
            firsts.setdefault(run.tp, run)
        if not any(run.is_due(now) for other, run in firsts.items() if other != tp):
            return False
        resting = [run for run in self.runs if run.tp == tp]
        self.runs = deque([*(run for run in self.runs if run.tp != tp), *resting])
        return True

    def clear(self) -> None:
        """Forget what was read and not settled."""
        self.runs.clear()
        self.windows.clear()
        self.waiting = 0

    def wake(self) -> None:
        """Let every actor that waits look again."""
        for sleeper in self._sleepers:
            if not sleeper.done():
                sleeper.set_result(None)

    async def wait_change(self, timeout_s: float | None = None) -> None:
        """Wait until `wake` is called, or `timeout_s` is over."""
        sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.add(sleeper)
        try:
            if timeout_s is None:
                await sleeper
            else:
                await asyncio.wait((sleeper,), timeout=timeout_s)
        finally:
            self._sleepers.discard(sleeper)

    def has_room(self, run: Run) -> bool:
        """May its next event be handed out, by what is held back of its partition?"""
        if self.agent.concurrency == 1 or self.engine.gate.asked[self.agent.name]:
            return True
        window = self.window(run.tp)
        return len(window) < HELD_BACK_EVENTS or run.positions[run.cursor] in window

    def window(self, tp: TP) -> Window[Sent]:
        """The events of a partition that are in work, with concurrency above 1."""
        if tp not in self.windows:
            self.windows[tp] = Window(self.engine.pending.positions[self.agent.name, tp])
        return self.windows[tp]


class Actor:
    """One running instance of an agent: the source of its stream and the scope of its code."""

    may_wait = False

    def __init__(self, engine: "Engine", feed: Feed, index: int) -> None:
        self.engine = engine
        self.feed = feed
        self.agent = feed.agent
        self.stream: Stream[Any] = Stream(self, index if feed.agent.concurrency > 1 else None)
        self.lanes: Lanes = new_lanes()
        self.callbacks: list[tuple[Callback, RecordMetadata]] = []
        self.has_tables = bool(engine.tables)
        ordered = feed.agent.concurrency == 1 and feed.agent.deterministic
        self.traces = engine.traces and ordered
        self.running = False  # has events that were handed out and are not settled
        self.alone = False  # the event in work is tried alone
        self.timed_out = False
        self.asks: Counter[str] = Counter()  # agent -> asks that wait for a reply
        self.dismissed = False  # rolled back: what its code still does counts for nothing
        self.tasks: WeakSet[asyncio.Task[Any]] = WeakSet()  # its own, and those it started
        self.writes_to: int | None = None  # a partition; None: each key's hash's
        self.since = 0.0  # monotonic; when the stride was handed out
        self._run: Run | None = None  # of the stride
        self._start = 0  # of the stride, in `_run`
        self._earlier: list[tuple[Run, int, int]] = []  # strides of an unfinished take
        self._length = 1  # of the next stride
        self._turned_at = 0.0  # monotonic; when the loop last had its turn
        self._alarm: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._single = self.agent.concurrency > 1 or self.agent.timeout_s is not None

    # The source of the stream.

    async def advance(self) -> None:
        """See `streamd.streams.Source`."""
        self.settle()
        await self._next_stride(None)
        self.hand_out()

    async def advance_unsettled(self, timeout_s: float | None) -> bool:
        """See `streamd.streams.Source`."""
        if self.alone:
            return False
        if self._run is not None:
            self._earlier.append((self._run, self._start, self.stream.index))
            self._run = None
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        return await self._next_stride(deadline)

    def hand_out(self) -> None:
        """See `streamd.streams.Source`."""
        if not self.running:
            self.running = True
            self.engine.gate.started(self)
        if self.agent.timeout_s is not None:
            loop = asyncio.get_running_loop()
            self._alarm = loop.call_later(self.agent.timeout_s, self._time_out)

    def settle(self) -> None:
        """See `streamd.streams.Source`."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if not self.running:
            self._give_back()
            return
        if self.engine.checking:
            self.engine.check_writes()
        handed = self._in_hand()
        self._adapt_length()
        name, positions = self.agent.name, self.engine.pending.positions
        count = 0
        for run, start, end in handed:
            count += end - start
            if self.agent.concurrency == 1:
                positions[name, run.tp] = run.position_after(end)
        if self.agent.concurrency > 1:
            self._settle_together(
                [(run, index) for run, start, end in handed for index in range(start, end)]
            )
        if self.agent.concurrency == 1 and (self.lanes or self.callbacks):
            if self.traces and not self._earlier and self._run is not None:
                # What a take sent is for no one of its events.
                trace(self.lanes, name, self._run.tp, self._run.positions, self._start)
            self.engine.pending.release([self._take_sent()])
        self._earlier.clear()
        self.cut()
        self._let_go()
        # Only these are progress: an event that is given up has done nothing.
        self.engine.beats.settled(count)
        self.engine.settled(self, count)

    def _settle_together(self, events: list[tuple[Run, int]]) -> None:
        """Settle events of one partition, others of which may be in work elsewhere.

        What they sent goes with the last of them, and the position passes all of them at once.
        """
        if not events:
            return
        tp, last = events[-1][0].tp, events[-1][0].positions[events[-1][1]]
        window = self.feed.window(tp)
        for run, index in events:
            position = run.positions[index]
            sent = self._take_sent() if position == last else Sent(new_lanes(), [])
            if released := window.settle(position, sent, last):
                self.engine.pending.release(released)
                self.feed.wake()
        self.engine.pending.positions[self.agent.name, tp] = window.position

    def event(self, index: int) -> Event:
        """See `streamd.streams.Source`."""
        assert self._run is not None
        return self._run.event(index, self.engine.app)

    def keys(self) -> Sequence[Any]:
        """See `streamd.streams.Source`."""
        assert self._run is not None
        return self._run.keys()

    # What the engine asks.

    def cut(self) -> None:
        """Hand out no more of the stride than was taken from it; the rest goes back."""
        stream = self.stream
        if self._run is not None and stream.index < stream.end:
            self.feed.take_back(self._run, stream.index, stream.end)
            stream.end = stream.index

    def abandon(self) -> None:
        """Let go of what was handed out without settling it, for good."""
        self.dismissed = True
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._take_sent()
        self._earlier.clear()
        self._let_go()

    def failed_events(self) -> list[tuple[Run, int]]:
        """The events that an error now is about: the last one, or a whole take."""
        if not self.running:
            return []
        if self._earlier:
            return [(run, i) for run, start, end in self._in_hand() for i in range(start, end)]
        assert self._run is not None
        return [(self._run, self.stream.index - 1)] if self.stream.index > self._start else []

    def describe(self, *, key: bool = False) -> str:
        """What is being worked on, for people; with the event's key, which is the user's."""
        waited_s = time.monotonic() - self.since
        if self._run is None or not self.running:
            return f"{self.agent.label}: waits"
        index = max(self.stream.index - 1, self._start)
        of_key = f" key {self._run.key(index)!r:.80}" if key else ""
        at = f"{self._run.tp}@{self._run.positions[index]}"
        return f"{self.agent.label}: {at}{of_key} for {waited_s:.1f} s"

    def reply_headers(self) -> tuple[bytes | None, bytes | None]:
        """Where the current event wants its reply, and under which correlation id."""
        if self._run is None or self.stream.index == 0:
            return None, None
        index = self.stream.index - 1
        from_header = self._run.header
        return from_header(index, REPLY_TO), from_header(index, CORRELATION_ID)

    # The scope of the agent's code.

    def enter(self) -> None:
        """A step of the agent's code begins: tables write to its partition."""
        self.engine.enter(self.writes_to)

    def leave(self) -> None:
        """A step is over; what it wrote stays with its partition until another enters."""

    def engine_name(self) -> str:
        """See `streamd.context.Sending`."""
        return self.engine.group

    def turn(self) -> int:
        """A number that chooses the partition of a record without key: that of the event."""
        if self._run is None or self.stream.index == 0:
            return 0
        position = self._run.positions[self.stream.index - 1]
        # On Kafka those of plain records are multiples of 1024, as are many counts' factors.
        return position + (position >> INDEX_BITS)

    def buffered(self, topic: str, partition: int) -> Buffered | Placed:
        """See `streamd.context.Sending`."""
        return Placed(RecordMetadata(topic, partition, None, 0.0))

    async def wait_room(self) -> None:
        """See `streamd.context.Sending`; an agent's sends never wait."""

    async def wait_durable(self) -> None:
        """See `streamd.context.Sending`; the checkpoint of the event does it."""

    async def send_now(self, topic: str, record: Record) -> RecordMetadata:
        """See `streamd.context.Sending`."""
        return await self.engine.send_now(topic, record)

    def when_durable(self, callback: Callback, metadata: RecordMetadata) -> None:
        """See `streamd.context.Sending`."""
        self.callbacks.append((callback, metadata))

    def asking(self, agent: str, change: int) -> None:
        """An `ask` of this code begins or ends; see `Gate.lets`."""
        if not self.dismissed:
            self.asks[agent] += change
            self.engine.gate.asking(agent, change)

    # Inside.

    def _in_hand(self) -> list[tuple[Run, int, int]]:
        """Strides that were handed out and are not settled: (run, start, end)."""
        if self._run is None:
            return list(self._earlier)
        return [*self._earlier, (self._run, self._start, self.stream.index)]

    def _give_back(self) -> None:
        """What an unfinished take holds was never worked on: it is handed out again."""
        self.cut()
        for run, start, end in reversed(self._in_hand()):
            self.feed.take_back(run, start, end)
        self._earlier.clear()
        self._let_go()
        self.alone = False

    def _let_go(self) -> None:
        self._run, self.writes_to = None, None
        self.stream.values, self.stream.index, self.stream.end = (), 0, 0
        if self.running:
            self.running = False
            self.engine.gate.stopped(self)

    def _take_sent(self) -> Sent:
        sent = Sent(self.lanes, self.callbacks)
        self.lanes, self.callbacks = new_lanes(), []
        return sent

    def _adapt_length(self) -> None:
        took_s = time.monotonic() - self.since
        if took_s < STRIDE_LOW_S:
            self._length = min(self._length * 2, STRIDE_MAX)
        elif took_s > STRIDE_HIGH_S:
            self._length = max(1, self._length // 4)

    async def _next_stride(self, deadline: float | None) -> bool:
        """Wait for a stride and give it to the stream; False when `deadline` is over."""
        engine, feed = self.engine, self.feed
        if time.monotonic() - self._turned_at > TURN_S:
            await asyncio.sleep(0)
            self._turned_at = time.monotonic()
        while True:
            if self.dismissed:
                raise asyncio.CancelledError
            if engine.stopping:
                raise StopAsyncIteration
            run = self._next_run()
            if run is not None and engine.gate.lets(self) and feed.has_room(run):
                trial = run.trials.get(run.cursor)
                if trial is None:
                    self._take_stride(run, alone=False)
                    return True
                if self._earlier:
                    return False  # it is tried apart from what a take has so far
                if await engine.ready_for(self, run, trial):
                    self._take_stride(run, alone=True)
                    return True
                continue
            if run is None and feed.runs and deadline is None:
                return False  # what is there is of other partitions, and waits for this list
            engine.parked(self)
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                return False
            await feed.wait_change(left_s)
            self._turned_at = time.monotonic()

    def _next_run(self) -> Run | None:
        """Where the next event is. With concurrency a take keeps to one partition: how far each
        is settled differs, and what a list sends must go with all of its events."""
        runs = self.feed.runs
        if not self._earlier or self.agent.concurrency == 1:
            return runs[0] if runs else None
        tp = self._earlier[0][0].tp
        return next((run for run in runs if run.tp == tp), None)

    def _take_stride(self, run: Run, alone: bool) -> None:
        start = run.cursor
        if alone or self._single or self.engine.careful or self.engine.checking:
            end = start + 1
        else:
            end = min(start + self._length, run.next_stop(start + 1))
        run.cursor = end
        self.feed.waiting -= end - start
        if run.cursor == len(run):
            self.feed.runs.remove(run)
        if self.agent.concurrency > 1:
            window = self.feed.window(run.tp)
            for index in range(start, end):
                window.begin(run.positions[index], run.position_after(index + 1))
        self.alone = alone
        self._run, self._start = run, start
        self.stream.values, self.stream.index, self.stream.end = run.values, start, end
        self.since = time.monotonic()
        if end - start > 1:
            self._watch_stride()
        partition = run.tp.partition
        together = not self._earlier or self.writes_to == partition
        self.writes_to = partition if together else None
        if self.has_tables:
            self.engine.enter(self.writes_to)
        place = Place(self.agent.name, run.tp.topic, run.tp.partition, run.positions[start])
        self.engine.beats.place(place)

    def _look_at_stride(self) -> None:
        """What was done before a slow event must not wait for the next one, too."""
        self._watch = None
        if not self.running or self.dismissed:
            return
        if time.monotonic() - self.since > SLOW_S:
            self.cut()
        else:
            self._watch_stride()

    def _watch_stride(self) -> None:
        # One timer at a time: strides are short and many.
        if self._watch is None:
            self._watch = asyncio.get_running_loop().call_later(SLOW_S, self._look_at_stride)

    def _time_out(self) -> None:
        self.timed_out = True
        self.engine.time_out(self)
