"""Tasks, timers and cron jobs on a clock that the test moves."""

import asyncio
import heapq
import itertools
import logging
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.agentproc.exits import ExitAsked
from streamd.agentproc.pending import RolledBack
from streamd.agentproc.schedule import (
    MAX_BACKOFF_S,
    Clocks,
    Every,
    Job,
    Schedule,
    backoff_s,
    takes_app,
)
from streamd.cron import Cron


class FakeTime:
    """Both clocks, and a sleep that ends when `advance` has passed it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.wall_offset = 1_700_000_000.0
        self.slept: list[float] = []
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def clocks(self) -> Clocks:
        return Clocks(
            monotonic=lambda: self.now,
            wall=lambda: self.now + self.wall_offset,
            sleep=self.sleep,
            jitter=lambda: 1.0,
        )

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, next(self._order), waiter))
        await waiter

    async def advance(self, seconds: float) -> None:
        """Let time pass, waking whoever is due in order."""
        until = self.now + seconds
        await settle()
        while self._sleepers and self._sleepers[0][0] <= until:
            due, _, waiter = heapq.heappop(self._sleepers)
            self.now = max(self.now, due)
            if not waiter.done():
                waiter.set_result(None)
            await settle()
        self.now = until


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Scopes:
    """Notes what is performed; the first `rolled_back` of them end with a roll-back."""

    def __init__(self, rolled_back: int = 0) -> None:
        self.names: list[str] = []
        self.open = 0
        self._rolled_back = rolled_back

    async def __call__(self, name: str, work: Coroutine[Any, Any, Any]) -> None:
        self.names.append(name)
        self.open += 1
        try:
            await work
            if len(self.names) <= self._rolled_back:
                raise RolledBack
        finally:
            self.open -= 1


left: list[ExitAsked] = []


def run(scenario: Callable[[FakeTime, Schedule], Awaitable[None]], app: Any = None) -> Schedule:
    left.clear()

    async def main() -> Schedule:
        time = FakeTime()
        schedule = Schedule(app, left.append, time.clocks())
        await scenario(time, schedule)
        await schedule.abort()
        return schedule

    return asyncio.run(main())


def timer(fun: Callable[..., Any], interval_s: float, scope: Any = None) -> Job:
    return Job("tick", "timer", fun, scope or Scopes(), interval_s=interval_s)


def test_timer_is_first_called_after_one_interval_and_then_on_its_grid() -> None:
    at: list[float] = []

    async def scenario(time: FakeTime, schedule: Schedule) -> None:
        schedule.start([timer(lambda: at.append(time.now), 10.0)])
        await time.advance(35.0)

    run(scenario)

    assert at == [1010.0, 1020.0, 1030.0]


def test_sys_exit_of_a_timer_is_told_and_the_timer_is_not_called_again() -> None:
    calls: list[int] = []

    async def scenario(time: FakeTime, schedule: Schedule) -> None:
        def leaves() -> None:
            calls.append(1)
            sys.exit(7)

        schedule.start([timer(leaves, 1.0)])
        await time.advance(3.5)

    run(scenario)

    assert calls == [1]
    assert [asked.code for asked in left] == [7]
    assert str(left[0]) == "timer tick ended its process with exit code 7"


def test_slow_call_is_never_overlapped_and_what_it_missed_is_skipped() -> None:
    at: list[float] = []

    async def scenario(time: FakeTime, schedule: Schedule) -> None:
        async def slow() -> None:
            at.append(time.now)
            await time.sleep(25.0)

        schedule.start([timer(slow, 10.0)])
        await time.advance(75.0)

    run(scenario)

    assert at == [1010.0, 1040.0, 1070.0]


def test_exception_of_a_call_is_logged_and_counted_and_the_timer_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[int] = []

    async def scenario(time: FakeTime, schedule: Schedule) -> None:
        def fails() -> None:
            calls.append(1)
            raise ValueError("no luck")

        schedule.start([timer(fails, 1.0)])
        await time.advance(3.5)

    schedule = run(scenario)

    assert len(calls) == 3
    assert schedule.counters["tick"].errors == 3 == schedule.errors
    assert "timer tick failed" in caplog.text and "no luck" in caplog.text


def test_call_that_was_rolled_back_is_made_again_at_once() -> None:
    scopes = Scopes(rolled_back=2)
    at: list[float] = []

    async def scenario(time: FakeTime, schedule: Schedule) -> None:
        schedule.start([timer(lambda: at.append(time.now), 10.0, scopes)])
        await time.advance(15.0)

    schedule = run(scenario)

    assert at == [1010.0] * 3
    assert schedule.counters["tick"].repeats == 2
    assert schedule.errors == 0


def test_each_call_runs_inside_the_scope_of_its_group() -> None:
    scopes = Scopes()
    open_inside: list[int] = []

    async def scenario(time: FakeTime, schedule: Schedule) -> None:
        schedule.start([timer(lambda: open_inside.append(scopes.open), 1.0, scopes)])
        await time.advance(2.5)

    run(scenario)

    assert open_inside == [1, 1]
    assert scopes.names == ["timer tick"] * 2


def test_functions_take_the_app_or_nothing() -> None:
    got: list[Any] = []

    async def with_app(app: Any) -> None:
        got.append(app)

    async def without() -> None:
        got.append("none")

    async def scenario(time: FakeTime, schedule: Schedule) -> None:
        schedule.start(
            [
                Job("a", "task", with_app, Scopes()),
                Job("b", "task", without, Scopes()),
            ]
        )
        await time.advance(0.0)

    run(scenario, app="the app")

    assert got == ["the app", "none"]


def test_parameter_with_a_default_is_left_alone() -> None:
    assert not takes_app(lambda step=1: step)
    assert not takes_app(lambda *args, **kwargs: args)
    assert takes_app(lambda app: app)


def test_task_that_returns_is_not_started_again() -> None:
    calls: list[int] = []

    async def scenario(time: FakeTime, schedule: Schedule) -> None:
        schedule.start([Job("once", "task", lambda: calls.append(1), Scopes())])
        await time.advance(100.0)

    run(scenario)

    assert calls == [1]


def test_task_that_raises_starts_again_after_growing_delays(
    caplog: pytest.LogCaptureFixture,
) -> None:
    at: list[float] = []

    async def scenario(time: FakeTime, schedule: Schedule) -> None:
        def fails() -> None:
            at.append(time.now - 1000.0)
            raise ValueError

        schedule.start([Job("bad", "task", fails, Scopes())])
        await time.advance(4.0)

    caplog.set_level(logging.CRITICAL)
    run(scenario)

    assert at == [0.0, 0.25, 0.75, 1.75, 3.75]


def test_cron_job_is_called_at_the_moments_of_the_wall_clock() -> None:
    at: list[float] = []

    async def scenario(time: FakeTime, schedule: Schedule) -> None:
        job = Job(
            "cron", "crontab", lambda: at.append(time.now + time.wall_offset), Scopes(),
            cron=Cron("* * * * *"),
        )  # fmt: skip
        schedule.start([job])
        await time.advance(150.0)

    run(scenario)

    assert [moment % 60.0 for moment in at] == [0.0] * len(at)
    assert len(at) in (2, 3)


def test_cron_job_notices_within_a_second_that_the_wall_clock_was_set_forward() -> None:
    at: list[float] = []

    async def scenario(time: FakeTime, schedule: Schedule) -> None:
        time.wall_offset = -time.now
        job = Job(
            "cron", "crontab", lambda: at.append(time.now), Scopes(), cron=Cron("0 * * * *")
        )
        schedule.start([job])
        await time.advance(10.0)
        time.wall_offset += 3595.0
        await time.advance(1.0)

    run(scenario)

    assert len(at) == 1
    assert at[0] <= 1011.0


def test_stop_ends_tasks_and_sleeping_timers_and_waits_for_the_call_that_runs() -> None:
    events: list[str] = []

    async def scenario(time: FakeTime, schedule: Schedule) -> None:
        async def runs_forever() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                events.append("task cancelled")

        async def slow() -> None:
            events.append("call began")
            await time.sleep(5.0)
            events.append("call ended")

        schedule.start(
            [
                Job("forever", "task", runs_forever, Scopes()),
                timer(slow, 10.0),
                Job(
                    "sleeper",
                    "timer",
                    lambda: events.append("never"),
                    Scopes(),
                    interval_s=50.0,
                ),
            ]
        )
        await time.advance(12.0)
        assert schedule.busy_with == ["timer tick"]
        stopping = asyncio.create_task(schedule.stop())
        await settle()
        assert not stopping.done()
        await time.advance(100.0)
        await stopping

    run(scenario)

    assert events == ["call began", "task cancelled", "call ended"]


@given(
    st.floats(0.001, 1e5),
    st.floats(0.0, 1e6),
    st.lists(st.floats(0.0, 1e6), min_size=1, max_size=20),
)
def test_timers_next_moment_is_after_now_and_at_most_one_interval_away(
    interval_s: float, started_at: float, passed: list[float]
) -> None:
    every = Every(interval_s, started_at)

    for seconds in passed:
        now = started_at + seconds
        due = every.next_after(now)

        assert due > now
        assert due - now <= interval_s * (1 + 1e-6) + 1e-6


def test_backoff_doubles_up_to_a_minute() -> None:
    delays = [backoff_s(failures, lambda: 1.0) for failures in range(1, 100)]

    assert delays[:4] == [0.25, 0.5, 1.0, 2.0]
    assert max(delays) == delays[-1] == MAX_BACKOFF_S
