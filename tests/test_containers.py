"""The files for containers: what can be told without an engine that builds and runs them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from streamd.cli.options import Given
from streamd.cli.root import root
from streamd.config import OTHER_VARIABLES, Settings, resolve

ROOT = Path(__file__).parent.parent
IMAGE = ROOT / "deploy" / "Dockerfile"
COMPOSE = ROOT / "deploy" / "compose.yaml"

# Of the compose specification, as far as a service here may need them.
SERVICE_KEYS = {
    "build", "command", "depends_on", "environment", "healthcheck", "image", "ports", "restart",
    "stop_grace_period", "volumes",
}  # fmt: skip
HEALTH_KEYS = {"test", "interval", "timeout", "retries", "start_period"}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in order: word and rest, lines joined."""
    text = re.sub(r"^#.*\n", "", IMAGE.read_text(), flags=re.MULTILINE)
    lines = filter(None, re.sub(r"\\\n\s*", "", text).splitlines())
    pairs = [line.partition(" ") for line in lines]
    return [(word, rest) for word, _, rest in pairs]


def last(word: str) -> str:
    return [rest for each, rest in instructions() if each == word][-1]


def variables() -> dict[str, str]:
    """What ENV sets."""
    words = [
        word for each, rest in instructions() if each == "ENV" for word in shlex.split(rest)
    ]
    return dict(word.split("=", 1) for word in words)


def sources() -> list[str]:
    """What is copied from the repository."""
    return [
        word
        for each, rest in instructions()
        if each == "COPY" and not rest.startswith("--from")
        for word in rest.split()[:-1]
    ]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content = yaml.safe_load(COMPOSE.read_text())
    assert isinstance(content, dict)
    return content


def test_all_that_is_copied_is_tracked_and_sent_to_the_builder() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", *sources()], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    sent = (ROOT / ".dockerignore").read_text().splitlines()

    for source in sources():
        assert any(path == source or path.startswith(f"{source}/") for path in tracked), source
        assert f"!{source.partition('/')[0]}" in sent


def test_what_is_copied_for_the_build_makes_a_wheel(tmp_path: Path) -> None:
    for source in sources():
        if not source.startswith("examples/"):
            whole = ROOT / source
            if whole.is_dir():
                shutil.copytree(
                    whole, tmp_path / "src" / source, symlinks=True,
                    ignore=shutil.ignore_patterns("__pycache__"),
                )  # fmt: skip
            else:
                (tmp_path / "src").mkdir(exist_ok=True)
                shutil.copy(whole, tmp_path / "src")

    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "-w", str(tmp_path), str(tmp_path / "src")],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip

    assert built.returncode == 0, built.stderr
    assert len(list(tmp_path.glob("streamd-*.whl"))) == 1


def test_the_image_runs_as_nobody_special_and_is_stopped_warm() -> None:
    words = [word for word, _ in instructions()]

    assert last("USER") not in ("root", "0")
    assert words.index("USER") < words.index("CMD")
    assert "RUN" not in words[words.index("USER") :]
    assert last("STOPSIGNAL") == "SIGTERM"
    assert last("VOLUME") == variables()["STREAMD_DATADIR"]
    assert last("EXPOSE") == variables()["STREAMD_WEB_PORT"]


def is_command_line(words: list[str]) -> bool:
    """True if `streamd` takes these words; what they say is not done."""
    context = click.Context(root, info_name="streamd", obj=Given(), **root.context_settings)
    name, command, rest = root.resolve_command(context, words[1:])
    assert command is not None
    command.make_context(name, rest, parent=context)
    return words[0] == "streamd"


def test_the_commands_are_lines_that_streamd_takes(compose: dict[str, Any]) -> None:
    assert is_command_line(json.loads(last("CMD")))
    assert is_command_line(compose["services"]["app"]["command"])
    with pytest.raises(click.UsageError):
        is_command_line(["streamd", "start", "--no-such-option"])


def test_every_variable_is_a_setting_and_has_a_value_that_it_takes(
    compose: dict[str, Any],
) -> None:
    for given in (variables(), compose["services"]["app"]["environment"]):
        ours = {name: value for name, value in given.items() if name.startswith("STREAMD_")}

        settings = resolve({"id": "proj"}, ours, None, {})

        assert settings.warnings == []
        known = {setting.variable for setting in Settings.table.values()} | OTHER_VARIABLES
        assert ours.keys() <= known


def test_the_health_check_tells_a_living_instance_from_a_dead_one(tmp_path: Path) -> None:
    command = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
    assert command[0] == "python"
    shutil.copy(ROOT / "examples" / "word_count.py", tmp_path)
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "STREAMD_RUNTIME_DIR": str(tmp_path / "run"),
        "STREAMD_APP": variables()["STREAMD_APP"],
    }  # fmt: skip

    def run(*words: str, **more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env={**environment, **more},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    try:
        started = run("-m", "streamd", "--json", "start", "-p", "0")
        assert started.returncode == 0, started.stderr
        port = json.loads(started.stdout)["web"].rpartition(":")[2]
        healthy = run(*command[1:], STREAMD_WEB_PORT=port)
    finally:
        assert run("-m", "streamd", "kill", "--tree").returncode == 0
    dead = run(*command[1:], STREAMD_WEB_PORT=port)

    assert healthy.returncode == 0, healthy.stderr
    assert dead.returncode == 1


def test_compose_names_what_there_is(compose: dict[str, Any]) -> None:
    services = compose["services"]

    assert compose.keys() == {"services", "volumes"}
    for name, service in services.items():
        assert service.keys() <= SERVICE_KEYS, name
        assert service.get("healthcheck", {}).keys() <= HEALTH_KEYS
        assert ("image" in service) != ("build" in service)
        for other, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in services[other]
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in compose["volumes"]
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:")
    build = services["app"]["build"]
    assert (COMPOSE.parent / build["context"] / build["dockerfile"]).samefile(IMAGE)


def test_compose_lets_the_app_reach_kafka_and_stop_warm(compose: dict[str, Any]) -> None:
    app, kafka = compose["services"]["app"], compose["services"]["kafka"]
    host = app["environment"]["STREAMD_BROKER"].removeprefix("kafka://")
    advertised = kafka["environment"]["KAFKA_ADVERTISED_LISTENERS"].split(",")
    grace_s = int(app["environment"]["STREAMD_GRACE"].removesuffix("s"))

    assert host.partition(":")[0] in compose["services"]
    assert f"IN://{host}" in advertised
    assert int(app["stop_grace_period"].removesuffix("s")) > grace_s + 30
    assert app["volumes"] == [f"data:{last('VOLUME')}"]
