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
    Suspects,
    classify,
    expand,
    start_order,
    stop_order,
)

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
) -> Decision:
    return budget.decide(ending, now=now, uptime_s=uptime_s, settled=settled, random=random)


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


def test_names_mean_processes_and_groups() -> None:
    assert expand(["count", "count#1"], ["count#0", "count#1", "counter#0"]) == (
        ["count#0", "count#1"],
        [],
    )
    assert expand(["x", "web"], ["web"]) == (["web"], ["x"])
