"""The command line's grammar: options in any place, suggestions, errors, exit codes."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from streamd.cli.options import Duration, Given, color_wanted
from streamd.cli.root import BUILT_IN, COMMANDS, HIDDEN, root, run
from streamd.commands import BUILT_IN as RESERVED
from streamd.errors import Busy

HEAVY = ("starlette", "hypercorn", "confluent_kafka", "apsw", "uvloop", "psutil", "jinja2")
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without an app, and no instance that runs."""
    for name in list(os.environ):
        if name.startswith("STREAMD_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("STREAMD_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Given, str]]:
    """What `worker` would have run with, instead of running it."""
    calls: list[tuple[Given, str]] = []
    launch = importlib.import_module("streamd.cli.launch")
    monkeypatch.setattr(
        launch, "run_foreground", lambda given, mode: calls.append((given, mode))
    )
    return calls


def command_of(name: str) -> click.Command:
    found = root.get_command(click.Context(root, obj=Given()), name)
    assert found is not None
    return found


def test_the_help_of_the_root_is_that_of_the_commands() -> None:
    for commands in (*COMMANDS.values(), HIDDEN):
        for name, (_, help) in commands.items():
            text = (command_of(name).help or "").partition("\n\n")[0]
            assert " ".join(text.split()) == help, name


def test_an_app_cannot_take_a_built_in_name() -> None:
    assert set(BUILT_IN) == RESERVED


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_command_takes_the_options_of_the_root(name: str) -> None:
    taken = {option for param in command_of(name).params for option in param.opts}

    for option in ("--app", "--name", "--config", "--datadir", "--workdir", "--loglevel"):
        assert option in taken
    for option in ("--logfile", "--log-format", "--json", "--quiet", "--debug", "--color"):
        assert option in taken


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_command_shows_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "-h"]) == 0
    assert f"Usage: streamd {name}" in capsys.readouterr().out


def test_the_guides_line_works_with_options_on_both_sides(
    launched: list[tuple[Given, str]], tmp_path: Path
) -> None:
    line = f"--datadir={tmp_path}/w1 -A proj -l info worker --web-port=6067 --without-web"

    assert run(line.split()) == 0

    given, mode = launched[0]
    assert (given.app, mode) == ("proj", "worker")
    assert given.settings == {
        "datadir": f"{tmp_path}/w1",
        "loglevel": "info",
        "web_port": "6067",
        "web_enabled": "false",
    }


def test_an_option_after_the_command_beats_the_same_before_it(
    launched: list[tuple[Given, str]],
) -> None:
    run("-A before -l debug worker -A after -l WARNING".split())

    given, _ = launched[0]
    assert given.app == "after"
    assert given.settings["loglevel"] == "warn"


def test_any_setting_is_an_option_before_and_after_the_command(
    launched: list[tuple[Given, str]],
) -> None:
    run("--hang-limit=5s -A proj worker --checkpoint-events 7".split())

    given, _ = launched[0]
    assert given.settings == {"hang_limit": "5s", "checkpoint_events": "7"}


def test_what_was_not_given_is_no_setting(launched: list[tuple[Given, str]]) -> None:
    run("-A proj worker".split())

    assert launched[0][0].settings == {}


@pytest.mark.parametrize(
    ("line", "suggestion"),
    [
        ("wroker -A proj", "Did you mean 'worker'?"),
        ("worker -A proj --web-prot 1", "'--web-port'"),
        ("worker -A proj --hang-limt 1s", "'--hang-limit'"),
        ("--loglevl info worker", "'--loglevel'"),
    ],
)
def test_a_wrong_word_is_answered_with_the_right_one(
    line: str, suggestion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(line.split()) == 2

    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("Error: no such ")
    assert suggestion in shown.err


@pytest.mark.parametrize(
    ("line", "code", "error"),
    [
        ("status -A proj", 3, "Error: proj does not run\nTry: streamd start -A proj\n"),
        ("ps", 3, "Error: no instance runs\nTry: streamd start -A APP\n"),
        ("logs --grep [", 3, "Error: no instance runs"),
        ("logs --since yesterday", 2, "'yesterday' is no time: write 15m, 2h or"),
        ("start -A proj -t soon", 2, "'soon' is no duration: write 500ms, 30s, 5m or 2h"),
        ("worker -A proj -p 99999", 2, "99999 is not in the range"),
        ("worker -A proj --umask 99", 78, "umask is '99' (option --umask); expected"),
        ("worker -A proj -W nowhere", 2, "the workdir 'nowhere' cannot be entered"),
        ("worker -A proj -c no.toml", 2, "File 'no.toml' does not exist"),
        ("worker -A proj --name a/b", 78, "the instance name 'a/b' cannot name a folder"),
        ("worker", 2, "Error: no app was named\nTry: -A with a module"),
        ("scale count", 2, "'count' is no size of a group, expected GROUP=N"),
        ("kill -s NOTHING", 2, "'NOTHING' is no signal"),
        ("completion tcsh", 2, "'tcsh' is not one of"),
    ],
)
def test_an_error_is_a_sentence_a_cure_and_a_code(
    line: str, code: int, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(line.split()) == code

    shown = capsys.readouterr()
    assert shown.out == ""
    assert error in shown.err
    assert shown.err.startswith("Error: ")
    assert "Traceback" not in shown.err


def test_a_missing_app_is_looked_for_in_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "proj.py").write_text('import streamd\napp = streamd.App("proj")\n')

    assert run(["worker"]) == 2

    assert "  proj.py makes an App\nTry: -A proj.py" in capsys.readouterr().err


def test_the_settings_file_names_app_and_instance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "streamd.toml").write_text('app = "site"\n')
    assert run(["status"]) == 3
    assert "Error: site does not run" in capsys.readouterr().err

    (tmp_path / "streamd.toml").write_text('app = "site"\nname = "blue"\n')
    assert run(["status"]) == 3
    assert "Error: blue does not run" in capsys.readouterr().err


def test_the_environment_names_the_app_and_an_option_wins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STREAMD_APP", "green")
    run(["status"])
    assert "green does not run" in capsys.readouterr().err

    run(["status", "-A", "site.red:app"])
    assert "red does not run" in capsys.readouterr().err


def test_stop_and_kill_of_nothing_are_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stop -A proj".split()) == 0
    assert capsys.readouterr().err == "Proj does not run. Nothing done.\n"

    assert run("kill --tree".split()) == 0
    assert capsys.readouterr().err == "Nothing runs. Nothing done.\n"


def test_bare_streamd_shows_help_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Run stream processors and keep them running." in shown.err


def test_a_bug_exits_70_and_leaves_a_crash_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    look = importlib.import_module("streamd.cli.look")
    monkeypatch.setattr(look.target, "folder_of", lambda given: 1 / 0)

    assert run(["status"]) == 70

    shown = capsys.readouterr().err
    assert "Error: this is a bug in streamd: ZeroDivisionError" in shown
    assert "Traceback" not in shown
    (crash,) = tmp_path.glob("streamd-crash-*.txt")
    assert str(crash) in shown
    assert "ZeroDivisionError" in crash.read_text()


def test_debug_shows_our_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = importlib.import_module("streamd.cli.launch")

    def busy(given: Given, mode: str) -> None:
        raise Busy("taken", seen=["by that"], remedy="leave it")

    monkeypatch.setattr(launch, "run_foreground", busy)

    assert run("worker -A proj".split()) == 75
    assert capsys.readouterr().err == "Error: taken\n  by that\nTry: leave it\n"
    assert run("worker -A proj --debug".split()) == 75
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "color", "wanted"),
    [
        ({}, "auto", None),
        ({"NO_COLOR": ""}, "auto", False),
        ({"FORCE_COLOR": "1"}, "auto", True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, "auto", False),
        ({"TERM": "dumb"}, "auto", False),
        ({"NO_COLOR": "1"}, "always", True),
        ({"FORCE_COLOR": "1"}, "never", False),
    ],
)
def test_colour_is_where_it_is_wanted(
    environment: dict[str, str],
    color: str,
    wanted: bool | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert color_wanted(color) is wanted


def test_color_always_colours_what_goes_into_a_pipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("status -A proj --color always".split())
    assert "\x1b[" in capsys.readouterr().err
    run("status -A proj".split())
    assert "\x1b[" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("30s", 30.0), ("5m", 300.0), ("2h", 7200.0), ("3", 3.0)],
)
def test_durations_have_units(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == pytest.approx(seconds)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["-V"]) == 0
    assert capsys.readouterr().out.startswith("streamd 0.")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    assert "_STREAMD_COMPLETE" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["--help", "status -A proj", "stop -A proj", "kill --tree"])
def test_what_controls_imports_nothing_heavy(line: str) -> None:
    code = f"""
import sys
from streamd.cli.root import run
run({line.split()!r})
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=True,
    )
    assert ended.stdout.splitlines()[-1] == "[]"


def test_the_page_of_commands_is_up_to_date() -> None:
    reference = importlib.import_module("streamd.cli.reference")

    written = (REPOSITORY / "docs" / "commands.md").read_text()

    assert written == reference.commands_page(), "python -m streamd.cli.reference > docs/…"
