"""Restarts, suspects, hangs and orders, with the clock as an argument."""

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.supervisor.policy import (
    BUDGET_CRASHES,
    MAX_DELAY_S,
    Decision,
    Ending,
    Exit,
    HangWatch,
    LateWatch,
    Restarts,
    RestartType,
    Strategy,
    Suspects,
    classify,
    dies_with,
    expand,
    start_order,
    stop_order,
    stop_ranks,
)
from streamd.wire import AgentInfo, GroupInfo

PLACE = ("count", "words", 3, 1042)
OTHER = ("count", "words", 3, 1043)


@pytest.mark.parametrize(
    ("exit", "out_of_memory", "ending"),
    [
        (Exit(0), False, Ending.EARLY),
        (Exit(1), False, Ending.CRASH),
        (Exit(3), False, Ending.CRASH),
        (Exit(69), False, Ending.DEPENDENCY),
        (Exit(70), False, Ending.CRASH),
        (Exit(78), False, Ending.PERMANENT),
        (Exit(None, signal.SIGKILL), False, Ending.OUTSIDE),
        (Exit(None, signal.SIGKILL), True, Ending.OUT_OF_MEMORY),
        (Exit(None, signal.SIGTERM), True, Ending.OUTSIDE),
        (Exit(None, signal.SIGSEGV), True, Ending.CRASH),
        (Exit(None, signal.SIGABRT), False, Ending.CRASH),
        (Exit(None, None), False, Ending.CRASH),
    ],
    ids=str,
)
def test_why_a_process_ended(exit: Exit, out_of_memory: bool, ending: Ending) -> None:
    assert classify(exit, out_of_memory=out_of_memory) is ending


def crash(
    budget: Restarts,
    now: float,
    *,
    uptime_s: float = 0.1,
    settled: int = 0,
    ending: Ending = Ending.CRASH,
    random: float = 0.999,
    type: RestartType = RestartType.PERMANENT,
) -> Decision:
    return budget.decide(
        ending, now=now, uptime_s=uptime_s, settled=settled, random=random, type=type
    )


def test_the_first_restart_is_immediate_and_the_next_ones_back_off() -> None:
    budget = Restarts()

    delays = [crash(budget, 100.0 * number).delay_s for number in range(12)]

    assert delays[0] == 0.0
    assert 0 < delays[1] < delays[2] < delays[3]
    assert delays[-1] == pytest.approx(MAX_DELAY_S, rel=0.01)


def test_five_crashes_in_a_minute_without_progress_are_the_end() -> None:
    budget = Restarts()

    decisions = [crash(budget, float(number)) for number in range(BUDGET_CRASHES)]

    assert [decision.restart for decision in decisions] == [True] * 4 + [False]
    assert decisions[-1].reason == "5 crashes in 4 s without progress"


def test_a_slow_crash_loop_without_progress_is_ended_too() -> None:
    budget = Restarts()

    decisions = [crash(budget, 6.0 * number, uptime_s=5.0) for number in range(BUDGET_CRASHES)]

    assert not decisions[-1].restart


def test_crashes_with_progress_between_them_are_never_the_end() -> None:
    budget = Restarts()

    for number in range(300):
        decision = crash(budget, 5.0 * number, uptime_s=4.0, settled=10)
        assert decision == Decision(True, 0.0, "first restart")


def test_events_done_again_within_a_moment_are_no_progress() -> None:
    budget = Restarts()

    decisions = [crash(budget, float(number), settled=50) for number in range(BUDGET_CRASHES)]

    assert not decisions[-1].restart


def test_a_stable_run_makes_the_next_restart_immediate_again() -> None:
    budget = Restarts()
    crash(budget, 0.0)
    crash(budget, 1.0)

    assert crash(budget, 100.0, uptime_s=11.0).delay_s == 0.0


def test_an_end_from_outside_is_not_counted() -> None:
    budget = Restarts()

    for number in range(50):
        decision = crash(budget, number / 10, ending=Ending.OUTSIDE)
        assert decision.restart and decision.delay_s == 0.0
    assert budget == Restarts()


def test_a_broker_that_is_away_delays_and_is_not_counted() -> None:
    budget = Restarts()

    decisions = [crash(budget, number / 10, ending=Ending.DEPENDENCY) for number in range(50)]

    assert all(decision.restart and decision.delay_s > 0 for decision in decisions)
    assert budget.crashes == []


def test_what_a_restart_would_not_change_is_not_restarted() -> None:
    assert not crash(Restarts(), 0.0, ending=Ending.PERMANENT).restart


def test_a_hang_counts_as_a_crash() -> None:
    budget = Restarts()

    decisions = [crash(budget, float(number), ending=Ending.HANG) for number in range(5)]

    assert not decisions[-1].restart


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 200))
def test_a_delay_is_never_longer_than_a_minute(random: float, attempt: int) -> None:
    budget = Restarts(attempt=attempt)

    decision = crash(budget, 0.0, random=random)

    assert 0.0 <= decision.delay_s <= MAX_DELAY_S


def test_the_third_death_at_one_event_parks_it_and_the_first_is_the_unknown_one() -> None:
    suspects = Suspects()

    assert suspects.on_death(OTHER, careful=False) is None
    assert suspects.on_death(PLACE, careful=True) is None
    parked = suspects.on_death(PLACE, careful=True)

    assert parked is not None and parked.deaths == 3
    assert (parked.agent, parked.topic, parked.partition, parked.position) == PLACE
    assert suspects.parked == [parked]


def test_a_parked_event_takes_its_crashes_with_it_but_not_one_after_the_other_for_ever() -> (
    None
):
    restarts = Restarts()
    restarted = []

    for number in range(15):
        if number % 3 == 2:
            restarts.blame_event()
        decision = restarts.decide(
            Ending.CRASH, now=0.1 * number, uptime_s=0.05, settled=0, random=0.0
        )
        restarted.append(decision.restart)

    # Three events in a row are parked; then five crashes are the end.
    assert restarted.index(False) == 12


def test_a_healthy_event_between_parked_ones_shows_that_they_are_to_blame() -> None:
    restarts = Restarts()

    for number in range(60):
        if number % 3 == 2:
            restarts.blame_event()
        decision = restarts.decide(
            Ending.CRASH, now=0.1 * number, uptime_s=0.05, settled=number % 3, random=0.0
        )

        assert decision.restart


def test_deaths_at_different_events_park_none() -> None:
    suspects = Suspects()
    suspects.on_death(None, careful=False)
    suspects.on_death(PLACE, careful=True)

    assert suspects.on_death(OTHER, careful=True) is None
    assert suspects.on_death(None, careful=True) is None
    assert suspects.parked == []


def test_a_place_of_a_process_that_was_not_careful_is_not_believed() -> None:
    suspects = Suspects()

    for _ in range(10):
        assert suspects.on_death(PLACE, careful=False) is None


def test_a_hang_needs_two_bad_looks_in_a_row() -> None:
    watch = HangWatch(limit_s=1.0)

    assert not watch.is_hung(beat=10.0, now=11.5)
    assert not watch.is_hung(beat=11.4, now=11.6)
    assert not watch.is_hung(beat=11.4, now=12.5)
    assert watch.is_hung(beat=11.4, now=12.7)


def test_a_beat_that_was_judged_counts_for_the_limit_and_no_longer() -> None:
    watch = HangWatch(limit_s=1.0)
    before = watch.is_clear(10.0)
    watch.is_hung(beat=10.0, now=10.2)

    assert not before
    assert watch.is_clear(10.9)
    assert not watch.is_clear(11.0)


def test_a_process_that_has_not_beaten_yet_does_not_hang() -> None:
    watch = HangWatch(limit_s=1.0)

    assert not any(watch.is_hung(beat=0.0, now=float(now)) for now in range(100))


def test_a_late_judge_forgives() -> None:
    watch = HangWatch(limit_s=1.0)
    watch.is_hung(beat=10.0, now=20.0)

    watch.forgive(20.0)

    assert not watch.is_hung(beat=10.0, now=20.9)
    assert not watch.is_hung(beat=10.0, now=21.1)
    assert watch.is_hung(beat=10.0, now=21.2)


def test_a_late_look_and_a_machine_that_slept_are_noticed() -> None:
    late = LateWatch(period_s=1.0)

    assert not late.was_late(100.0, 500.0)
    assert not late.was_late(100.3, 500.3)
    assert late.was_late(103.0, 503.0)
    assert late.was_late(103.3, 603.3)
    assert not late.was_late(103.6, 603.6)


def test_orders() -> None:
    groups = ["split", "count", "report", "app"]

    assert start_order(groups) == ["report", "count", "split", "app"]
    assert stop_order(groups) == ["app", "split", "count", "report"]


def group(name: str, sends: str = "", names: str = "", holds: str = "") -> GroupInfo:
    agent = AgentInfo(name, name, [name], 1, "retry", "", sends.split(), names.split())
    return GroupInfo(name, [agent], holds.split(), 1, "")


def test_groups_that_do_not_need_each_other_are_stopped_together() -> None:
    groups = [
        group("left", sends="count unread"),
        group("right", sends="count"),
        group("count", holds="counts"),
        group("alone"),
        group("app"),
    ]

    assert stop_ranks(groups) == [["app"], ["left", "right", "alone"], ["count"]]


def test_who_reads_a_table_is_stopped_before_who_has_it() -> None:
    groups = [group("count", names="counts", holds="counts"), group("look", names="counts")]

    assert stop_ranks(groups) == [["look"], ["count"]]


def test_of_groups_that_need_each_other_one_is_stopped_after_the_other() -> None:
    groups = [group("ping", sends="pong"), group("pong", sends="ping"), group("last")]

    assert stop_ranks(groups) == [["last"], ["ping"], ["pong"]]


def test_names_mean_processes_and_groups() -> None:
    assert expand(["count", "count#1"], ["count#0", "count#1", "counter#0"]) == (
        ["count#0", "count#1"],
        [],
    )
    assert expand(["x", "web"], ["web"]) == (["web"], ["x"])


@pytest.mark.parametrize("ending", Ending)
def test_restart_types(ending: Ending) -> None:
    decisions = {type: crash(Restarts(), 0.0, ending=ending, type=type) for type in RestartType}

    assert decisions[RestartType.TEMPORARY].done
    assert decisions[RestartType.TRANSIENT].done is (ending is Ending.EARLY)
    assert not decisions[RestartType.PERMANENT].done
    assert decisions[RestartType.PERMANENT].restart is (ending is not Ending.PERMANENT)
    assert not any(decision.done and decision.restart for decision in decisions.values())


def test_what_is_given_up_is_tried_once_more_at_a_time() -> None:
    budget = Restarts()
    for number in range(BUDGET_CRASHES - 1):
        crash(budget, float(number))
    assert crash(budget, 5.0).probe

    for number in range(1, 10):
        budget.probing = True
        decision = crash(budget, 300.0 * number)
        assert (decision.restart, decision.probe) == (False, True)


@pytest.mark.parametrize(("uptime_s", "settled"), [(2.0, 5), (11.0, 0)])
def test_one_more_try_that_does_well_is_an_ordinary_run_again(
    uptime_s: float, settled: int
) -> None:
    budget = Restarts(probing=True)

    decision = crash(budget, 900.0, uptime_s=uptime_s, settled=settled)

    assert decision == Decision(True, 0.0, "first restart")
    assert not budget.probing


def test_a_bad_setting_is_not_tried_again_by_itself() -> None:
    assert not crash(Restarts(), 0.0, ending=Ending.PERMANENT).probe


def test_who_dies_with_whom() -> None:
    groups = ["split", "count", "report", "app"]

    assert dies_with(Strategy.ONE_FOR_ONE, "count", groups) == []
    assert dies_with(Strategy.ONE_FOR_ALL, "count", groups) == start_order(groups)
    assert dies_with(Strategy.REST_FOR_ONE, "report", groups) == ["count", "split", "app"]
    assert dies_with(Strategy.REST_FOR_ONE, "app", groups) == []
    assert dies_with(Strategy.ONE_FOR_ALL, "gone", groups) == []


def a_day(budget: Restarts, run_s: float, settled: int) -> list[float]:
    """The starts of a process that dies after each run of `run_s`, in a day."""
    now, starts = 0.0, [0.0]
    while now < 86_400.0:
        now += run_s
        decision = crash(budget, now, uptime_s=run_s, settled=settled, random=0.5)
        if decision.probe:
            now += 300.0
            budget.probing = True
        elif not decision.restart:
            break
        now += decision.delay_s
        starts.append(now)
    return starts


def test_a_day_of_crashes_every_five_minutes_with_progress_is_never_the_end() -> None:
    starts = a_day(Restarts(), 300.0, settled=1_000)

    assert len(starts) == 289
    assert max(b - a for a, b in zip(starts, starts[1:], strict=False)) == 300.0


def test_a_day_of_a_process_that_always_crashes_has_few_starts() -> None:
    starts = a_day(Restarts(), 0.05, settled=0)

    assert sum(start < 60.0 for start in starts) <= 8
    assert len(starts) <= 5 + 86_400 / 300


def test_a_day_of_crashes_after_five_seconds_without_progress_is_given_up_at_once() -> None:
    starts = a_day(Restarts(), 5.0, settled=0)

    assert sum(start < 120.0 for start in starts) <= 5


def test_the_clock_of_the_wall_has_no_say() -> None:
    # Moments are monotonic numbers of any origin: the decisions are the same.
    def decisions(origin: float) -> list[Decision]:
        budget = Restarts()
        return [crash(budget, origin + 3.0 * number, random=0.5) for number in range(8)]

    assert decisions(0.0) == decisions(1e9) == decisions(-3_600.0)


def test_a_hang_limit_of_zero_is_none() -> None:
    watch = HangWatch(limit_s=0.0)

    assert not any(watch.is_hung(beat=1.0, now=float(now)) for now in range(1, 1_000))
