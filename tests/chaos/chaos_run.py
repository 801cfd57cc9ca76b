"""The command line of `scripts/chaos`."""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import chaos_kafka_outages
import chaos_supervision
import click
import kafka_broker
import supervisor_flood
from chaos_kafka_kills import run_on_kafka
from chaos_kills import run
from chaos_oracle import drain, problems
from chaos_tree import Load, eventually, instance

from streamd.failpoints import FAILPOINTS

WHAT = [
    "kills", "failpoints", "kafka", "kafka-outage", "kafka-rolling", "kafka-disk", "logs",
    "supervision",
]  # fmt: skip


def kills(attacks: int, seed: int) -> list[str]:
    """One run of random attacks; what is wrong in the end."""
    click.echo(f"seed {seed}: {attacks} attacks begin")
    report = run(attacks, seed)
    click.echo("\n".join([str(report), *report.complaints]))
    return report.problems


def failpoint(name: str, nth: int, action: str, seed: int) -> list[str]:
    """One failpoint alone, armed in a tree under load; what is wrong in the end."""
    part = f"{name}:{nth}:{action}"
    with instance() as made:
        if made.start(STREAMD_TEST="1", STREAMD_FAILPOINT=part):
            # A log that ends before it was ready ends the start.
            made.assert_nothing_left()
            made.start()
        with Load(made, seed, pause_s=0.04) as load:
            load.spoil("once")
            if name != "checkpoint.before-truncate":
                eventually(lambda: made.fired(name), part, 20.0)
            batches = load.batches
            eventually(lambda: load.batches > batches + 5, f"{part}: events flow", 20.0)
        drain(made)
        made.stop()
        return problems(made, load.acked)


def failpoints(only: str, seed: int) -> list[str]:
    """Every failpoint outside of the master, at its first passes, with every action."""
    found = []
    for name in FAILPOINTS:
        if name.startswith("master.") or only not in name:
            continue
        for nth in (1,) if name.startswith(("open", "load", "engine", "zygote")) else (1, 2, 3):
            for action in ("kill", "exit"):
                began_at = time.monotonic()
                wrong = failpoint(name, nth, action, seed)
                took_s = time.monotonic() - began_at
                verdict = "; ".join(wrong) or "exact"
                click.echo(f"{name}:{nth}:{action} {took_s:.1f} s: {verdict}")
                found += wrong
    return found


def logs(megabytes: int) -> list[str]:
    """Floods of log lines from ten agents, of records and of prints; what is wrong."""
    found = []
    for prints in (False, True):
        lines = megabytes * 1_000_000 // supervisor_flood.LINE_BYTES // 10
        done = supervisor_flood.flood(10, lines, prints=prints)
        click.echo(f"{'prints' if prints else 'records'}: {done}")
        found += done.problems
    return found


def kafka(attacks: int, seed: int, guarantee: str, only: tuple[str, ...]) -> list[str]:
    """One run of random attacks on an app on a broker of its own; what is wrong in the end."""
    click.echo(f"seed {seed}: {attacks} attacks on Kafka begin, {guarantee}")
    with tempfile.TemporaryDirectory(prefix="sk-") as folder:
        cluster = kafka_broker.start(Path(folder) / "kafka", parent=os.getpid())
        try:
            report = run_on_kafka(
                cluster, attacks, seed, guarantee, only=only, progress=click.echo
            )
        finally:
            cluster.kill()
    click.echo("\n".join([str(report), *report.complaints]))
    return report.problems


def trouble(what: str, minutes: float, rounds: int) -> list[str]:
    """Long trouble with a cluster; what is wrong in the end."""
    began_at = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"{time.monotonic() - began_at:4.0f} s: {text}")

    if what == "kafka-outage":
        wrong = chaos_kafka_outages.outage(minutes or 10, say)
    elif what == "kafka-rolling":
        wrong = chaos_kafka_outages.rolling(rounds, say)
    else:
        wrong = chaos_kafka_outages.full_disk(say)
    say("; ".join(wrong) or "exact, and no process was restarted")
    return wrong


def main() -> int:
    """Run what the arguments say; 1 when anything was not exact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--megabytes", type=int, default=1000, help="of log lines")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument(
        "--only",
        default="",
        help="part of a failpoint's name; a case; of kafka: attacks, with commas",
    )
    parser.add_argument(
        "--guarantee", default="at_least_once", choices=["at_least_once", "exactly_once"]
    )
    parser.add_argument("--nth", type=int, help="one trial of a case")
    parser.add_argument(
        "--minutes",
        type=float,
        default=0.0,
        help="when to begin no more; how long an outage lasts",
    )
    parser.add_argument("--share", type=float, default=1.0, help="of the trials of each case")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    given = parser.parse_args()
    if given.what == "supervision":
        # What a trial has started is ended with it, also by TERM.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        well = chaos_supervision.run(
            given.seed,
            only=given.only,
            nth=given.nth,
            share=given.share,
            minutes=given.minutes,
        )
        return int(not well)
    if given.what == "logs":
        return int(bool(logs(given.megabytes)))
    if given.what == "failpoints":
        return int(bool(failpoints(given.only, given.seed)))
    if given.what.startswith("kafka-"):
        return int(bool(trouble(given.what, given.minutes, given.runs)))
    if given.what == "kafka":
        only = tuple(filter(None, given.only.split(",")))
        seeds = range(given.seed, given.seed + given.runs)
        return int(any([kafka(given.kills, seed, given.guarantee, only) for seed in seeds]))
    return int(any([kills(given.kills, given.seed + n) for n in range(given.runs)]))


if __name__ == "__main__":
    sys.exit(main())
