import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streamd import finder
from streamd.errors import AppError, ConfigError
from streamd.finder import canonical_module, find_app, is_importing

MAKE_APP = "class App:\n    __streamd_app__ = True\n\n\napp = App()\n"
Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    """Write a module into tmp_path; what was imported from there is forgotten afterwards."""

    def put(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    modules, path = dict(sys.modules), list(sys.path)
    yield put
    sys.path[:] = path
    for name in set(sys.modules) - set(modules):
        del sys.modules[name]


@pytest.mark.parametrize(
    ("files", "text", "origin"),
    [
        (["proj/__init__.py"], "proj", "proj:app (proj/__init__.py)"),
        (["proj/__init__.py-", "proj/app.py"], "proj", "proj.app:app (proj/app.py)"),
        (
            ["proj/__init__.py-", "proj/__main__.py"],
            "proj",
            "proj.__main__:app (proj/__main__.py)",
        ),
        (["proj/__init__.py-", "proj/mod.py"], "proj.mod:app", "proj.mod:app (proj/mod.py)"),
        (["proj.py"], "proj", "proj:app (proj.py)"),
        (["simple.py"], "simple.py", "simple:app (simple.py)"),
        (["apps/simple.py"], "apps/simple.py:app", "simple:app (apps/simple.py)"),
        (
            ["pack/__init__.py-", "pack/inner/__init__.py-", "pack/inner/simple.py"],
            "pack/inner/simple.py",
            "pack.inner.simple:app (pack/inner/simple.py)",
        ),
        (["proj/__init__.py"], "./proj", "proj:app (proj/__init__.py)"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_app_is_found_in_all_forms(
    write: Write, tmp_path: Path, files: list[str], text: str, origin: str
) -> None:
    for file in files:
        write(file.removesuffix("-"), "" if file.endswith("-") else MAKE_APP)

    app, found_in = find_app(text, tmp_path)

    assert finder.is_app(app)
    assert found_in == origin


def test_an_attribute_may_have_any_name_and_lie_deeper(write: Write, tmp_path: Path) -> None:
    write("proj.py", f"{MAKE_APP}\nclass Site:\n    words = App()\n\n\napp = None\n")

    assert find_app("proj:Site.words", tmp_path)[1] == "proj:Site.words (proj.py)"


def test_a_misspelt_module_is_answered_with_the_right_one(write: Write, tmp_path: Path) -> None:
    write("proj/__init__.py", 'import streamd\n\napp = streamd.App("proj")\n')

    with pytest.raises(AppError) as caught:
        find_app("porj", tmp_path)

    assert str(caught.value) == "cannot import app 'porj': no module named 'porj'"
    assert caught.value.seen[0].startswith(f"looked in {tmp_path} and ")
    assert caught.value.seen[1] == (
        "did you mean 'proj'? (proj/__init__.py has app = streamd.App(\"proj\"))"
    )
    assert caught.value.remedy == "-A proj"
    assert caught.value.exit_code == 78


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AppError, match="there is no file apps/simpel.py"):
        find_app("apps/simpel.py", tmp_path)


def test_an_exception_in_the_module_shows_the_users_frames_only(
    write: Write, tmp_path: Path
) -> None:
    write("proj/__init__.py", "from proj import broken\n")
    write("proj/broken.py", "def fail():\n    return {}['word']\n\n\nfail()\n")

    with pytest.raises(AppError) as caught:
        find_app("proj", tmp_path)

    assert str(caught.value) == (
        "cannot import app 'proj': KeyError: 'word' (proj/broken.py:2)"
    )
    trace = "\n".join(caught.value.seen)
    assert "in fail" in trace
    assert "finder.py" not in trace
    assert "importlib" not in trace


def test_a_module_that_the_users_module_lacks_is_not_taken_for_the_app(
    write: Write, tmp_path: Path
) -> None:
    write("proj.py", "import nothing_of_this_name\n")

    with pytest.raises(AppError, match=r"No module named 'nothing_of_this_name' \(proj.py:1\)"):
        find_app("proj", tmp_path)


def test_a_syntax_error_shows_the_line(write: Write, tmp_path: Path) -> None:
    write("proj.py", "app = (\n")

    with pytest.raises(AppError, match="SyntaxError") as caught:
        find_app("proj", tmp_path)

    assert any("app = (" in line for line in caught.value.seen)


def test_a_module_that_exits_does_not_end_the_process(write: Write, tmp_path: Path) -> None:
    write("proj.py", "import sys\n\nsys.exit(3)\n")

    with pytest.raises(AppError, match=r"sys\.exit\(3\)"):
        find_app("proj.py", tmp_path)


def test_an_error_of_streamds_keeps_its_kind_and_gets_its_place(
    write: Write, tmp_path: Path
) -> None:
    write(
        "proj.py",
        "from streamd.config import resolve\n\nresolve({'web_port': 'x'}, {}, None, {})\n",
    )

    with pytest.raises(ConfigError, match="web_port is 'x'") as caught:
        find_app("proj", tmp_path)

    assert "at proj.py:3" in caught.value.seen


def test_a_missing_attribute_lists_the_apps_that_are_there(
    write: Write, tmp_path: Path
) -> None:
    write("proj.py", MAKE_APP.replace("app = ", "words = "))

    with pytest.raises(AppError, match="proj has no 'app'") as caught:
        find_app("proj", tmp_path)

    assert "there are: proj:words" in caught.value.seen
    assert caught.value.remedy == "-A proj:words"


def test_an_attribute_that_is_no_app_is_refused(write: Write, tmp_path: Path) -> None:
    write("proj.py", "app = 3\n")

    with pytest.raises(AppError, match="'app' of proj is an int, not an App"):
        find_app("proj", tmp_path)


def test_a_file_named_like_another_module_is_refused(write: Write, tmp_path: Path) -> None:
    write("json.py", MAKE_APP)

    with pytest.raises(AppError, match="the name 'json' is taken") as caught:
        find_app("json.py", tmp_path)

    assert caught.value.remedy == "rename json.py"


def test_a_module_that_failed_is_run_again_by_the_next_try(
    write: Write, tmp_path: Path
) -> None:
    path = write("simple.py", "1 / 0\n")
    with pytest.raises(AppError):
        find_app("simple.py", tmp_path)

    path.write_text(f"{MAKE_APP}# corrected\n")

    assert find_app("simple.py", tmp_path)[1] == "simple:app (simple.py)"


def test_a_module_can_tell_that_it_is_imported(write: Write, tmp_path: Path) -> None:
    write(
        "proj.py", f"from streamd.finder import is_importing\n{MAKE_APP}seen = is_importing()\n"
    )

    find_app("proj", tmp_path)

    assert sys.modules["proj"].seen is True
    assert not is_importing()


def test_other_modules_keep_their_names() -> None:
    assert canonical_module("proj.mod") == "proj.mod"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pack/word_count.py"], "pack.word_count {root}/pack/word_count.py:app"),
        (["simple.py"], "simple {root}/simple.py:app"),
        (["-m", "pack.word_count"], "pack.word_count pack.word_count:app"),
    ],
    ids=["a file of a package", "a file alone", "a module"],
)
def test_what_is_run_is_named_as_faust_names_it(
    write: Write, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    text = (
        "from streamd.finder import canonical_module, reference_to\n"
        f"{MAKE_APP}print(canonical_module(__name__), reference_to(app))\n"
    )
    write("pack/__init__.py", "")
    write("pack/word_count.py", text)
    write("simple.py", text)
    root = Path(finder.__file__).parent.parent

    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )

    assert done.stdout.strip() == expected.format(root=tmp_path), done.stderr


def test_a_package_without_an_app_is_told_of_those_in_it_not_of_strangers(
    write: Write, tmp_path: Path
) -> None:
    write("aaa.py", 'import streamd\n\napp = streamd.App("aaa")\n')
    write("mine/__init__.py", "")
    write("mine/apps.py", 'import streamd\n\nother = streamd.App("mine")\n')

    with pytest.raises(AppError, match="mine has no 'app'") as caught:
        find_app("mine", tmp_path)

    assert caught.value.remedy == "-A mine.apps:other"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("notes.txt", "no module named 'notes.txt'"),
        ("./notes.txt", "notes.txt is no Python file"),
        ("..", "no module named '..'"),
        (".proj", "no module named '.proj'"),
    ],
)
def test_what_is_no_module_and_no_python_file_is_told_so(
    write: Write, tmp_path: Path, text: str, words: str
) -> None:
    write("notes.txt", "")

    with pytest.raises(AppError) as caught:
        find_app(text, tmp_path)

    assert words in str(caught.value)
