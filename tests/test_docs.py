"""What the docs say is so: every word of the command line is in them, and their code runs."""

import re
import subprocess
from pathlib import Path

import pytest

from streamd.app import App
from streamd.cli.root import root
from streamd.config import SETTINGS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CODES = (0, 1, 2, 3, 4, 69, 70, 75, 78, 124, 130)
SIGNALS = ("TERM", "INT", "QUIT", "HUP", "USR1", "USR2", "TTIN", "TTOU", "KILL")
STATES = ("STOPPED", "STARTING", "RUNNING", "BACKOFF", "STOPPING", "EXITED", "FATAL")


def test_every_command_is_in_the_docs() -> None:
    text = (DOCS / "commands.md").read_text()

    assert [name for name in root.commands if f"streamd {name}" not in text] == []


def test_every_setting_is_in_the_docs() -> None:
    text = (DOCS / "settings.md").read_text()

    assert [each.name for each in SETTINGS if each.name not in text] == []


@pytest.mark.parametrize("word", [*SIGNALS, *STATES])
def test_every_signal_and_state_is_in_operations(word: str) -> None:
    assert re.search(rf"\b{word}\b", (DOCS / "operations.md").read_text())


@pytest.mark.parametrize("code", CODES)
def test_every_exit_code_is_in_operations(code: int) -> None:
    assert f"| {code} |" in (DOCS / "operations.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_app_that_is_shown_is_one(page: str) -> None:
    [source] = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    names: dict[str, object] = {"__name__": "proj"}

    exec(compile(source, page, "exec"), names)

    app = names["app"]
    assert isinstance(app, App)
    hello = app.hello("proj:app", alone=False)
    assert [group.name for group in hello.groups] == ["shuffle_words", "count_words", "app"]


def test_every_page_that_is_linked_is_there() -> None:
    for page in [ROOT / "README.md", *DOCS.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_no_file_names_a_path_of_a_machine() -> None:
    found = subprocess.run(
        ["git", "grep", "-nF", "-e", f"{ROOT.parent}/", "-e", f"{Path.home()}/"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip

    assert found.stdout == ""
