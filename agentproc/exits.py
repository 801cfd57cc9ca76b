"""`sys.exit` in the user's code: an agent, a task, a timer or a cron job ends its process.

It is taken where that code is called, and not where the loop would: the loop would stop in the
middle of everything. A process that a task ends stops warm, so what the task did is kept; an
agent's event that ends it is not settled.
"""

import sys


class ExitAsked(Exception):
    """The user's code called `sys.exit`; the text says who."""

    def __init__(self, who: str, asked: SystemExit) -> None:
        self.code = exit_code_of(asked)
        super().__init__(f"{who} ended its process with exit code {self.code}")


def exit_code_of(asked: SystemExit) -> int:
    """The exit code that Python itself would end with; a text is printed, as it would be.

    >>> exit_code_of(SystemExit()), exit_code_of(SystemExit(3)), exit_code_of(SystemExit(256))
    (0, 3, 0)
    """
    if asked.code is None:
        return 0
    if isinstance(asked.code, int):
        return asked.code & 0xFF
    sys.stderr.write(f"{asked.code}\n")
    return 1
