"""What runs by the clock in an agent process: tasks, timers and cron jobs.

A task runs once, from the start; when it raises, it is started again after a back-off. Timers
and cron jobs are called for each of their moments, one call after another: a moment that
passed while the last call ran is skipped, never made up for. An exception of a call is logged
and counted, and the next moment is waited for. A call whose group was rolled back while it ran
left nothing behind and is made again. One that calls `sys.exit` ends the process, warm.

`Every` only computes; `Schedule` takes its clocks and its sleep as arguments.
"""

import asyncio
import inspect
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from streamd.agentproc.exits import ExitAsked
from streamd.agentproc.pending import RolledBack
from streamd.cron import Cron, CronClock

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.25
MAX_BACKOFF_S = 60.0

# A wall clock may be set while we sleep: it is looked at this often.
MAX_SLEEP_S = 1.0

Function = Callable[..., Any]
Perform = Callable[[str, Coroutine[Any, Any, Any]], Awaitable[Any]]  # `Engine.perform`


class Every:
    """When a timer is due: on a grid of `interval_s` that begins at its start.

    A call that comes late moves no later one.

    >>> every = Every(10.0, started_at=100.0)
    >>> every.next_after(100.0), every.next_after(110.0), every.next_after(134.9)
    (110.0, 120.0, 140.0)
    """

    def __init__(self, interval_s: float, started_at: float) -> None:
        self._interval_s = interval_s
        self._started_at = started_at

    def next_after(self, now: float) -> float:
        """The first moment after `now`, on the clock of `started_at`."""
        passed = math.floor((now - self._started_at) / self._interval_s)
        due = self._started_at + (passed + 1) * self._interval_s
        # The division may round up to the moment that is `now`.
        return due if due > now else due + self._interval_s


def backoff_s(failures: int, jitter: Callable[[], float] = random.random) -> float:
    """How long to wait after the n-th failure in a row: full jitter, doubling to a minute."""
    return jitter() * min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 20))


@dataclass(frozen=True)
class Job:
    """A task, timer or cron job of the app, as this process runs it."""

    name: str
    kind: str  # "task" | "timer" | "crontab"
    fun: Function
    perform: Perform
    interval_s: float = 0.0  # timer
    cron: Cron | None = None  # crontab
    may_run: Callable[[], bool] = lambda: True  # asked before each call


@dataclass
class Counters:
    """What happened to a job since the process started."""

    calls: int = 0
    errors: int = 0
    repeats: int = 0  # calls made again because the group was rolled back


@dataclass
class Clocks:
    """The time, as the schedule sees it."""

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    jitter: Callable[[], float] = random.random


@dataclass
class Schedule:
    """The jobs of one process.

    A function that takes an argument gets `app`; `on_exit` is told when one called `sys.exit`.
    """

    app: Any
    on_exit: Callable[[ExitAsked], None]
    clocks: Clocks = field(default_factory=Clocks)
    counters: dict[str, Counters] = field(default_factory=dict)  # by the job's name

    def __post_init__(self) -> None:
        self._running: dict[asyncio.Task[None], Job] = {}
        self._in_call: set[asyncio.Task[None]] = set()
        self._stopping = False

    def start(self, jobs: Iterable[Job]) -> None:
        """Run these jobs from now on, in the running loop. May be called again with others."""
        for job in jobs:
            if self._stopping:
                return
            self.counters[job.name] = Counters()
            run = self._run_task if job.kind == "task" else self._run_calls
            task = asyncio.create_task(run(job), name=f"{job.kind} {job.name}")
            self._running[task] = job
            task.add_done_callback(self._ended)

    def end(self, names: Iterable[str]) -> None:
        """Run these jobs no more; a call that runs is cancelled."""
        ending = set(names)
        for task, job in self._running.items():
            if job.name in ending:
                task.cancel()

    async def stop(self) -> None:
        """Start no call any more, cancel the tasks, wait for the calls that run."""
        self._stopping = True
        for task in list(self._running):
            if task not in self._in_call:
                task.cancel()
        if self._running:
            await asyncio.wait(list(self._running))

    async def abort(self) -> None:
        """Cancel everything and do not wait for what does not end at once."""
        self._stopping = True
        for task in self._running:
            task.cancel()
        await asyncio.sleep(0)

    @property
    def busy_with(self) -> list[str]:
        """The timers and cron jobs that are being called."""
        jobs = [self._running[task] for task in self._in_call]
        return sorted(f"{job.kind} {job.name}" for job in jobs)

    @property
    def errors(self) -> int:
        """How often a job raised."""
        return sum(counters.errors for counters in self.counters.values())

    def _leave(self, asked: ExitAsked) -> None:
        self._stopping = True  # nothing is called in a process that ends
        self.on_exit(asked)

    def _ended(self, task: asyncio.Task[None]) -> None:
        job = self._running.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s %s ended: it is not run any more", job.kind, job.name, exc_info=error)

    async def _run_task(self, job: Job) -> None:
        counters, failures = self.counters[job.name], 0
        while True:
            counters.calls += 1
            started_at = self.clocks.monotonic()
            try:
                await job.perform(f"task {job.name}", self._call(job))
                return
            except RolledBack:
                counters.repeats += 1
                continue
            except ExitAsked as asked:
                self._leave(asked)
                return
            except Exception:
                counters.errors += 1
                if self.clocks.monotonic() - started_at > MAX_BACKOFF_S:
                    failures = 0
                failures += 1
                delay_s = backoff_s(failures, self.clocks.jitter)
                log.exception("task %s failed; it starts again in %.1f s", job.name, delay_s)
            await self.clocks.sleep(delay_s)

    async def _run_calls(self, job: Job) -> None:
        every = Every(job.interval_s, self.clocks.monotonic()) if job.cron is None else None
        clock = CronClock(job.cron, self._now()) if job.cron is not None else None
        task = asyncio.current_task()
        assert task is not None
        while not self._stopping:
            if every is not None:
                await self._sleep_until(every.next_after(self.clocks.monotonic()))
            elif clock is not None and not await self._sleep_until_slot(clock):
                return
            if not job.may_run():
                continue
            self._in_call.add(task)
            try:
                await self._call_once(job)
            finally:
                self._in_call.discard(task)

    async def _sleep_until(self, due: float) -> None:
        # The loop's timer may be a hair early by our clock.
        while (left_s := due - self.clocks.monotonic()) > 0:
            await self.clocks.sleep(left_s)

    async def _sleep_until_slot(self, clock: CronClock) -> bool:
        """False where no slot is to come any more."""
        while not clock.take(now := self._now()):
            due_in_s = clock.due_in(now)
            if math.isinf(due_in_s):
                return False
            await self.clocks.sleep(min(due_in_s, MAX_SLEEP_S))
        return True

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self.clocks.wall(), UTC)

    async def _call_once(self, job: Job) -> None:
        counters = self.counters[job.name]
        while True:
            counters.calls += 1
            try:
                await job.perform(f"{job.kind} {job.name}", self._call(job))
                return
            except RolledBack:
                counters.repeats += 1
            except ExitAsked as asked:
                self._leave(asked)
                return
            except Exception:
                counters.errors += 1
                log.exception("%s %s failed; it goes on at its next time", job.kind, job.name)
                return

    async def _call(self, job: Job) -> None:
        try:
            result = job.fun(self.app) if takes_app(job.fun) else job.fun()
            if inspect.isawaitable(result):
                await result
        except SystemExit as asked:
            raise ExitAsked(f"{job.kind} {job.name}", asked) from None


def takes_app(fun: Function) -> bool:
    """True where the function has a parameter that must be given: the app."""
    return any(
        parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        for parameter in inspect.signature(fun).parameters.values()
    )
