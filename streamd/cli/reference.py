"""docs/commands.md, made from the commands themselves: `python -m streamd.cli.reference`."""

import importlib
from collections.abc import Iterator

import click

from streamd.cli.options import Given
from streamd.cli.root import COMMANDS, root

INTRODUCTION = """# Commands

Made from `streamd/cli/` by `python -m streamd.cli.reference`; a test compares them.

Data goes to stdout, all else to stderr. `--json` gives one document with a `schema`, streams
one object a line; fields are only ever added. Durations are `500ms`, `30s`, `5m`, `2h`; times
`15m` (ago) or ISO.

The app is what `-A` says after the command, before it, `STREAMD_APP`, `app` in the settings
file, or, for commands that control and look, the only instance that runs.

| exit code | means |
|---|---|
| 0 | done; also `start` of what runs and `stop` of what does not |
| 1 | failed; `status`: something is wrong, or not all of it runs yet |
| 2 | wrong usage |
| 3 | not running; `worker`, `start --foreground`: stopped cold |
| 4 | not permitted |
| 69 | broker unreachable |
| 70 | a bug in streamd; a crash file is written |
| 75 | another instance holds the lock |
| 78 | bad settings, or the app cannot be imported |
| 124 | timed out |
| 130 | Ctrl-C |
"""


def commands_page() -> str:
    """The text of docs/commands.md."""
    context = click.Context(
        root,
        info_name="streamd",
        obj=Given(),
        terminal_width=96,
        color=False,
        help_option_names=["-h", "--help"],
    )
    parts = [INTRODUCTION, *_section(context, root)]
    for heading, commands in COMMANDS.items():
        parts.append(f"\n## {heading}\n")
        for name, (module, _) in commands.items():
            command = getattr(
                importlib.import_module(f"streamd.cli.{module}"), f"{name}_command"
            )
            inner = click.Context(
                command, info_name=name, parent=context, terminal_width=96, color=False
            )
            parts += [f"\n### {name}\n", *_section(inner, command)]
    return "\n".join(parts) + "\n"


def _section(context: click.Context, command: click.Command) -> Iterator[str]:
    help = command.get_help(context)
    yield "\n".join(["```", *(line.rstrip() for line in help.splitlines()), "```"])


if __name__ == "__main__":
    click.echo(commands_page(), nl=False)
