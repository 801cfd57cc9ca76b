"""The app's own commands, as commands of click, and what they get as `self`."""

import asyncio
import inspect
import json
import signal
from collections.abc import Sequence
from typing import Any

import click

from streamd.app import App
from streamd.cli import output
from streamd.cli.imported import import_app
from streamd.cli.options import Given, given
from streamd.cli.root import Command
from streamd.commands import AppCommand
from streamd.errors import StreamdError
from streamd.log import user_traceback

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class CommandFailed(StreamdError):
    """One of the app's own commands raised an error."""

    def __init__(self, name: str, error: BaseException) -> None:
        super().__init__(f"command {name!r} failed: {type(error).__name__}: {error}")
        self.user_traceback = user_traceback(error)


class Running:
    """`self` of a command: the app, and ways to write."""

    def __init__(self, app: App, context: click.Context) -> None:
        self.app = app
        self.ctx = context

    @property
    def debug(self) -> bool:
        """Whether --debug was given."""
        return given(self.ctx).debug

    def say(self, message: object = "", **options: Any) -> None:
        """Write a line to stdout, unless --quiet; options are those of `click.echo`."""
        if not given(self.ctx).quiet:
            click.echo(message, **options)

    def carp(self, message: object, **options: Any) -> None:
        """Write a line to stderr, if --debug."""
        if self.debug:
            click.echo(f"#-- {message}", err=True, **options)

    def table(
        self, rows: Sequence[Sequence[object]], headers: Sequence[str] = (), title: str = ""
    ) -> None:
        """Write rows as columns, or with --json as one list of objects or lists."""
        if given(self.ctx).json:
            output.say_json([dict(zip(headers, row, strict=True)) for row in rows]
                            if headers else [list(row) for row in rows])  # fmt: skip
            return
        if title:
            click.echo(title)
        click.echo(self.tabulate(rows, headers))

    def tabulate(self, rows: Sequence[Sequence[object]], headers: Sequence[str] = ()) -> str:
        """Rows as the text of columns."""
        return output.columns(rows, headers)

    def dumps(self, value: Any) -> str:
        """A value as JSON text."""
        return json.dumps(value, ensure_ascii=False, default=str)

    def color(self, name: str, text: str) -> str:
        """`text` in a colour: red, green, yellow, blue …"""
        return click.style(text, fg=name)

    def bold(self, text: str) -> str:
        """`text` in bold."""
        return click.style(text, bold=True)

    def dark(self, text: str) -> str:
        """`text`, less bright."""
        return click.style(text, dim=True)


def own_commands(options: Given) -> dict[str, click.Command]:
    """The commands of the app that is meant, by name. Imports it.

    Raises:
        StreamdError: It cannot be imported.
    """
    app, _ = import_app(options, as_running=True)
    return {name: as_click(command) for name, command in app.commands.items()}


def as_click(command: AppCommand) -> click.Command:
    """The command with its options and arguments, as click runs it."""

    def callback(**values: Any) -> int:
        me = Running(command.app, click.get_current_context())
        return asyncio.run(run(command, me, values))

    for option in reversed(command.options):
        option(callback)
    params: list[click.Parameter] = getattr(callback, "__click_params__", [])
    return Command(
        command.name,
        callback=callback,
        params=list(reversed(params)),
        help=command.__doc__,
    )


async def run(command: AppCommand, me: Running, values: dict[str, Any]) -> int:
    """Run a command with the app as a client; its exit code.

    What it sent is durable when this returns, also when it was stopped by a signal.

    Raises:
        CommandFailed: It raised something that is no StreamdError.
    """
    task = asyncio.current_task()
    assert task is not None
    received: list[int] = []
    stopped = asyncio.Event()

    def stop(number: int) -> None:
        received.append(number)
        stopped.set()
        work.cancel()

    async with command.app.client():
        work = asyncio.ensure_future(_call(command, me, values))
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, stop, number)
        try:
            result = await work
            if command.daemon:
                await stopped.wait()
        except asyncio.CancelledError:
            if not received:
                raise
            result = None
        finally:
            for number in STOP_SIGNALS:
                loop.remove_signal_handler(number)
    if received:
        return 0 if command.daemon else 128 + received[0]
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


async def _call(command: AppCommand, me: Running, values: dict[str, Any]) -> Any:
    try:
        result = command.fun(me, **values)
        return await result if inspect.isawaitable(result) else result
    except (StreamdError, click.ClickException):
        raise
    except Exception as error:
        raise CommandFailed(command.name, error) from error
