"""The systemd unit: what it says, and what systemd makes of it."""

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from streamd.config import Settings
from streamd.instance import Folder

ROOT = Path(__file__).parent.parent
UNIT = ROOT / "deploy" / "streamd@.service"


@pytest.fixture
def service() -> dict[str, str]:
    """The unit's [Service], without what is there twice."""
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    return dict(unit["Service"])


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


def test_systemd_has_no_complaint(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    text = UNIT.read_text().replace("/usr/bin/streamd", sys.executable)
    unit = tmp_path / "streamd@proj.service"
    unit.write_text(text)

    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    # It also looks at units of the machine; only what it says of this one counts.
    said = done.stdout + done.stderr
    assert [line for line in said.splitlines() if "streamd" in line] == []
    assert done.returncode == 0, said
