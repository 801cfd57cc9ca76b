"""The folders at the top level are the packages that streamd installs."""

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ["supervisor", "agentproc", "webgw"]


@pytest.mark.parametrize("room", ROOMS)
def test_room_is_one_folder_under_two_paths(room: str) -> None:
    assert (ROOT / "streamd" / room).samefile(ROOT / room)


@pytest.mark.parametrize("room", ROOMS)
def test_room_refuses_its_short_name(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))

    with pytest.raises(ImportError, match=f"as streamd.{room}, not {room}"):
        __import__(room)


def packages() -> set[str]:
    """Every package of the tree, by the name that it installs as."""
    here = [ROOT / "streamd", *(ROOT / "streamd" / room for room in ROOMS)]
    return {
        ".".join(init.parent.relative_to(ROOT).parts)
        for folder in here
        for init in folder.rglob("__init__.py")
    }


def test_setup_cfg_lists_every_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")

    assert set(setup["options"]["packages"].split()) == packages()


def test_a_wheel_holds_everything_and_runs_from_another_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "-w", str(tmp_path), str(source)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(tmp_path / "site")

    tracked = subprocess.run(
        ["git", "ls-files", "streamd", *ROOMS], cwd=source, capture_output=True, text=True
    ).stdout.split()
    wanted = {
        name if name.startswith("streamd/") else f"streamd/{name}"
        for name in tracked
        if name not in {f"streamd/{room}" for room in ROOMS}
    }
    assert wanted <= names
    done = subprocess.run(
        [sys.executable, "-m", "streamd", "--version"],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("streamd 0."), done.stderr
