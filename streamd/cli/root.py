"""`streamd` itself: the commands by name, each in a module that is imported when it is used,
and the one place where errors become text and exit codes.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

import streamd
from streamd.cli import options, output
from streamd.errors import StreamdError

if TYPE_CHECKING:
    from streamd.app import App

# Heading -> command -> (module, help). The help stands here too, so that `streamd --help`
# imports none of them; a test compares the two.
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Run": {
        "worker": ("launch", "Run everything in one process, in the foreground."),
        "start": ("launch", "Start the daemon: a process for each group, and the stats page."),
        "demo": ("demo", "Run the built-in word count, on the embedded log or on Kafka."),
    },
    "Control": {
        "stop": ("control", "Stop: finish what runs, checkpoint, exit."),
        "restart": ("control", "Restart processes, one at a time."),
        "reload": (
            "control",
            "Run new code: import it beside the old, then exchange process by process.",
        ),
        "scale": ("control", "Set how many processes a group has."),
        "kill": ("kill", "End everything now; what was not committed is done again."),
    },
    "Look": {
        "status": ("look", "Show health at a glance; exits 3 when not running."),
        "ps": (
            "look",
            "Show the tree of processes with CPU, private memory, restarts and partitions.",
        ),
        "lag": ("lag", "Show how far behind each agent is, by topic and partition."),
        "top": ("top", "Watch the processes and agents, those that use most first."),
        "logs": ("look", "Show or follow log lines."),
        "events": (
            "happened",
            "Show what happened: starts, restarts with the reason, hangs, scales, reloads.",
        ),
        "history": (
            "happened",
            "Show how processes started and ended and what happened, also where nothing runs.",
        ),
        "stacks": ("look", "Show what each process does now: stacks of tasks and threads."),
        "web": ("look", "Print the address of the stats page."),
    },
    "App": {
        "agents": ("describe", "List agents: topics, group, rate."),
        "topics": ("describe", "List topics: partitions, types, retention."),
        "tables": ("describe", "List tables: group, keys, partitions."),
        "table": ("data", "Look up a key of a table, or list keys."),
        "models": ("describe", "List record types and their fields."),
        "cron": ("describe", "List tasks, timers and crontabs with their next runs."),
        "send": ("data", "Send a message to an agent or topic."),
        "consume": ("data", "Print messages of a topic as they come."),
    },
    "State": {
        "reset": ("reset", "Delete tables and offsets; they are rebuilt from the log."),
    },
    "Set up": {
        "check": ("check", "Check app, settings, groups, broker and web."),
        "config": ("describe", "Show every setting, its value, and where it came from."),
        "unit": ("unit", "Print a systemd unit that runs the app."),
        "completion": ("completion", "Print a completion script."),
    },
}
HIDDEN = {
    "help": ("completion", "Show a command's help."),
    "failpoints": ("failpoints", "List the failpoints that tests can set."),
}
BUILT_IN = {
    name: module
    for commands in (*COMMANDS.values(), HIDDEN)
    for name, (module, _) in commands.items()
}

HELP = """Run stream processors and keep them running.

\b
streamd demo                        try it: no broker, no set-up
streamd -A proj worker -l info      everything in one process, in the foreground
streamd start -A proj               daemon: a process for each group, stats page
"""
EPILOG = (
    'Options above work before or after the command: "streamd -A proj worker" is "streamd '
    'worker -A proj". Every setting is an option too: see "streamd config". Exit codes: '
    "0 done, 1 failed, 2 wrong usage, 3 not running, 4 not permitted, 69 broker unreachable, "
    "70 bug in streamd, 75 busy, 78 bad settings or app, 124 timed out, 130 Ctrl-C."
)


class Command(click.Command):
    """A command that also takes the root's options, and settings as options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options.add_root_options(self)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options.add_setting_options(self, args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        given = options.given(ctx)
        given.enter_workdir()
        ctx.color = ctx.find_root().color = options.color_wanted(given.color)
        return super().invoke(ctx)


class Root(click.Group):
    """The group whose commands are imported when they are asked for, the app's own last."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options.add_setting_options(self, args)
        ctx.color = options.color_wanted("auto")
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*BUILT_IN, *self._own_commands(ctx)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if module := BUILT_IN.get(name):
            loaded = importlib.import_module(f"streamd.cli.{module}")
            command = getattr(loaded, f"{name}_command")
            assert isinstance(command, click.Command)
            return command
        return self._own_commands(ctx).get(name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        # The rest may hold the -A of an own command: `streamd produce -A proj`.
        if name not in BUILT_IN and not name.startswith("-"):
            options.given(ctx).app = options.given(ctx).app or _app_among(args[1:])
        try:
            command = self.get_command(ctx, name)
            names = self.list_commands(ctx) if command is None else []
        except StreamdError:
            # A slip in a built-in name is no reason to tell of an app that cannot be imported.
            command, names = None, list(BUILT_IN)
            if not difflib.get_close_matches(name, names):
                raise
        if command is None:
            meant = difflib.get_close_matches(name, names)
            raise click.exceptions.NoSuchCommand(name, possibilities=meant, ctx=ctx)
        return name, command, args[1:]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, commands in COMMANDS.items():
            with formatter.section(heading):
                formatter.write_dl([(name, help) for name, (_, help) in commands.items()])
        try:
            own = self._own_commands(ctx)
        except StreamdError as error:
            with formatter.section("Not shown"):
                formatter.write_text(f"the app's own commands: {error}")
            return
        if own:
            with formatter.section(f"From {options.given(ctx).app}"):
                formatter.write_dl(
                    [(name, command.get_short_help_str(80)) for name, command in own.items()]
                )

    def _own_commands(self, ctx: click.Context) -> dict[str, click.Command]:
        """The app's commands; none, and no import, where no app is named."""
        given = options.given(ctx)
        given.enter_workdir()
        if given.app_object is None and not (given.app or os.environ.get("STREAMD_APP")):
            return {}
        own = importlib.import_module("streamd.cli.own")
        found = own.own_commands(given)
        assert isinstance(found, dict)
        return found


def _app_among(args: Sequence[str]) -> str | None:
    for index, arg in enumerate(args):
        if arg in ("-A", "--app") and index + 1 < len(args):
            return args[index + 1]
        if arg.startswith("--app="):
            return arg.removeprefix("--app=")
    return None


def _show_version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    python = ".".join(map(str, sys.version_info[:3]))
    click.echo(f"streamd {streamd.__version__}, Python {python}")
    context.exit()


root = Root(
    "streamd",
    help=HELP,
    epilog=EPILOG,
    params=[
        *options.root_options(hidden=False),
        click.Option(
            ["-V", "--version"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=_show_version,
            help="Show versions of streamd and Python.",
        ),
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96},
)


def main(args: Sequence[str] | None = None, app: "App | None" = None) -> None:
    """Run the command line and exit with its code.

    Args:
        args: The words after the program's name; None: the process's own.
        app: Of `app.main()`: the app that -A names by default, imported already.
    """
    given = options.Given(app_object=app)
    if app is not None:
        from streamd.finder import is_importing, reference_to  # noqa: PLC0415 - not for `streamd`

        if is_importing():
            # `app.main()` at the end of a module that the command line, or the zygote, imports.
            return
        given.app = reference_to(app)
    sys.exit(run(sys.argv[1:] if args is None else list(args), given))


def run(args: list[str], given: options.Given | None = None) -> int:
    """Run the command line and return its exit code; errors are printed."""
    given = given or options.Given()
    program = _program() if given.app_object else "streamd"
    try:
        result = root.main(args, prog_name=program, standalone_mode=False, obj=given)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.UsageError as error:
        output.say_error(_explained(error), color=options.color_wanted(given.color))
        return 2
    except click.ClickException as error:
        output.say_error(StreamdError(error.format_message()))
        return error.exit_code
    except click.Abort:
        click.echo(err=True)
        return 130
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader left, e.g. `streamd logs | head`: the interpreter must not flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except StreamdError as error:
        output.say_error(error, color=options.color_wanted(given.color), debug=given.debug)
        return error.exit_code
    except Exception as error:
        output.say_bug(error, debug=given.debug)
        return 70


def _program() -> str:
    """How the script that called `app.main()` was started."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return os.path.basename(sys.argv[0])


def _explained(error: click.UsageError) -> StreamdError:
    path = error.ctx.command_path if error.ctx is not None else "streamd"
    text = error.format_message().strip()
    return StreamdError(text[:1].lower() + text[1:].rstrip("."), remedy=f"{path} --help")
