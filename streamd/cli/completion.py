"""`completion` and `help`: what the command line says about itself."""

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from streamd.cli.root import Command, root
from streamd.errors import UsageError

SHELLS = ("bash", "zsh", "fish")


def completion(shell: str | None) -> None:
    """Print a completion script.

    For bash: eval "$(streamd completion bash)", in ~/.bashrc.
    """
    shell = shell or Path(os.environ.get("SHELL", "bash")).name
    found = get_completion_class(shell) if shell in SHELLS else None
    if found is None:
        raise UsageError(f"no completion for {shell!r}: expected {', '.join(SHELLS)}")
    click.echo(found(root, {}, "streamd", "_STREAMD_COMPLETE").source())


completion_command = Command(
    "completion",
    callback=completion,
    help=completion.__doc__,
    params=[
        click.Argument(
            ["shell"],
            required=False,
            type=click.Choice(SHELLS),
            help="Default: your login shell.",
        )
    ],
)


def show_help(words: tuple[str, ...]) -> None:
    """Show a command's help."""
    context = click.get_current_context().find_root()
    if not words:
        click.echo(context.get_help())
        return
    name, command, _ = root.resolve_command(context, list(words))
    assert command is not None
    with command.make_context(name, ["--help"], parent=context):
        raise AssertionError("--help ends the context")


help_command = Command(
    "help",
    callback=show_help,
    help=show_help.__doc__,
    hidden=True,
    params=[click.Argument(["words"], nargs=-1, metavar="[COMMAND]")],
)
