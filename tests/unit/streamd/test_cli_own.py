"""How an app's own commands are declared, and how the command line writes."""

import doctest
import importlib

import pytest

from streamd.app import App
from streamd.cli import output
from streamd.errors import AppError


def test_a_command_is_named_as_its_function_with_dashes() -> None:
    app = App("shop")

    async def send_all(self: object) -> None:
        """Send all."""

    app.command()(send_all)

    assert list(app.commands) == ["send-all"]
    assert app.commands["send-all"].__doc__ == "Send all."


def test_the_name_of_a_built_in_command_is_refused_at_definition() -> None:
    app = App("shop")

    async def status(self: object) -> None:
        """Taken."""

    with pytest.raises(AppError, match="'status'.* has the name of one of streamd's own"):
        app.command()(status)


def test_a_command_without_self_is_refused_at_definition() -> None:
    app = App("shop")

    async def produce() -> None:
        """No self."""

    with pytest.raises(AppError, match="takes no argument, expected `self`"):
        app.command()(produce)


def test_two_commands_of_one_name_are_refused() -> None:
    app = App("shop")

    async def produce(self: object) -> None:
        """Twice."""

    app.command()(produce)
    with pytest.raises(AppError, match="two commands are named 'produce'"):
        app.command()(produce)


def test_the_examples_in_the_docstrings_are_true() -> None:
    failed, tried = doctest.testmod(importlib.import_module("streamd.cli.output"))

    assert (failed, tried > 4) == (0, True)


def test_columns_ignore_colours_when_they_are_aligned() -> None:
    text = output.columns([[output.colored("running", "running"), 1], ["x", None]])

    assert text == "\x1b[32mrunning\x1b[0m  1\nx        -"
