"""One agent process: from the fork to its exit code.

It runs an engine for each group of its plan, the jobs of those groups by the clock, answers on
its socket, and tells the master how it is. It ends by exactly one of: all engines stopped after
TERM (0), QUIT (3), the master gone (70), an engine that cannot go on (that error's code),
`sys.exit` of the user's (its code), a bug (1). There is no other clean-up than the engines':
what is in no checkpoint is done again.
"""

import asyncio
import dataclasses
import faulthandler
import fcntl
import gc
import logging
import os
import signal
import socket
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import uvloop

from streamd.agentproc.beats import Beats, Stage
from streamd.agentproc.broker import Broker, Lead
from streamd.agentproc.broker.embedded import EmbeddedBroker
from streamd.agentproc.broker.memory import MemoryBroker
from streamd.agentproc.engine import Engine
from streamd.agentproc.exits import ExitAsked, exit_code_of
from streamd.agentproc.kafka.installation import installation
from streamd.agentproc.lookup import RemoteTables
from streamd.agentproc.reads import CommittedTables, ReadServer
from streamd.agentproc.replying import receive
from streamd.agentproc.routing import place_of
from streamd.agentproc.schedule import Job, Schedule
from streamd.agentproc.sharing import give_back_zeros
from streamd.agentproc.stacks import write_task_stacks
from streamd.agentproc.steps import task_factory
from streamd.agentproc.views import Answers
from streamd.agents import Replies
from streamd.app import App
from streamd.config import broker_kind
from streamd.errors import ConfigError, StreamdError, WireError
from streamd.link import Answer, Link, adopt, serve
from streamd.log import follow_log, push_log
from streamd.wire import (
    Begin,
    Draining,
    DumpTasks,
    Failing,
    Leave,
    Message,
    Open,
    Owners,
    Plan,
    Ready,
    Stats,
)

log = logging.getLogger(__name__)

STATS_S = 1.0
COLD_S = 0.3
GOODBYE_S = 0.2
GARBAGE_OBJECTS = 10_000  # new ones before garbage is looked for
REHEARSED_ROWS = 100  # of each partition of each table

STORES = "store"  # in the data directory

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_COLD = 3
EXIT_MASTER_GONE = 70


class Ends(NamedTuple):
    """The descriptors that came with the fork, besides the log pipe."""

    link: int
    page: int
    dump: int


def run(plan: Plan, app: App, ends: Ends) -> int:
    """Run what `plan` says until told to stop; the exit code.

    Signals are blocked when this is called and let in once their handlers stand. The caller
    ends the process by `os._exit`: threads and tasks of the user's may still run then.
    """
    follow_log()
    # Events that wait are many objects and no garbage: Python's 700 has each looked at often.
    gc.set_threshold(GARBAGE_OBJECTS)
    loop = uvloop.new_event_loop()
    # It holds a read buffer of 250 KB.
    give_back_zeros(loop)
    # uvloop's stubs know neither the keyword arguments nor tasks of any result.
    loop.set_task_factory(task_factory)  # type: ignore[arg-type]
    asyncio.set_event_loop(loop)
    # Never closed: that would wait for threads that the user's code started.
    try:
        return loop.run_until_complete(Process(plan, app, ends).run())
    except SystemExit as asked:
        # From a task or a callback that the user's code started by itself.
        return exit_code_of(asked)


class Process:
    """What runs in one agent process."""

    def __init__(self, plan: Plan, app: App, ends: Ends) -> None:
        self._plan = plan
        self._app = app
        self._ends = ends
        self._beats = Beats(ends.page)
        os.close(ends.page)
        self._link: Link | None = None
        self._engines: dict[str, Engine] = {}  # by group
        self._generations: dict[str, int | None] = {plan.group: None for plan in plan.groups}
        self._runs: list[asyncio.Task[None]] = []  # of the engines
        self._answers: Answers | None = None
        self._schedule = Schedule(app, self._leave)
        self._remote: RemoteTables | None = None
        self._broker: Broker | None = None
        self._server: asyncio.Server | None = None
        self._end: asyncio.Future[int] = asyncio.get_event_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._leaving = False  # it ends for good
        self._leads: list[Lead] = []
        self._exit_code = EXIT_DONE  # of a warm stop
        self._begun = asyncio.Event()  # tasks, timers and cron jobs may start
        if not plan.waits:
            self._begun.set()
        self._may_open = asyncio.Event()  # the log is there
        if not plan.early:
            self._may_open.set()

    async def run(self) -> int:
        """Run until something ends it; the exit code."""
        self._take_signals()
        self._beats.start()
        master = socket.socket(fileno=self._ends.link)
        self._link = await adopt(
            master, "the master", self._take_order, on_lost=self._master_is_gone
        )
        self._spawn(self._start(), "start")
        code = await self._end
        await self._say_goodbye()
        return code

    # What the master says.

    def _take_signals(self) -> None:
        loop, dump = asyncio.get_running_loop(), self._ends.dump
        # The master cuts the file between two dumps: each write belongs at its end.
        fcntl.fcntl(dump, fcntl.F_SETFL, fcntl.fcntl(dump, fcntl.F_GETFL) | os.O_APPEND)
        # The loop's handler first: registered second, it would replace faulthandler's, and
        # a process that is stuck would show nothing.
        loop.add_signal_handler(signal.SIGUSR1, self._write_stacks)
        faulthandler.register(signal.SIGUSR1, file=dump, all_threads=True, chain=True)
        faulthandler.enable(file=dump, all_threads=True)
        loop.add_signal_handler(signal.SIGTERM, self._stop_warm)
        loop.add_signal_handler(signal.SIGQUIT, self._stop_cold)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    async def _take_order(self, link: Link, message: Message) -> Answer:
        match message:
            case Owners():
                if self._remote is not None:
                    self._remote.know(message)
            case Begin():
                self._begun.set()
            case Open():
                self._may_open.set()
            case Leave():
                self._leaving = True
                for engine in self._engines.values():
                    engine.leaving = True
            case DumpTasks():
                self._write_stacks()
            case _:
                raise WireError(f"the master sent a {type(message).__name__}")
        return None

    def _write_stacks(self) -> None:
        in_work = [
            line
            for engine in self._engines.values()
            for line in engine.gate.busy_with(keys=True)
        ]
        in_work += self._calls_in_work()
        write_task_stacks(self._ends.dump, asyncio.get_running_loop(), in_work)

    def _calls_in_work(self) -> list[str]:
        pages = self._answers.busy_with if self._answers is not None else []
        return [*self._schedule.busy_with, *pages]

    def _master_is_gone(self, link: Link) -> None:
        if not self._end.done():
            # At once: a successor's processes may claim the partitions any moment.
            os._exit(EXIT_MASTER_GONE)

    # Starting.

    async def _start(self) -> None:
        plan, app = self._plan, self._app
        broker = self._broker = make_broker(app, plan)
        if plan.canary:
            self._rehearse(broker)
            self._tell(Ready([group.group for group in plan.groups]))
            self._finish(EXIT_DONE)
            return
        app.open_replies = partial(self._open_replies, broker)
        for group in plan.groups:
            self._engines[group.group] = Engine(
                app, group, broker, self._beats,
                careful=plan.careful, parked=tuple(plan.parked), alone=plan.alone,
            )  # fmt: skip
        self._remote = self._look_elsewhere()
        tables = CommittedTables(
            app, self._generations, lambda group: self._engines[group].session.is_sure()
        )
        self._answers = Answers(app, self._engines, self._generations, tables)
        # Kept: uvloop closes the socket of a server that nobody holds.
        self._server = await serve(plan.address, plan.process, self._answers.take)
        if app.tables:
            # A tenth of a process's start, which an app without look-ups does without.
            ReadServer(plan.address, tables.answer).start()
        await self._may_open.wait()
        self._beats.enter(Stage.RECOVERING)
        for engine in self._engines.values():
            engine.announce = self._tell
            name = f"engine {engine.group}"
            self._runs.append(self._spawn(self._run_engine(engine), name))
            self._spawn(self._open_group(engine), f"open {engine.group}")
        self._spawn(self._report(), "report")

    def _rehearse(self, broker: Broker) -> None:
        """Open what processes of this code will open, and read a little; claim nothing.

        Raises:
            StreamdError: They could not, or a table holds what the code cannot read.
        """
        for group in self._plan.groups:
            Engine(self._app, group, broker, self._beats, alone=True)
        if not isinstance(broker, EmbeddedBroker):
            return
        for table in self._app.tables.values():
            for partition in range(table.partitions or 1):
                rows = broker.reader.rows(
                    table.name, partition, after=None, limit=REHEARSED_ROWS
                )
                try:
                    table.load(rows)
                except StreamdError as error:
                    raise StreamdError(
                        f"table {table.name!r} holds rows that the code cannot read: {error}",
                        seen=error.seen,
                        remedy=error.remedy,
                    ) from error

    def _look_elsewhere(self) -> RemoteTables:
        """Let the tables of groups that do not run here ask their owners."""
        app = self._app
        remote = RemoteTables(
            self._plan.runtime_dir,
            {group.name: group.processes for group in app.groups},
            {table.name: table.group for table in app.tables.values()},
        )
        for table in app.tables.values():
            if table.group not in self._engines:
                table.look_elsewhere(remote, place_of(app, table))
            else:
                table.remote = remote  # another process of the group may have a key
        return remote

    async def _run_engine(self, engine: Engine) -> None:
        await engine.run()
        if not self._stopping:
            raise RuntimeError(f"the engine of {engine.group} ended though nobody stopped it")

    async def _open_group(self, engine: Engine) -> None:
        """Once it has recovered: answer for its tables; once all runs, start its jobs."""
        await engine.ready.wait()
        self._generations[engine.group] = engine.session.generation
        self._tell(engine.owns())
        if self._stopping:
            return
        if None not in self._generations.values():
            self._beats.enter(Stage.RUNNING)
            self._tell(Ready(list(self._generations)))
        await self._begun.wait()
        # A job may keep the loop for long: what was told leaves first.
        await asyncio.sleep(0)
        self._schedule.start(self._jobs(engine, once=False))
        if self._plan.leader and (jobs := self._jobs(engine, once=True)):
            await self._stand(engine.group, jobs)

    async def _stand(self, group: str, jobs: list[Job]) -> None:
        """Run jobs whenever this process is the one of all hosts that does."""
        lead: Lead | None = None

        def tell(leads: bool) -> None:
            if leads:
                self._schedule.start(jobs)
            else:
                self._schedule.end([job.name for job in jobs])

        def may_run() -> bool:
            return lead is None or lead.holds()

        jobs = [dataclasses.replace(job, may_run=may_run) for job in jobs]
        assert self._broker is not None
        lead = await self._broker.lead(group, tell)
        if self._stopping:
            await lead.close(leave=self._leaving)
        else:
            self._leads.append(lead)

    def _jobs(self, engine: Engine, *, once: bool) -> list[Job]:
        """What runs by the clock in the group of `engine`, here; `once`: in one process."""
        return [
            Job(
                timer.name, timer.kind, timer.fun,
                partial(engine.perform, whole=timer.kind != "task"),
                interval_s=timer.interval_s, cron=timer.cron,
            )
            for timer in self._app.timers
            if timer.group == engine.group and timer.on_leader == once
        ]  # fmt: skip

    # Running.

    async def _open_replies(self, broker: Broker) -> Replies:
        tasks: set[asyncio.Task[None]] = set()
        replies = await receive(self._app, broker, self._plan.process, tasks)
        for task in tasks:
            self._watch(task)
        return replies

    async def _report(self) -> None:
        told: Stats | None = None
        while True:
            await asyncio.sleep(STATS_S)
            push_log()
            stats = self._stats()
            # A hundred idle processes would keep the master busy with news that are none.
            if stats != told:
                self._tell(stats)
                told = stats
            if self._stopping:
                self._tell(Draining([*stats.busy_with, *self._calls_in_work()]))

    def _stats(self) -> Stats:
        engines = self._engines.values()
        parts = [engine.statistics() for engine in engines]
        count = sum(part.checkpoints for part in parts)
        spent_ms = sum(part.checkpoint_ms * part.checkpoints for part in parts)
        return Stats(
            events={name: n for part in parts for name, n in part.events.items()},
            lag={name: n for part in parts for name, n in part.behind.items()},
            tables={
                table.name: table.held_keys() for engine in engines for table in engine.tables
            },
            checkpoints=count,
            checkpoint_ms=spent_ms / count if count else 0.0,
            errors=sum(part.errors for part in parts) + self._schedule.errors,
            retries=sum(part.retries for part in parts),
            dead_letters=sum(part.dead_letters for part in parts),
            sent=sum(part.sent for part in parts),
            busy_with=[line for engine in engines for line in engine.gate.busy_with()],
            waits_for=self._broker.waits_for if self._broker is not None else "",
            client=self._broker.client_figures() if self._broker is not None else {},
            standby=self._broker.standby() if self._broker is not None else [],
        )

    def _tell(self, message: Message) -> None:
        if self._link is not None:
            self._link.send(message)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run `work` as a task; whatever it raises ends the process."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._watch(task)
        return task

    def _watch(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, ExitAsked):
            log.warning("%s", error)
            self._finish(error.code)
        elif isinstance(error, StreamdError):
            self._tell(Failing(str(error), error.seen, error.remedy, error.exit_code))
            self._finish(error.exit_code)
        else:
            log.error("%s failed", task.get_name(), exc_info=error)
            self._finish(EXIT_FAILED)

    # Ending.

    def _stop_warm(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        self._beats.enter(Stage.DRAINING)
        self._spawn(self._drain(), "drain")

    async def _drain(self) -> None:
        # What came before the signal may not have been read: that it ends for good.
        assert self._link is not None
        await self._link.drain()
        # What needs an engine ends before the engines do.
        await self._schedule.stop()
        if self._answers is not None:
            await self._answers.stop()
        await asyncio.gather(*(lead.close(leave=self._leaving) for lead in self._leads))
        for engine in self._engines.values():
            engine.stop()
        if self._runs:
            await asyncio.wait(self._runs)
        self._finish(self._exit_code)

    def _leave(self, asked: ExitAsked) -> None:
        """A task or a timer called `sys.exit`: keep what it did, and end with its code."""
        log.warning("%s", asked)
        if not self._stopping:
            self._exit_code = asked.code
            self._stop_warm()

    def _stop_cold(self) -> None:
        self._stopping = True
        # A drain that this interrupts must not end as if it had been done.
        self._exit_code = EXIT_COLD
        self._spawn(self._abort(), "abort")

    async def _abort(self) -> None:
        engines = self._engines.values()
        try:
            async with asyncio.timeout(COLD_S):
                # The engines' main tasks first: they would take the end of what runs for a
                # failure, and begin anew.
                for run in self._runs:
                    run.cancel()
                await self._schedule.abort()
                await asyncio.gather(*(engine.abort() for engine in engines))
        except TimeoutError:
            log.warning("did not end in %.1f s; it is left as it is", COLD_S)
        self._finish(EXIT_COLD)

    def _finish(self, code: int) -> None:
        # The first cause counts.
        if not self._end.done():
            self._end.set_result(code)

    async def _say_goodbye(self) -> None:
        """Let the master have what was sent to it, if it takes it."""
        assert self._link is not None
        self._tell(self._stats())
        self._link.close()
        try:
            async with asyncio.timeout(GOODBYE_S):
                await self._link.closed.wait()
        except TimeoutError:
            log.warning("the master did not read the last words of %s", self._plan.process)


def make_broker(app: App, plan: Plan) -> Broker:
    """The broker that the settings name; nothing is opened yet.

    Raises:
        ConfigError: There is no such broker in this version.
    """
    settings = app.settings
    match kind := broker_kind(settings.broker):
        case "embedded":
            return EmbeddedBroker(
                Path(plan.datadir), Path(plan.runtime_dir), settings.topic_partitions
            )
        case "memory":
            return MemoryBroker(settings.topic_partitions)
        case "kafka":
            # Processes on the embedded log need none of it.
            from streamd.agentproc.broker.kafka import KafkaBroker  # noqa: PLC0415

            datadir = Path(plan.datadir)
            return KafkaBroker(
                settings,
                app.topic_infos(),
                installation(datadir),
                gateway=plan.gateway,
                stores=datadir / STORES,
            )
        case _:
            raise ConfigError(
                f"the broker is {settings.broker!r}, and this version has none for {kind}",
                remedy='broker="embedded://"',
            )
