"""The long forms of the supervision cases: what CI tries a few times is tried many times.

Each trial has random numbers of its own, made from the seed, its case and its number, so any
one of them can be repeated alone. `tests/README.md` lists the cases.
"""

import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import chaos_kills
import click
from supervisor_exits import crash_cycles
from supervisor_flood import flood
from test_agentproc_beats import read_while_written
from test_supervisor_adopted import leave_daemons
from test_supervisor_killed import leave_none_of
from test_supervisor_restarts import kill_again_and_again, stop_the_master
from test_supervisor_runaway import end_runaway
from test_supervisor_scale import scale_up_and_down
from test_supervisor_signals import test_a_hundred_idle_processes_stop_soon
from test_supervisor_stacks import dump_all
from test_supervisor_stops import command_at_random, quit_or_int_at_random, term_at_random

TELL_S = 10.0  # between two lines about one case, where there is no terminal


@dataclass(frozen=True)
class Case:
    """What is tried, and how often in full."""

    number: str  # as in tests/README.md
    what: str
    times: int
    attempt: Callable[[random.Random], None]


def _soak(chance: random.Random) -> None:
    report = chaos_kills.run(chance.randrange(60, 90), chance.randrange(1_000_000))
    assert not report.complaints, "\n".join([str(report), *report.complaints])


def _read_beats(_: random.Random) -> None:
    page = os.memfd_create("page")
    try:
        read_while_written(page, 100_000_000)
    finally:
        os.close(page)


def _crash(_: random.Random) -> None:
    assert crash_cycles(1_000) == []


def _flood(_: random.Random) -> None:
    done = flood(10, 100_000, pause_s=0.02)
    assert not done.problems, str(done)


CASES = [
    Case("1", "one process is killed 50 times", 1, lambda _: kill_again_and_again(50)),
    Case("3", "1,000 deaths leave nothing", 1, _crash),
    Case("18", "the master of 50 is killed", 20, lambda _: leave_none_of(50, "master")),
    Case("19", "the guardian of 50 is killed", 20, lambda _: leave_none_of(50, "guardian")),
    Case("23", "1,000 daemons end", 1, lambda _: leave_daemons(1_000)),
    Case("24", "what forks each millisecond is ended", 20, lambda _: end_runaway()),
    Case("33", "100 idle stop", 5, lambda _: test_a_hundred_idle_processes_stop_soon()),
    Case("42", "TERM at a random moment", 400, term_at_random),
    Case("42b", "QUIT and INT at random moments", 50, quit_or_int_at_random),
    Case("42c", "TERM to the command at a random moment", 50, command_at_random),
    Case("55", "the master is stopped for a minute", 1, lambda _: stop_the_master(60.0)),
    Case("56", "100 million beats are read", 1, _read_beats),
    Case("59", "stacks of 100, three of them stuck", 3, lambda _: dump_all(100)),
    Case("78", "1 to 20 and back, 50 times", 1, lambda _: scale_up_and_down(50)),
    Case("82", "10 agents say 100,000 lines each", 1, _flood),
    Case("86", "a soak of random attacks", 2, _soak),
]


@dataclass
class Outcome:
    """How one case went."""

    case: Case
    tried: int = 0
    took_s: float = 0.0
    failed: list[int] = field(default_factory=list)
    left_out: bool = False  # not all trials were begun

    def __str__(self) -> str:
        verdict = f"{len(self.failed)} FAILED" if self.failed else "well"
        if not self.tried:
            verdict = "not tried"
        head = f"{self.case.number:>4}  {self.case.what:<40}"
        return f"{head} {self.tried:>4} of {self.case.times:<4} {self.took_s:6.1f} s  {verdict}"


class Teller:
    """Says how far a case is: on a terminal in place, else now and then."""

    def __init__(self) -> None:
        self._told_at = time.monotonic()

    def tell(self, outcome: Outcome) -> None:
        """Tell how far a case is."""
        if sys.stdout.isatty():
            click.echo(f"\r{outcome}", nl=False)
        elif time.monotonic() - self._told_at > TELL_S:
            self._told_at = time.monotonic()
            click.echo(str(outcome))

    def tell_end(self, outcome: Outcome) -> None:
        """Tell of a case that is done."""
        self._told_at = time.monotonic()
        click.echo(f"\r{outcome}" if sys.stdout.isatty() else str(outcome))


def run(
    seed: int,
    *,
    only: str = "",
    nth: int | None = None,
    share: float = 1.0,
    minutes: float = 0.0,
) -> bool:
    """Try all cases, one after the other; True when all that was tried went well.

    Args:
        only: The number of one case.
        nth: One trial of it.
        share: How much of the full form is done.
        minutes: When no further trial is begun; what was left out is told. 0: no limit.

    Raises:
        ValueError: There is no such case.
    """
    chosen = [case for case in CASES if not only or case.number == only]
    if not chosen:
        raise ValueError(f"no case {only!r}: {', '.join(case.number for case in CASES)}")
    click.echo(f"seed {seed}")
    began, teller, outcomes = time.monotonic(), Teller(), []
    for case in chosen:
        outcome = Outcome(case)
        outcomes.append(outcome)
        numbers = range(max(1, round(case.times * share))) if nth is None else [nth]
        for number in numbers:
            if minutes and time.monotonic() - began > 60.0 * minutes:
                outcome.left_out = True
                break
            teller.tell(outcome)
            _attempt(outcome, number, seed)
        teller.tell_end(outcome)
    failed = sum(len(outcome.failed) for outcome in outcomes)
    tried = sum(outcome.tried for outcome in outcomes)
    click.echo(
        f"seed {seed}: {tried} trials of {len(outcomes)} cases in "
        f"{time.monotonic() - began:.0f} s: " + (f"{failed} FAILED" if failed else "all well")
    )
    if left_out := [outcome.case.number for outcome in outcomes if outcome.left_out]:
        click.echo(f"not done to the end, the time was over: {', '.join(left_out)}")
    for outcome in outcomes:
        for number in outcome.failed:
            again = f"--seed {seed} --only {outcome.case.number} --nth {number}"
            click.echo(f"again: scripts/chaos supervision {again}")
    return not failed


def _attempt(outcome: Outcome, number: int, seed: int) -> None:
    """One trial; what it raises is told and counted."""
    began = time.monotonic()
    outcome.tried += 1
    try:
        outcome.case.attempt(random.Random(f"{seed} {outcome.case.number} {number}"))
    except Exception:
        outcome.failed.append(number)
        click.echo(f"\ncase {outcome.case.number}, trial {number} failed:")
        click.echo(traceback.format_exc())
    outcome.took_s += time.monotonic() - began
