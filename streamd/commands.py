"""An app's own commands, as they are declared. `streamd/cli/own.py` runs them.

A command is named as its function, with dashes. Its options and arguments are click's
decorators; nothing here needs click, which is imported only where commands run.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from streamd.errors import AppError

BUILT_IN = frozenset({
    "agents", "check", "completion", "config", "consume", "cron", "demo", "events",
    "failpoints", "help", "history", "kill", "lag", "logs", "models", "ps", "reload", "reset",
    "restart", "scale", "send", "stacks", "start", "status", "stop", "table", "tables", "top",
    "topics", "unit", "web", "worker",
})  # fmt: skip
"""The commands of `streamd` itself, which an app's own cannot replace."""


class AppCommand:
    """What `@app.command(...)` makes of a function.

    Args:
        options: Decorators of click's: `option(...)` and `argument(...)`.
        daemon: The command goes on until INT or TERM, also after its function returned.

    Raises:
        AppError: The name is a built-in command's, or the function cannot be a command.
    """

    def __init__(
        self,
        app: Any,
        fun: Callable[..., Any],
        options: Sequence[Callable[[Any], Any]],
        *,
        daemon: bool = False,
        name: str | None = None,
    ) -> None:
        self.app = app
        self.fun = fun
        self.options = list(options)
        self.daemon = daemon
        self.name = name or fun.__name__.replace("_", "-")
        self.__doc__ = inspect.getdoc(fun)
        if self.name in BUILT_IN:
            raise AppError(
                f"the command {self.name!r} ({fun.__module__}.{fun.__qualname__}) has the name "
                "of one of streamd's own",
                remedy=f"rename the function, e.g. to {fun.__name__}_{app.given_id}",
            )
        if not inspect.signature(fun).parameters:
            raise AppError(
                f"the command {self.name!r} takes no argument, expected `self` as the first",
                remedy=f"async def {fun.__name__}(self): ...",
            )
        for option in self.options:
            if not callable(option):
                raise AppError(
                    f"the command {self.name!r} was given {option!r}, expected option(...) or "
                    "argument(...) of streamd.cli or click"
                )

    def __repr__(self) -> str:
        return f"<AppCommand {self.name}>"
