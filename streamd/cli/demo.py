"""`demo`: the word count that ships with streamd."""

import importlib

import click

from streamd.cli.options import given
from streamd.cli.root import Command


def demo(once: bool, kafka: bool, port: int | None, rate: int) -> int:
    """Run the built-in word count, on the embedded log or on Kafka.

    Counts the words of an English text that every Python has, and serves the stats page.
    Writes only to a temporary folder. Ctrl-C ends it.
    """
    shipped = importlib.import_module("streamd.demo")
    code = shipped.run(given(), once=once, kafka=kafka, port=port, rate=rate)
    return code if isinstance(code, int) else 0


demo_command = Command(
    "demo",
    callback=demo,
    help=demo.__doc__,
    params=[
        click.Option(
            ["--once"], is_flag=True, help="Count the text once, check the result, and exit."
        ),
        click.Option(
            ["--kafka"],
            is_flag=True,
            help="On the Kafka that --broker names; without one on a Kafka that it starts.",
        ),
        click.Option(
            ["-p", "--web-port", "port"],
            type=click.IntRange(0, 65535),
            metavar="PORT",
            help="Port of the stats page; 0 picks a free one. [default: 6066]",
        ),
        click.Option(
            ["--rate"],
            type=click.IntRange(1),
            default=200,
            show_default=True,
            metavar="POSTS",
            help="Posts to read each second; a post has 25 words.",
        ),
    ],
)
