"""The options that every command takes, before or after its name, and their values.

They are shown on the root and hidden on commands. What was given ends in one `Given`, whose
later writer wins: an option after the command beats the same one before it.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from streamd.errors import UsageError

if TYPE_CHECKING:
    from streamd.app import App

LOG_LEVELS = ("debug", "info", "warn", "error", "crit")
ALIASES = {"warning": "warn", "critical": "crit", "fatal": "crit"}


@dataclass
class Given:
    """What the options of the root said, wherever they stood; None: not given."""

    app: str | None = None
    name: str | None = None
    config_file: str | None = None
    json: bool = field(default_factory=lambda: bool(os.environ.get("STREAMD_JSON")))
    quiet: bool = False
    color: str = field(default_factory=lambda: os.environ.get("STREAMD_COLOR") or "auto")
    settings: dict[str, str] = field(default_factory=dict)  # setting name -> text
    app_object: "App | None" = None  # of `app.main()`: the app that is imported already

    @property
    def debug(self) -> bool:
        """Whether --debug was given."""
        return self.settings.get("debug") == "true"

    def enter_workdir(self) -> None:
        """Change to --workdir, else STREAMD_WORKDIR; a second call changes nothing."""
        workdir = self.settings.get("workdir") or os.environ.get("STREAMD_WORKDIR")
        if not workdir:
            return
        try:
            os.chdir(workdir)
        except OSError as error:
            raise UsageError(
                f"the workdir {workdir!r} cannot be entered: {error.strerror}"
            ) from error
        self.settings["workdir"] = os.getcwd()


def given(context: click.Context | None = None) -> Given:
    """The options of the command that runs."""
    found = (context or click.get_current_context()).find_root().obj
    assert isinstance(found, Given)
    return found


class Duration(click.ParamType[float]):
    """`500ms`, `30s`, `5m`, `2h`, `1d`, or a plain number of seconds; gives seconds."""

    name = "duration"
    _UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float | int):
            return float(value)
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)", str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no duration: write 500ms, 30s, 5m or 2h", param, ctx)
        return float(match[1]) * self._UNITS[match[2]]


class LogLevel(click.Choice[str]):
    """A level's name; also Python's own words for two of them."""

    def __init__(self) -> None:
        super().__init__(LOG_LEVELS, case_sensitive=False)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        text = str(value).lower()
        return super().convert(ALIASES.get(text, text), param, ctx)


# Where a value comes from that was not given.
UNSET = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)

DURATION = Duration()
LOG_LEVEL = LogLevel()


def _store(attribute: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(context: click.Context, _: click.Parameter, value: Any) -> None:
        if value is not None and value is not False:
            setattr(given(context), attribute, value)

    return callback


def _store_setting(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(context: click.Context, param: click.Parameter, value: Any) -> None:
        # Click makes False of a flag that was not given.
        if value is not None and context.get_parameter_source(param.name or "") not in UNSET:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            given(context).settings[name] = text

    return callback


def setting_option(name: str, *declarations: str, **attributes: Any) -> click.Option:
    """An option that gives the setting `name`."""
    return click.Option(
        [f"setting_{name}", *declarations],
        expose_value=False,
        callback=_store_setting(name),
        default=None,
        **attributes,
    )


def root_options(*, hidden: bool) -> list[click.Option]:
    """New objects for the options that stand on the root and, hidden, on every command."""

    def stored(attribute: str, *declarations: str, **attributes: Any) -> click.Option:
        # Its own name: a command's argument may be called the same.
        return click.Option(
            [f"root_{attribute}", *declarations],
            expose_value=False,
            callback=_store(attribute),
            default=None,
            hidden=hidden,
            **attributes,
        )

    return [
        stored(
            "app",
            "-A",
            "--app",
            metavar="APP",
            is_eager=True,  # `-A proj --help` lists the app's commands too
            help="App to use: module, module:attr or file.py. [env: STREAMD_APP]",
        ),
        stored(
            "name",
            "--name",
            metavar="NAME",
            help="Instance name, when one host runs several. [default: last part of APP]",
        ),
        stored(
            "config_file",
            "-c",
            "--config",
            metavar="FILE",
            type=click.Path(exists=True, dir_okay=False, resolve_path=True),
            help="Settings file. [default: streamd.toml, else pyproject.toml [tool.streamd]]",
        ),
        setting_option(
            "datadir",
            "-D",
            "--datadir",
            metavar="DIRECTORY",
            hidden=hidden,
            help="Where state is kept. [default: ./<app id>-data]",
        ),
        setting_option(
            "broker",
            "--broker",
            metavar="URL",
            hidden=hidden,
            help="embedded:// (the default), kafka://host:port or memory://.",
        ),
        setting_option(
            "workdir",
            "-W",
            "--workdir",
            metavar="DIRECTORY",
            is_eager=True,
            hidden=hidden,
            help="Change to this folder first.",
        ),
        setting_option(
            "loglevel",
            "-l",
            "--loglevel",
            type=LOG_LEVEL,
            hidden=hidden,
            help="Least level to log. [default: info for worker and start, else warn]",
        ),
        setting_option(
            "logfile",
            "-f",
            "--logfile",
            metavar="FILE",
            type=click.Path(dir_okay=False, resolve_path=True),
            hidden=hidden,
            help="Log to this file. [default: stderr; a daemon: streamd.log in the datadir]",
        ),
        setting_option(
            "log_format",
            "--log-format",
            type=click.Choice(["auto", "text", "json"]),
            hidden=hidden,
            help="auto: text on a terminal, else json. [default: auto]",
        ),
        stored(
            "json",
            "--json",
            is_flag=True,
            help="Print JSON: one object, or one a line for streams.",
        ),
        stored("quiet", "-q", "--quiet", is_flag=True, help="Print only data and errors."),
        setting_option(
            "debug",
            "--debug",
            is_flag=True,
            hidden=hidden,
            help="Show whole tracebacks; warn of table values changed in place.",
        ),
        stored(
            "color",
            "--color",
            type=click.Choice(["auto", "always", "never"]),
            help="NO_COLOR and FORCE_COLOR are obeyed. [default: auto]",
        ),
    ]


def add_root_options(command: click.Command) -> None:
    """Let `command` take the root's options too; its own names win."""
    taken = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    for param in root_options(hidden=True):
        param.opts = [name for name in param.opts if name not in taken]
        if param.opts:
            command.params.append(param)


def add_setting_options(command: click.Command, args: list[str]) -> None:
    """Let `command` take any setting as an option, if `args` holds one it does not know.

    The settings' table is read only then: most commands need none of it.
    """
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    known |= {"--help", "--version"}
    asked = {arg.partition("=")[0] for arg in args if re.match(r"--[a-z]", arg)} - known
    if not asked:
        return
    from streamd.config import Settings  # noqa: PLC0415 - 15 ms that few commands need

    # All of them: a wrong name is answered with the right one.
    for setting in Settings.table.values():
        if setting.option is not None and not known & set(setting.option.split("/")):
            command.params.append(setting_option(setting.name, setting.option, hidden=True))


def color_wanted(color: str) -> bool | None:
    """Whether to write colours: True, False, or None to let the terminal decide."""
    if color != "auto":
        return color == "always"
    if os.environ.get("NO_COLOR") is not None:
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return False if os.environ.get("TERM") == "dumb" else None


def option(*declarations: str, **attributes: Any) -> Callable[[Any], Any]:
    """An option of one of the app's own commands: `click.option` that shows its default."""
    attributes.setdefault("show_default", True)
    return click.option(*declarations, **attributes)


def argument(*declarations: str, **attributes: Any) -> Callable[[Any], Any]:
    """An argument of one of the app's own commands: `click.argument`."""
    return click.argument(*declarations, **attributes)


def display_path(path: str | Path) -> str:
    """A path as a person would type it here: ./proj-data rather than all of it."""
    try:
        return f"./{Path(path).relative_to(Path.cwd())}"
    except ValueError:
        return str(path)
