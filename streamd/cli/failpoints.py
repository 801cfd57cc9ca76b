"""`failpoints`: the places where a test may stop or kill a process of streamd."""

from streamd.cli import output
from streamd.cli.options import given
from streamd.cli.root import Command
from streamd.failpoints import FAILPOINTS


def failpoints() -> None:
    """List the failpoints that tests can set.

    STREAMD_FAILPOINT=name:nth:action, obeyed only with STREAMD_TEST=1.
    """
    if given().json:
        output.say_json({"schema": "streamd.failpoints/1", "failpoints": FAILPOINTS})
    else:
        output.say(output.columns(list(FAILPOINTS.items()), ["name", "where"]))


failpoints_command = Command(
    "failpoints", callback=failpoints, help=failpoints.__doc__, hidden=True
)
