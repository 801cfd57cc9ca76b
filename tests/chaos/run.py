"""`scripts/chaos`: random attacks under load, replayable by seed."""

import random

import chaos_kills
import click


@click.group()
def main() -> None:
    """Attack a running instance, and say whether it stayed exact."""


@main.command()
@click.option("--kills", default=100, show_default=True, help="Attacks in all.")
@click.option("--seed", type=int, help="Repeat the run of this seed.  [default: by chance]")
def kills(kills: int, seed: int | None) -> None:
    """Kill, stop and end processes of an instance under load, at random."""
    chosen = random.randrange(1_000_000) if seed is None else seed
    click.echo(f"seed {chosen}", err=True)
    report = chaos_kills.run(kills, chosen)
    click.echo(str(report))
    for line in report.complaints:
        click.echo(f"  {line}")
    raise SystemExit(bool(report.problems))


if __name__ == "__main__":
    main()
