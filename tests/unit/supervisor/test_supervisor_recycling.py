"""When a process that has grown is replaced; and when that does not help."""

import os

from streamd.supervisor.figures import Figures, private_bytes, resident_bytes
from streamd.supervisor.recycling import MIN_AGE_CHECKS, Growth, Verdict

LIMIT = 100
CHECK_S = 15.0
OLD_S = MIN_AGE_CHECKS * CHECK_S


def judge(growth: Growth, size: int, age_s: float = OLD_S) -> Verdict:
    return growth.judge(size, LIMIT, age_s=age_s, check_s=CHECK_S)


def test_two_looks_over_the_limit_in_a_row_are_needed() -> None:
    growth = Growth(1)

    verdicts = [judge(growth, size) for size in (101, 99, 101, 101)]

    assert verdicts == [Verdict.FINE] * 3 + [Verdict.RECYCLE]


def test_a_young_process_is_left_alone() -> None:
    growth = Growth(1)

    verdicts = [judge(growth, 500, age_s=age_s) for age_s in (15.0, 30.0, 45.0)]

    assert verdicts == [Verdict.FINE] * 3


def test_a_new_process_as_large_as_the_old_one_is_told_once_and_left_alone() -> None:
    growth = Growth(1, replaces_grown=True)

    verdicts = [judge(growth, 81, age_s=16.0), *(judge(growth, 500) for _ in range(10))]

    assert verdicts == [Verdict.USELESS] + [Verdict.FINE] * 10


def test_a_new_process_that_is_small_may_grow_and_be_replaced_again() -> None:
    growth = Growth(1, replaces_grown=True)

    verdicts = [judge(growth, size, age_s=OLD_S) for size in (20, 120, 120)]

    assert verdicts == [Verdict.FINE, Verdict.FINE, Verdict.RECYCLE]


def test_looks_are_spread() -> None:
    growth = Growth(1)

    growth.next_look(100.0, CHECK_S, 0.0)
    first = growth.due
    growth.next_look(100.0, CHECK_S, 0.999)

    assert first == 112.0
    assert 117.0 < growth.due < 118.0


def test_private_memory_is_less_than_all_memory_and_none_once_it_is_gone() -> None:
    assert 0 < private_bytes(os.getpid()) <= resident_bytes(os.getpid())
    assert private_bytes(2**22 + 1) == resident_bytes(2**22 + 1) == 0


def test_a_look_that_nobody_asked_for_reads_a_few_processes_by_turns() -> None:
    figures = Figures()
    pids = [os.getpid(), os.getppid()]

    rows = figures.look(pids, fresh=False)

    assert [rows[pid]["pid"] for pid in pids] == pids
    assert rows[os.getpid()]["rss_bytes"] > 0
    assert os.getppid() not in figures.look([os.getpid()], fresh=True)
