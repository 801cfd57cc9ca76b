"""The engine of a group: read this first.

An event's way: the intake polls the broker and decodes the chunk (intake.py); where the gate
lets them (gate.py), the feeds hand its events to the agents (delivery.py); what they send and
write is collected; `_checkpoint` makes outputs, changed rows and positions durable together. A
crash at any point gives the state of the last checkpoint and reads on from there; an event that
fails is treated the same way, without the crash (`_roll_back`).

Everything here runs on the loop's thread. The broker does its waiting in threads of its own.
"""

import asyncio
import inspect
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from contextlib import aclosing
from contextvars import copy_context
from functools import partial
from typing import Any

from streamd.agentproc.beats import Beats
from streamd.agentproc.broker import (
    TP,
    Broker,
    Checkpoint,
    Output,
    Subscription,
    TableChange,
)
from streamd.agentproc.delivery import Actor, Feed, Sent
from streamd.agentproc.errand import Errand
from streamd.agentproc.exits import ExitAsked
from streamd.agentproc.gate import Gate
from streamd.agentproc.intake import Intake
from streamd.agentproc.letters import dead_letter
from streamd.agentproc.outbox import new_lanes
from streamd.agentproc.pending import Pending, RolledBack, Taken
from streamd.agentproc.replying import refuse, reply, text_of
from streamd.agentproc.routing import place_of
from streamd.agentproc.runs import Run
from streamd.agentproc.statistics import Statistics
from streamd.agentproc.trials import RETRY_MAX_S, Trial, Trials, stopped
from streamd.agents import CORRELATION_ID, REPLY_TO, Agent, AgentFailed
from streamd.app import App
from streamd.context import Record, RecordMetadata, current_scope
from streamd.errors import (
    BrokerError,
    ConfigError,
    EncodeError,
    Fenced,
    LogDamaged,
    Outdated,
)
from streamd.failpoints import failpoint
from streamd.inplace import watch
from streamd.tables import Part, Table
from streamd.wire import GroupPlan, Owns, Suspect

log = logging.getLogger(__name__)

WAITING_RECORDS = 50_000  # sends that may wait do so above this
ROWS_AT_ONCE = 20_000  # of a table are decoded without letting go of the loop
CAREFUL_EVENTS = 20_000  # more than were in work when a process died
IDLE_RESTART_S = 1.0
CANCEL_AGAIN_S = 1.0


class Engine:
    """One slot of a group in this process."""

    def __init__(
        self,
        app: App,
        plan: GroupPlan,
        broker: Broker,
        beats: Beats,
        *,
        careful: bool = False,
        parked: tuple[Suspect, ...] = (),
        alone: bool = False,
    ) -> None:
        group = next((group for group in app.groups if group.name == plan.group), None)
        self.app = app
        self.plan = plan
        self.group = plan.group
        self.beats = beats
        self.careful = careful
        self.checking = 0  # so many events' table writes are looked at one by one
        self.agents: list[Agent] = group.agents if group else []
        self.tables: list[Table] = group.tables if group else []
        self.pending = Pending()
        self.errands: set[Errand] = set()
        self.stopping = False
        self.leaving = False  # for good: others may have the partitions at once
        self.ready = asyncio.Event()
        self.announce: Callable[[Owns], None] = lambda owns: None  # set by the process
        self.session = broker.session(
            Subscription(
                app.id,
                plan.group,
                plan.slot,
                plan.slots,
                {agent.name: agent.get_topic_names() for agent in self.agents},
                {table.name: table.partitions or 1 for table in self.tables},
                {
                    topic.name: topic.begins_at
                    for agent in self.agents
                    for topic in agent.channel.parts
                },
            ),
            self,
        )
        self.traces = broker.traces
        self._alone = alone
        self._feeds = [Feed(self, agent) for agent in self.agents]
        self._actors: dict[asyncio.Task[None], Actor] = {}
        self._entered: int | None = -1  # the partition that the tables write to
        self._trials = Trials(app.settings, parked)
        self.gate = Gate(plan.group, self._feeds, beats, self._when_quiet)
        self._intake = Intake(self._feeds, self.session, self._trials)
        self._mail: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._opening: asyncio.Future[None] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._checkpointing: asyncio.Task[None] | None = None
        self._commit_lock = asyncio.Lock()
        self._movable = asyncio.Event()  # partitions may be given away: it is ready, or over
        self._over = asyncio.Event()  # nothing more will be made durable
        self._checkpointed_at = time.monotonic()
        self._unsettled_failures = 0  # agents that ended with no event in hand, in a row
        self._statistics = Statistics()

    # Life.

    async def run(self) -> None:
        """Recover, read and work until `stop()`; then settle, checkpoint and return.

        Raises:
            StreamdError: The group cannot go on in this process.
        """
        self._opening = asyncio.ensure_future(self._recover())
        try:
            await self._opening
        except ConfigError:
            await self.session.close(leave=True)  # nobody restarts it before that is mended
            raise
        except asyncio.CancelledError:
            self._end_of_work()
            await self.session.close(leave=self.leaving)
            if self.stopping:
                return
            raise
        self._checkpointing = self._spawn(self._make_checkpoints(), "checkpoints")
        self._start_reading()
        self._start_actors()
        self.ready.set()
        self._movable.set()
        try:
            while not (self.stopping and not self._actors and not self.gate.working):
                await (await self._mail.get())()
            await self._finish()
        finally:
            for task in (self._reading, self._checkpointing, *self._actors):
                if task is not None:
                    task.cancel()
            self._end_of_work()
            await self.session.close(leave=self.leaving)

    def _end_of_work(self) -> None:
        """Nothing more will be made durable."""
        self.stopping = True
        self._over.set()
        self._movable.set()

    def stop(self) -> None:
        """Hand out no more; `run` returns when what is in work is settled and durable."""
        self.stopping = True
        if self._opening is not None:
            self._opening.cancel()  # what is not open yet may wait for long
        if self._reading is not None:
            self._reading.cancel()
        self.gate.cut()
        self.gate.wake()
        self._post(self._nothing)

    async def abort(self) -> None:
        """Cancel everything and settle nothing of what is in work."""
        self.stopping = True
        tasks = [task for task in (self._reading, self._checkpointing, *self._actors) if task]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=0.2) if tasks else None

    async def _recover(self) -> None:
        """Claim the slot's partitions and load what its tables hold of them."""
        await self.session.open()
        channels = [agent.channel for agent in self.app.agents.values()]
        for topic in [*self.app.topics.values(), *channels]:
            topic.most_bytes = self.session.topic_limits.get(topic.name, topic.most_bytes)
        for table in self.tables:
            table.most_bytes = self.session.table_limits.get(table.name, table.most_bytes)
        self.pending.gain(self.session.positions)
        partitions = list(self.session.partitions)  # those that come later are gained
        for table in self.tables:
            parts = {
                partition: await self._load(table, partition)
                for partition in partitions
                if partition < (table.partitions or 1)
            }
            table.hold(parts, place_of(self.app, table), checked=self._alone)
            if self.app.settings.debug:
                watch(table)
        failpoint("engine.recovered")

    def _start_reading(self) -> None:
        if self._feeds and not self.stopping:
            self._reading = self._spawn(self._intake.run(self.pending.positions), "reader")

    async def _load(self, table: Table, partition: int) -> Part:
        """What a partition of a table holds; the loop turns while many rows are decoded."""
        rows = await self.session.load(table.name, partition)
        if len(rows) < ROWS_AT_ONCE:
            return Part(table.load(rows))
        return Part(await asyncio.to_thread(table.load, rows))

    # Partitions that come and go.

    def recovers(self) -> None:
        """See `streamd.agentproc.broker.Holder`."""
        self.announce(self.owns())

    async def gain(self, partitions: list[int]) -> None:
        """See `streamd.agentproc.broker.Holder`."""
        await self.ready.wait()
        for table in self.tables:
            for partition in partitions:
                if partition < (table.partitions or 1):
                    table.gain(partition, await self._load(table, partition))
        of_them = {
            key: at for key, at in self.session.positions.items()
            if key[1].partition in partitions
        }  # fmt: skip
        self.pending.gain(of_them)
        self._entered = -1

    def has_gained(self) -> None:
        """See `streamd.agentproc.broker.Holder`."""
        self.announce(self.owns())

    async def lose(self, partitions: list[int], *, gone: bool) -> None:
        """See `streamd.agentproc.broker.Holder`; what is slow to settle is cancelled."""
        await self._movable.wait()
        if self.stopping:
            # Its last checkpoint holds these partitions too: they are given away after it.
            await self._over.wait()
            return
        self.gate.gives_way = True
        self.announce(self.owns())  # nobody is sent here for what is about to go
        try:
            if not gone:
                await self._settle_all()
            forgotten: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._post(partial(self._forget, set(partitions), forgotten))
            await forgotten
        finally:
            self.gate.gives_way = False
            self.gate.wake()

    async def _settle_all(self) -> None:
        """Hand out no more; wait until what is in work is settled and durable, or too long."""
        try:
            async with asyncio.timeout(self.app.settings.grace / 2):
                self.gate.cut()
                while not self.gate.quiet.is_set():
                    await self.gate.quiet.wait()
                await self.pending.durable(urgent=False)
        except TimeoutError:
            log.warning(
                "%s gives partitions away and works on: %s; it is cancelled, and done again "
                "by who gets them",
                self.group,
                "; ".join(self.gate.busy_with()),
            )
        except RolledBack:
            log.debug("%s gave partitions away while an event failed", self.group)

    async def _forget(self, lost: set[int], forgotten: "asyncio.Future[None]") -> None:
        """Go back to the last checkpoint, and there without these partitions."""
        await self._roll_back(without=lost)
        if not forgotten.done():
            forgotten.set_result(None)

    def owns(self) -> Owns:
        """What this slot has, for the master."""
        scattered = [table.name for table in self.tables if table.scattered]
        recovering = self.session.recovering
        active = [p for p in self.session.partitions if p not in recovering]
        return Owns(self.group, self.session.generation, active, recovering, scattered)

    def _when_quiet(self) -> None:
        if self.stopping:
            self._post(self._nothing)

    async def _nothing(self) -> None:
        """Look again whether all is done."""

    def _post(self, what: Callable[[], Awaitable[None]]) -> None:
        self._mail.put_nowait(what)

    def _spawn(self, coro: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coro, name=f"{self.group} {what}")
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self._post(partial(self._raise, error))

    async def _raise(self, error: BaseException) -> None:
        raise error

    async def _finish(self) -> None:
        """Everything is settled: the last checkpoint."""
        async with self._commit_lock:
            if self._checkpointing is not None:
                self._checkpointing.cancel()
        for errand in list(self.errands):
            self.pending.outbox.append(errand.take_lanes())
        await self._checkpoint()

    # Working.

    def _start_actors(self) -> None:
        for feed in self._feeds:
            for index in range(feed.agent.concurrency):
                self._start_actor(feed, index)

    def _start_actor(self, feed: Feed, index: int, after_s: float = 0.0) -> None:
        actor = Actor(self, feed, index)
        context = copy_context()
        context.run(current_scope.set, actor)
        task = asyncio.get_running_loop().create_task(
            self._run_agent(actor, after_s), name=feed.agent.label, context=context
        )
        actor.stream.task_owner = task
        self._actors[task] = actor
        task.add_done_callback(lambda task: self._post(partial(self._actor_ended, task, index)))

    async def _run_agent(self, actor: Actor, after_s: float) -> None:
        """The agent's function over its stream; what it yields goes to sinks and askers."""
        if after_s:
            await asyncio.sleep(after_s)
        try:
            outcome = actor.agent(actor.stream)
            if inspect.isasyncgen(outcome):
                async with aclosing(outcome):
                    async for value in outcome:
                        await reply(self.app, actor, value)
            else:
                await outcome
        except SystemExit as asked:
            raise ExitAsked(f"agent {actor.agent.name}", asked) from None

    async def _actor_ended(self, task: asyncio.Task[None], index: int) -> None:
        actor = self._actors.pop(task, None)
        error = _error_of(task)
        if actor is None:
            return  # ended by a roll-back
        if error is not None:
            await self._failed(actor, index, error)
            return
        try:
            actor.settle()
        except EncodeError as unwritable:
            await self._failed(actor, index, unwritable)
            return
        if not self.stopping:
            log.warning(
                "agent %s returned; it is started again in %.0f s",
                actor.agent.name,
                IDLE_RESTART_S,
            )
            self._start_actor(actor.feed, index, IDLE_RESTART_S)

    def time_out(self, actor: Actor) -> None:
        """The event that `actor` works on took longer than its agent's `timeout`."""
        for task, running in self._actors.items():
            if running is actor:
                task.cancel()

    def enter(self, partition: int | None) -> None:
        """What code writes from now on belongs to `partition`; None: to each key's hash's."""
        if partition != self._entered:
            self._entered = partition
            for table in self.tables:
                table.enter(partition)

    def settled(self, actor: Actor, count: int) -> None:
        """An actor settled events, or one of its was given up."""
        self._statistics.events[actor.agent.name] += count
        self.pending.events += count
        self._unsettled_failures = 0
        if self.checking:
            self.checking = max(0, self.checking - count)
            self.pending.due.set()
        if self.careful and sum(self._statistics.events.values()) >= CAREFUL_EVENTS:
            self.careful = False
        self.pending.dirty.set()
        if actor.alone:
            actor.alone = False
            self.gate.let_go_of(actor)
            self.pending.due.set()
        if self.pending.events >= self.app.settings.checkpoint_events:
            self.pending.due.set()
        self._intake.settled()

    def parked(self, actor: Actor) -> None:
        """An actor waits for events."""
        if not self.gate.working and not self._intake.waiting:
            self.pending.due.set()  # idle: there is nothing to wait for
        if not actor.feed.waiting:
            self._intake.starves(asked=self.gate.asked.total() > 0)

    # Events that fail.

    async def ready_for(self, actor: Actor, run: Run, trial: Trial) -> bool:
        """Prepare for the event at `run.cursor`, which is not like the others.

        True: it may be handed out, alone; a checkpoint was made just before it. False: look
        again, since it was given up, or its time has not come.
        """
        if trial.refused is not None:
            self._give_up(actor, run, trial)
            return False
        if self.gate.asked[actor.agent.name]:
            return True  # who is in work waits for this very agent: nobody can be alone
        if self.gate.solo not in (None, actor):
            self.parked(actor)
            await actor.feed.wait_change()
            return False
        wait_s = trial.not_before - time.monotonic()
        if wait_s > 0:
            if actor.feed.put_behind(run.tp):
                return False
            self.parked(actor)
            await actor.feed.wait_change(wait_s)
            return False
        self.gate.solo = actor
        index = run.cursor
        await self.pending.durable(urgent=False)
        if not self.stopping and actor.feed.runs and actor.feed.runs[0] is run:
            if run.cursor == index:
                return True
        self.gate.let_go_of(actor)
        return False

    def _give_up(self, actor: Actor, run: Run, trial: Trial) -> None:
        """Settle the event at `run.cursor` untried; all that is left of it is a dead letter."""
        index, name = run.cursor, actor.agent.name
        if not trial.skip:
            topic = self.app.dead_letters
            most_bytes = self.session.topic_limits.get(topic, sys.maxsize)
            self.pending.letters.append(dead_letter(run, index, name, trial, topic, most_bytes))
            self._statistics.dead_letters += 1
            log.error(
                "%s@%d of agent %s goes to the dead letters: %s (%s)",
                run.tp, run.positions[index], name, trial.refused, trial.error or "no error",
            )  # fmt: skip
        self._refuse_reply(run, index, trial)
        run.cursor += 1
        actor.feed.waiting -= 1
        if run.cursor == len(run):
            actor.feed.runs.popleft()
        if actor.agent.concurrency == 1:
            self.pending.positions[name, run.tp] = run.position_after(index + 1)
        else:
            window = actor.feed.window(run.tp)
            window.begin(run.positions[index], run.position_after(index + 1))
            self.pending.release(window.settle(run.positions[index], Sent(new_lanes(), [])))
            self.pending.positions[name, run.tp] = window.position
        self.settled(actor, 1)

    def _refuse_reply(self, run: Run, index: int, trial: Trial) -> None:
        """Whoever asked gets an error instead of waiting in vain."""
        reply_to = run.header(index, REPLY_TO)
        correlation_id = run.header(index, CORRELATION_ID)
        if reply_to is not None and correlation_id is not None:
            error = f"{trial.refused}: {trial.error}"
            lanes = new_lanes()
            refuse(self.app, lanes, text_of(reply_to), text_of(correlation_id), error)
            self.pending.outbox.append(lanes)

    async def _failed(self, actor: Actor, index: int, error: BaseException) -> None:
        """An agent raised: take back what no checkpoint holds, and see about the event."""
        if isinstance(error, ExitAsked):
            raise error
        events = actor.failed_events()
        actor.abandon()
        self._statistics.errors += 1
        if not events:
            await self._failed_without_event(actor, index, error)
            return
        if isinstance(error, asyncio.CancelledError) and actor.timed_out:
            where = error.__traceback__  # ends in the line that the agent was at
            error = TimeoutError(f"it took longer than {actor.agent.timeout_s:g} s")
            error = error.with_traceback(where)
        for run, i in events:
            self._trials.judge(actor.agent, run, i, error)
        for other in self._actors.values():
            if other.asks[actor.agent.name]:
                # Its next try asks anew: without an end to its tries there would be none.
                failed = AgentFailed(f"agent {actor.agent.name!r}, which it asked, failed")
                for run, i in other.failed_events():
                    self._trials.judge(other.agent, run, i, failed)
        await self._roll_back(actor)

    async def _failed_without_event(
        self, actor: Actor, index: int, error: BaseException
    ) -> None:
        self._unsettled_failures += 1
        log.error("agent %s failed between events", actor.agent.name, exc_info=error)
        if self._unsettled_failures > self.app.settings.retries:
            raise stopped(actor.agent.name, "its start", f"{type(error).__name__}: {error}")
        pause_s = min(
            self.app.settings.retry_backoff * 2**self._unsettled_failures, RETRY_MAX_S
        )
        self._start_actor(actor.feed, index, pause_s)

    async def _roll_back(self, *failed: Actor, without: Collection[int] = frozenset()) -> None:
        """Go back to the last checkpoint: nothing of a failed try is left behind.

        Args:
            failed: Actors that have ended, beside those that are ended here.
            without: Partitions that are another process's from now on.
        """
        self.gate.steady.clear()
        self.gate.quiet.set()  # a checkpoint that waits for quiet gives up instead
        actors, self._actors = dict(self._actors), {}
        for actor in actors.values():
            actor.abandon()
        lost = [errand for errand in self.errands if errand.roll_back()]
        self.gate.working.difference_update(lost)
        await _end([*actors, *([self._reading] if self._reading is not None else [])])
        # What their code started ends with it, also where that was only now.
        scopes: list[Actor | Errand] = [*failed, *actors.values(), *lost]
        await _end([task for scope in scopes for task in scope.tasks])
        async with self._commit_lock:
            # Code that is no agent ran on meanwhile: what it wrote goes too.
            while late := [
                errand
                for errand in self.errands
                if not errand.rolled_back and errand.roll_back()
            ]:
                await _end([task for errand in late for task in errand.tasks])
            failpoint("rollback.before-drop")
            self._drop_pending(without)
        failpoint("rollback.after-drop")
        self.gate.steady.set()
        self._start_reading()
        self._start_actors()
        if self.stopping:
            self.stop()

    def _drop_pending(self, without: Collection[int]) -> None:
        for table in self.tables:
            for partition in without:
                table.lose(partition)
            table.drop()
        for feed in self._feeds:
            feed.clear()
        self.gate.forget()
        self._entered = -1
        self.pending.lose(without)
        self.pending.drop(self.errands)
        positions = self.pending.positions
        for tp in {tp for _, tp in positions}:
            first = min(at for (_, other), at in positions.items() if other == tp)
            self.session.seek(tp, first)

    # Checkpoints.

    async def _make_checkpoints(self) -> None:
        interval_s = self.app.settings.checkpoint_interval
        while True:
            await self.pending.dirty.wait()
            await self.gate.steady.wait()
            left_s = self._checkpointed_at + interval_s - time.monotonic()
            if left_s > 0 and not self.pending.due.is_set():
                try:
                    async with asyncio.timeout(left_s):
                        await self.pending.due.wait()
                except TimeoutError:
                    self.pending.due.set()
            await self._checkpoint()

    async def _checkpoint(self) -> None:
        """Make what is settled durable, in five steps.

        1. Where the group has tables: wait until no event is in work. 2. Take outputs, changed
        rows and positions. 3. Let events be handed out again. 4. Commit, until it is done.
        5. Fold what was committed into the tables, and tell who waits.
        """
        async with self._commit_lock:
            self.gate.cut()
            if self.tables and not await self.gate.wait_quiet():
                return
            failpoint("checkpoint.before-take")
            try:
                taken = self._take_checkpoint()
            except EncodeError as error:
                self._find_unwritable(error)
                return
            self._open_gate()
            failpoint("checkpoint.after-take")
            began_at = time.monotonic()
            if taken.checkpoint:
                try:
                    await self._commit(taken.checkpoint)
                except Outdated as outdated:
                    self._give_up_checkpoint(outdated, taken)
                    return
                failpoint("checkpoint.committed")
                self._statistics.checkpointed(time.monotonic() - began_at, taken.checkpoint)
            self._landed(taken)
            failpoint("checkpoint.landed")

    def _find_unwritable(self, error: EncodeError) -> None:
        """A table holds what cannot be stored: go back, and ask each event from then on."""
        log.error("a checkpoint cannot be made: %s; its events are looked at again", error)
        self.checking = CAREFUL_EVENTS
        self.gate.steady.clear()
        self._post(self._roll_back)

    def _give_up_checkpoint(self, outdated: Outdated, taken: Taken) -> None:
        """What it holds is taken over anew, by this process or another: go back."""
        log.info("%s goes back to its last checkpoint: %s", self.group, outdated)
        for waiter in taken.waiters:
            waiter.refuse()
        self.gate.steady.clear()
        self._open_gate()  # an earlier try has closed it, and there may be nothing to commit
        self._post(self._roll_back)

    def check_writes(self) -> None:
        """See whether what was written since the last checkpoint can be stored.

        Raises:
            EncodeError: It cannot.
        """
        for table in self.tables:
            table.check()

    def _open_gate(self) -> None:
        self._checkpointed_at = time.monotonic()
        self.gate.open()

    def _take_checkpoint(self) -> Taken:
        changes = [change for table in self.tables for change in self._changes_of(table)]
        for errand in self.errands:
            if not errand.whole:
                self.pending.outbox.append(errand.take_lanes())
        return self.pending.take(changes)

    def _changes_of(self, table: Table) -> list[TableChange]:
        before = table.scattered
        changes = [TableChange(table.name, *change) for change in table.snapshot()]
        if table.scattered and not before:
            log.warning(
                "table %s holds keys outside of the partition they hash to, since its events "
                "are not keyed by them; every look-up asks all owners, and a key that is in "
                "several partitions has no one value. group_by, or an agent that is sent to "
                "with key=, puts each key into one partition",
                table.name,
            )
            self.announce(self.owns())
        return changes

    async def _commit(self, checkpoint: Checkpoint) -> None:
        pause_s = 0.1
        while True:
            try:
                await self.session.commit(checkpoint)
                return
            except (Fenced, LogDamaged, Outdated):
                # Where the disk failed to keep a log, a second try may say that all is well.
                raise
            except BrokerError as error:
                log.error("a checkpoint failed: %s; trying again in %.1f s", error, pause_s)
                self.gate.shut()  # nothing more is taken on until this one is done
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, RETRY_MAX_S)

    def _landed(self, taken: Taken) -> None:
        self.pending.committed.update(taken.checkpoint.positions)
        self._trials.forget_durable(self.pending.committed)
        for table in self.tables:
            table.landed()
        self._open_gate()
        for errand in self.errands:
            errand.landed()
        for waiter in taken.waiters:
            if not waiter.done.done():
                waiter.done.set_result(None)
        for callback, metadata in taken.callbacks:
            try:
                outcome = callback(metadata)
            except Exception:
                log.exception("the callback of a send to %s failed", metadata.topic)
                continue
            if outcome is not None:
                self._spawn(_finish_callback(outcome, metadata), "callback")

    # Code that is no agent: timers, tasks, pages.

    async def perform(
        self, name: str, coro: Coroutine[Any, Any, Any], *, whole: bool = True
    ) -> Any:
        """Run a tick, a view or a task in the group; return what it returns.

        It may write the group's tables and send. When it returns, all of that is durable; when
        it raises, nothing of it is kept.

        Args:
            whole: It counts as one event; False for a task, of which each stretch does.

        Raises:
            RolledBack: What it did was taken back; it may be run again.
        """
        errand = Errand(self, name, whole)
        context = copy_context()
        context.run(current_scope.set, errand)
        errand.task = asyncio.get_running_loop().create_task(coro, name=name, context=context)
        self.errands.add(errand)
        try:
            result = await self._outcome(errand)
            if whole:
                self.pending.outbox.append(errand.take_lanes())
                errand.over()
            if errand.left_something:
                await self.pending.durable(errand)
            return result
        finally:
            self.errands.discard(errand)
            if not whole:
                self.pending.outbox.append(errand.take_lanes())

    async def _outcome(self, errand: Errand) -> Any:
        """What the errand's code returns; what it raises, once all that it wrote is gone."""
        assert errand.task is not None
        try:
            result = await errand.task
            if errand.rolled_back:
                raise RolledBack()
            return result
        except BaseException as error:
            rolled_back = errand.rolled_back
            errand.task.cancel()
            if errand in self.gate.working:
                gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._post(partial(self._roll_back_then, gone))
                await gone
            ended = not isinstance(error, asyncio.CancelledError) or errand.task.cancelled()
            if rolled_back and ended:
                raise RolledBack() from None
            raise

    async def _roll_back_then(self, gone: "asyncio.Future[None]") -> None:
        await self._roll_back()
        if not gone.done():
            gone.set_result(None)

    def sending(self) -> None:
        """An errand sent something."""
        if not self.pending.dirty.is_set():
            self.pending.dirty.set()
            if not self.gate.working:
                self.pending.due.set()

    def is_full(self) -> bool:
        """True while senders that may wait should."""
        return sum(errand.waiting for errand in self.errands) > WAITING_RECORDS

    async def send_now(self, topic: str, record: Record) -> RecordMetadata:
        """Append one record outside any checkpoint."""
        partition = max(record.partition, 0)
        timestamp = record.timestamp or time.time()
        output = Output(
            TP(topic, partition),
            [record.key],
            [record.value],
            [timestamp],
            [record.headers] if record.headers else None,
        )
        offsets = await self.session.append([output])
        return RecordMetadata(topic, partition, offsets[0], timestamp)

    # Telling.

    def statistics(self) -> "Statistics":
        """Counters since the start; `behind` as of the last checkpoint."""
        self._statistics.behind = self.session.behind() if self.ready.is_set() else {}
        self._statistics.retries = self._trials.retries
        return self._statistics


def _error_of(task: asyncio.Task[None]) -> BaseException | None:
    """What a task that ended raised."""
    try:
        return task.exception()
    except asyncio.CancelledError as cancelled:
        return cancelled


async def _end(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended; whoever swallows it is told again."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_S)
        if left:
            log.warning(
                "still not ended %.0f s after it was cancelled; its group waits: %s",
                CANCEL_AGAIN_S,
                ", ".join(sorted(task.get_name() for task in left)),
            )
    for task in tasks:
        _error_of(task)  # looked at: nobody else would


async def _finish_callback(outcome: Awaitable[None], metadata: RecordMetadata) -> None:
    try:
        await outcome
    except Exception:
        log.exception("the callback of a send to %s failed", metadata.topic)
