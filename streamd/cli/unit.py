"""`unit`: the systemd unit that runs the app, and the socket unit that keeps its port open.

`deploy/` has the same for any app, made by `python -m streamd.cli.unit`; a test compares them.
"""

import math
import os
import pwd
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

import streamd
from streamd.cli import output, target
from streamd.cli.imported import import_app
from streamd.cli.launch import web_options
from streamd.cli.options import Given, given
from streamd.cli.root import Command
from streamd.config import PREFIX, Settings
from streamd.errors import ConfigError
from streamd.secrets import mask

STOP_MARGIN_S = 45  # above `grace`: the cold stop, the sweep, and a busy machine
HOMES = ("/home", "/root", "/run/user")
TEMPORARY = ("/tmp", "/var/tmp")
SYSTEM_RUNTIME = "/run/streamd"  # where root looks, whoever runs the instance
DEFAULT_PORT = "127.0.0.1:6066"


@dataclass(frozen=True)
class Unit:
    """What differs between the units; all texts are quoted for systemd."""

    name: str
    exec_start: str
    workdir: str
    env_file: str
    grace_s: float
    environment: list[str] = field(default_factory=list)
    is_users: bool = False  # of a user's own systemd
    user: str | None = None
    group: str | None = None
    state: str | None = None  # the directory below /var/lib that systemd makes
    protect_system: str = "full"
    protect_home: str = "yes"
    private_tmp: str = "yes"


def service_text(unit: Unit) -> str:
    """The service."""
    lines = ["[Unit]", f"Description=streamd stream processor ({unit.name})"]
    if not unit.is_users:
        lines += ["Wants=network-online.target", "After=network-online.target"]
    lines += [
        "StartLimitIntervalSec=5min",
        "StartLimitBurst=5",
        "",
        "[Service]",
        "Type=notify",
        "NotifyAccess=main",
        f"ExecStart={unit.exec_start}",
        "ExecReload=/bin/kill -HUP $MAINPID",
        f"EnvironmentFile=-{unit.env_file}",
    ]
    if not unit.is_users:
        lines.append(
            "# The runtime folder is where root looks, so that `sudo streamd status` finds it."
        )
    lines += [
        f"Environment={' '.join([*unit.environment, 'PYTHONUNBUFFERED=1'])}",
        f"WorkingDirectory={unit.workdir}",
        "Restart=on-failure",
        "RestartSec=2s",
        "# Wrong usage, another instance, wrong settings: no restart would change them.",
        "RestartPreventExitStatus=2 75 78",
        "# Fed by the master's loop. A start that recovers asks for more time by itself.",
        "WatchdogSec=30s",
        "TimeoutStartSec=90s",
        f"# Above grace ({unit.grace_s:g} s) and the cold stop after it.",
        f"TimeoutStopSec={math.ceil(unit.grace_s) + STOP_MARGIN_S}s",
        "# TERM to the guardian alone, which has all of it drained; KILL to what is left.",
        "KillMode=mixed",
        "# A process that runs out of memory is replaced; the others go on.",
        "OOMPolicy=continue",
        "Delegate=cpu memory pids",
    ]
    if not unit.is_users:
        lines += ["TasksMax=4096", "LimitNOFILE=65536", "", *_system_lines(unit)]
    lines += ["", "[Install]"]
    lines.append(f"WantedBy={'default' if unit.is_users else 'multi-user'}.target")
    return "\n".join(lines) + "\n"


def _system_lines(unit: Unit) -> list[str]:
    """Who it runs as, its folders, and what it may not do."""
    lines = []
    if unit.user:
        lines.append(f"User={unit.user}")
    if unit.group:
        lines.append(f"Group={unit.group}")
    if unit.state:
        lines += [f"StateDirectory={unit.state}", "StateDirectoryMode=0700"]
    return [
        *lines,
        f"RuntimeDirectory=streamd/{unit.name}",
        "RuntimeDirectoryMode=0700",
        "UMask=0077",
        "",
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=",
        f"ProtectSystem={unit.protect_system}",
        f"ProtectHome={unit.protect_home}",
        f"PrivateTmp={unit.private_tmp}",
        "PrivateDevices=yes",
        "ProtectKernelTunables=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelLogs=yes",
        "ProtectClock=yes",
        "ProtectHostname=yes",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6",
        "RestrictNamespaces=yes",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "LockPersonality=yes",
        "SystemCallArchitectures=native",
        "SystemCallFilter=@system-service",
    ]


def socket_text(name: str, listen: str) -> str:
    """The socket: systemd listens, also while the service restarts.

    It hands the socket to the service of its own name, which starts at the first visitor where
    it does not run.
    """
    mode = ["SocketMode=0660"] if listen.startswith("/") else ["NoDelay=yes"]
    lines = [
        "[Unit]",
        f"Description=streamd web port ({name})",
        "",
        "[Socket]",
        f"ListenStream={listen}",
        "FileDescriptorName=web",
        *mode,
        "",
        "[Install]",
        "WantedBy=sockets.target",
    ]
    return "\n".join(lines) + "\n"


# The units of deploy/, for the instance that is named after the @.
ANY_APP = Unit(
    name="%i",
    exec_start="/usr/bin/streamd start -A %i --name %i --foreground",
    workdir="/srv/streamd/%i",
    env_file="/etc/streamd/%i.env",
    grace_s=30.0,
    environment=["STREAMD_DATADIR=%S/streamd/%i", f"STREAMD_RUNTIME_DIR={SYSTEM_RUNTIME}"],
    user="streamd",
    group="streamd",
    state="streamd/%i",
    protect_system="strict",
)


def unit(user_wanted: bool, socket_wanted: bool) -> None:
    """Print a systemd unit that runs the app.

    It names this interpreter, this working folder, the app, its data directory and every
    option that is given here. Imports the app, to learn its settings.
    """
    options = given()
    app, origin = import_app(options)
    settings = app.hello(origin, alone=False).settings
    name = target.instance_of(target.app_of(options), target.named_instance(options))
    stem = f"streamd-{name}"
    if socket_wanted:
        file, text = f"{stem}.socket", socket_text(_plain(name), _listen(settings))
    else:
        file = f"{stem}.service"
        text = service_text(_unit_of(options, name, settings, is_users=user_wanted))
    if options.json:
        output.say_json({"schema": "streamd.unit/1", "file": file, "text": text})
        return
    output.say(text.rstrip("\n"))
    for variable in _only_here(options):
        output.note(f"{variable} belongs into the EnvironmentFile: the unit does not have it.")
    output.note(_how_to_install(file, is_users=user_wanted))


def _unit_of(options: Given, name: str, settings: dict[str, Any], *, is_users: bool) -> Unit:
    workdir, datadir = Path.cwd(), Path(settings["datadir"]).absolute()
    words = [sys.executable, "-m", "streamd", "start", "-A", target.app_of(options)]
    words += ["--name", name, "--foreground"]
    if options.config_file or os.environ.get("STREAMD_CONFIG"):
        words += ["--config", str(target.settings_file(options))]
    for setting, value in (options.settings | {"datadir": str(datadir)}).items():
        if setting != "workdir" and not (setting == "broker" and has_secret(value)):
            words += _as_option(setting, value)
    environment = []
    search = [Path(path).absolute() for path in _search_path()]
    if search:
        environment.append(quoted(f"PYTHONPATH={os.pathsep.join(map(str, search))}"))
    if not is_users:
        environment.append(f"STREAMD_RUNTIME_DIR={SYSTEM_RUNTIME}")
    python = Path(sys.executable)
    places = [workdir, datadir, python, python.resolve(), Path(streamd.__file__), *search]
    return Unit(
        name=_plain(name),
        exec_start=" ".join(quoted(word, dollars=True) for word in words),
        workdir=_plain(str(workdir)),
        env_file=f"{'%E' if is_users else '/etc'}/streamd/{_plain(name)}.env",
        grace_s=float(settings["grace"]),
        environment=environment,
        is_users=is_users,
        user=_who_runs_it(),
        protect_home="no" if _any_below(places, HOMES) else "yes",
        private_tmp="no" if _any_below(places, TEMPORARY) else "yes",
    )


def _as_option(name: str, value: str) -> list[str]:
    option = Settings.table[name].option
    assert option is not None
    yes, _, no = option.partition("/")
    if no:
        return [yes if value == "true" else no]
    return [yes] if name == "debug" else [yes, value]


def _any_below(places: list[Path], roots: tuple[str, ...]) -> bool:
    return any(place.is_relative_to(root) for place in places for root in roots)


def _who_runs_it() -> str | None:
    """The user of this command, also behind sudo; root: None."""
    if os.geteuid() == 0:
        return os.environ.get("SUDO_USER")
    return pwd.getpwuid(os.geteuid()).pw_name


def _listen(settings: dict[str, Any]) -> str:
    """Where systemd is to listen.

    Raises:
        ConfigError: The app has no web port, or one that is not known before the start.
    """
    bind, port = str(settings["web_bind"]), int(settings["web_port"])
    if not settings["web_enabled"] or port == 0:
        what = "web_port is 0" if settings["web_enabled"] else "web_enabled is off"
        raise ConfigError(
            f"{what}: a socket unit needs a port that is known before the start",
            remedy="set web_port, or leave out --socket",
        )
    if bind.startswith("unix:"):
        return _plain(str(Path(bind.removeprefix("unix:")).absolute()))
    try:
        found = socket.getaddrinfo(bind or "0.0.0.0", port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"the web address {bind!r} is none: {error}", remedy="set web_bind to an address"
        ) from error
    host = found[0][4][0]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def _search_path() -> list[str]:
    return list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))


def has_secret(broker: str) -> bool:
    """True if the URL of a broker has a password, which everybody could read in a unit."""
    return mask(broker) != broker


def _only_here(options: Given) -> list[str]:
    """Variables of what was said here, by the shell or as an option, and is in no unit."""
    # The data directory is among the options, the runtime folder is the unit's.
    told = {"STREAMD_DATADIR", "STREAMD_WORKDIR"}
    names = {PREFIX + name.upper() for name in Settings.table} - told
    found = {name for name in names if os.environ.get(name)}
    if has_secret(options.settings.get("broker", "")):
        found.add("STREAMD_BROKER")
    return sorted(found)


def _how_to_install(file: str, *, is_users: bool) -> str:
    folder = "~/.config/systemd/user" if is_users else "/etc/systemd/system"
    systemctl = "systemctl --user" if is_users else "sudo systemctl"
    return (
        f"To install: write it to {folder}/{file}, then {systemctl} daemon-reload && "
        f"{systemctl} enable --now {file}"
    )


def quoted(word: str, *, dollars: bool = False) -> str:
    """A word as systemd reads it back: quotes, specifiers, in commands also variables.

    >>> quoted("a b%")
    '"a b%%"'
    """
    text = _plain(word)
    if dollars:
        text = text.replace("$", "$$")
    if text and not set(text) & set(" \t\n\"'\\;"):
        return text
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\t", "\\t")):
        text = text.replace(plain, escaped)
    return f'"{text}"'


def _plain(text: str) -> str:
    """Text in which % is no specifier."""
    return text.replace("%", "%%")


unit_command = Command(
    "unit",
    callback=unit,
    help=unit.__doc__,
    params=[
        click.Option(
            ["--user", "user_wanted"],
            is_flag=True,
            help="For your own systemd (systemctl --user), without root.",
        ),
        click.Option(
            ["--socket", "socket_wanted"],
            is_flag=True,
            help="The socket unit: systemd keeps the web port open over restarts.",
        ),
        *web_options(),
    ],
)


if __name__ == "__main__":
    deploy = Path("deploy")
    (deploy / "streamd@.service").write_text(service_text(ANY_APP))
    (deploy / "streamd@.socket").write_text(socket_text("%i", DEFAULT_PORT))
