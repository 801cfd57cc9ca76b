"""The systemd units: what they say, what systemd makes of them, and that they run."""

import configparser
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamd.cli.unit import ANY_APP, DEFAULT_PORT, service_text, socket_text
from streamd.config import Settings
from streamd.instance import Folder

ROOT = Path(__file__).parent.parent
UNIT = ROOT / "deploy" / "streamd@.service"


@pytest.fixture
def service() -> dict[str, str]:
    """The unit's [Service], without what is there twice."""
    return parsed(UNIT.read_text())


def test_the_unit_starts_in_the_foreground_and_gives_up_where_no_restart_helps(
    service: dict[str, str],
) -> None:
    assert service["ExecStart"].startswith("/usr/bin/streamd start -A %i")
    assert "--foreground" in service["ExecStart"]
    assert service["RestartPreventExitStatus"].split() == ["2", "75", "78"]


def test_systemd_waits_longer_for_the_stop_than_grace(service: dict[str, str]) -> None:
    grace = str(Settings.table["grace"].default)

    assert int(service["TimeoutStopSec"].removesuffix("s")) > float(grace.removesuffix("s")) + 5


def test_root_finds_the_unit_s_instance_where_it_looks(
    service: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = dict(pair.split("=", 1) for pair in service["Environment"].split())

    monkeypatch.setenv("STREAMD_RUNTIME_DIR", variables["STREAMD_RUNTIME_DIR"])

    assert Folder.of("proj").path == Path("/run/streamd/proj")
    assert Folder.of("%i").path == Path("/run", service["RuntimeDirectory"])
    assert "--name %i" in service["ExecStart"]


def test_the_units_of_deploy_are_those_that_the_command_makes() -> None:
    assert UNIT.read_text() == service_text(ANY_APP)
    assert UNIT.with_suffix(".socket").read_text() == socket_text("%i", DEFAULT_PORT)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with an app, of a name that a unit has to quote."""
    with tempfile.TemporaryDirectory(prefix="sd-", dir="/tmp") as folder:
        path = Path(folder) / "a b%c"
        path.mkdir()
        (path / "proj.py").write_text("import streamd\napp = streamd.App('proj', grace='7s')\n")
        yield path


def streamd(place: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "streamd", "-A", "proj", *words], cwd=place,
        env=environment(place), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def environment(place: Path) -> dict[str, str]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith("STREAMD_")}
    return {**variables, "PYTHONPATH": str(ROOT), "STREAMD_RUNTIME_DIR": str(place.parent)}


def complaints(place: Path, units: dict[str, str], *options: str) -> list[str]:
    """What systemd says of these units; it also looks at units of the machine."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    folder = place.parent / "units"
    folder.mkdir()
    for name, text in units.items():
        (folder / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", *options, "verify", "--man=no", "--recursive-errors=no",
         *(str(folder / name) for name in units)],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "XDG_RUNTIME_DIR": str(place.parent)},
    )  # fmt: skip
    said = (done.stdout + done.stderr).splitlines()
    if done.returncode != 0:
        return said
    return [line for line in said if "streamd" in line]


def test_systemd_has_no_complaint_about_the_units_of_deploy(place: Path) -> None:
    service = UNIT.read_text().replace("/usr/bin/streamd", sys.executable)
    socket = UNIT.with_suffix(".socket").read_text()
    units = {"streamd@proj.service": service, "streamd@proj.socket": socket}

    assert complaints(place, units) == []


@pytest.mark.parametrize("options", [[], ["--user"]], ids=["of the system", "of a user"])
def test_systemd_has_no_complaint_about_the_units_of_an_app(
    place: Path, options: list[str]
) -> None:
    service = streamd(place, "unit", *options)
    socket = streamd(place, "unit", "--socket", *options)

    assert (service.returncode, socket.returncode) == (0, 0), service.stderr + socket.stderr
    units = {"streamd-proj.service": service.stdout, "streamd-proj.socket": socket.stdout}
    assert complaints(place, units, *options) == []
    assert complaints_about_a_slip(place, options)


def complaints_about_a_slip(place: Path, options: list[str]) -> list[str]:
    """Whether systemd would have told us."""
    shutil.rmtree(place.parent / "units")
    text = streamd(place, "unit", *options).stdout.replace("KillMode=mixed", "KillMode=mild")
    return complaints(place, {"streamd-proj.service": text}, *options)


def parsed(text: str) -> dict[str, str]:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(text)
    return dict(unit["Service"])


def words_of(line: str) -> list[str]:
    """The words of a line as systemd reads them."""
    return [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(line)]


def test_the_unit_of_an_app_runs_it_as_it_is_here(place: Path) -> None:
    printed = streamd(place, "unit", "--user", "--without-web", "--hang-limit", "20s")
    service = parsed(printed.stdout)
    assert service["TimeoutStopSec"] == "52s"
    assert service["WorkingDirectory"] == str(place).replace("%", "%%")
    command = words_of(service["ExecStart"])
    assert command[:3] == [sys.executable, "-m", "streamd"]
    assert command[command.index("--datadir") + 1] == str(place / "proj-data")
    variables = dict(word.split("=", 1) for word in words_of(service["Environment"]))

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(place.parent / "notify"))
        systemd.settimeout(30)
        with subprocess.Popen(
            command,
            cwd=service["WorkingDirectory"].replace("%%", "%"),
            env={
                "PATH": os.environ["PATH"], **variables,
                "STREAMD_RUNTIME_DIR": str(place.parent),
                "NOTIFY_SOCKET": str(place.parent / "notify"),
            },
            stderr=subprocess.PIPE,
        ) as instance:  # fmt: skip
            while not systemd.recv(4096).startswith(b"READY=1"):
                continue
            settings = streamd(place, "--json", "config").stdout
            status = json.loads(streamd(place, "--json", "status").stdout)
            instance.terminate()
            assert instance.wait(30) == 0

    assert status["datadir"] == str(place / "proj-data") and status["web"] == ""
    assert '"20s"' in settings


def test_the_unit_has_no_secret_and_says_where_it_belongs(place: Path) -> None:
    broker = "kafka://me:hunter2@localhost:9092"

    done = streamd(place, "--broker", broker, "unit")

    assert "hunter2" not in done.stdout + done.stderr
    assert "STREAMD_BROKER belongs into the EnvironmentFile" in done.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["-b", "127.0.0.1", "-p", "8080"], "ListenStream=127.0.0.1:8080"),
        (["-b", "::1", "-p", "8080"], "ListenStream=[::1]:8080"),
        (["-b", "unix:/run/proj.sock"], "ListenStream=/run/proj.sock"),
    ],
)
def test_the_socket_listens_where_the_app_would(
    place: Path, words: list[str], line: str
) -> None:
    assert line in streamd(place, "unit", "--socket", *words).stdout.splitlines()


@pytest.mark.parametrize("words", [["-p", "0"], ["--without-web"]])
def test_a_socket_without_a_port_is_refused_with_the_cure(
    place: Path, words: list[str]
) -> None:
    done = streamd(place, "unit", "--socket", *words)

    assert done.returncode == 78
    assert "needs a port that is known before the start" in done.stderr
