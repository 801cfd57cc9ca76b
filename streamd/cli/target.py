"""Which app and which instance a command means.

The app: -A after the command, before it, STREAMD_APP, `app` in the settings file, and for
commands that control, the only instance that runs. Nothing here imports the app.
"""

import importlib.util
import os
import sys
import time
from pathlib import Path

import msgspec

import streamd
from streamd.cli.options import Given
from streamd.errors import AppError, NotRunning, StreamdError, UsageError
from streamd.instance import Folder, Identity, folders, instance_name


class Holder(msgspec.Struct, frozen=True):
    """Who took `tree.lock`, written into it: known before the master has written its record,
    and after a crash that it never wrote one."""

    tree: str
    guardian: Identity
    app: str
    mode: str
    since: float


def read_holder(folder: Folder) -> Holder | None:
    """Who took the lock last, or None if nobody or nothing that can be read."""
    try:
        return msgspec.json.decode(folder.lock_path.read_bytes(), type=Holder)
    except (OSError, msgspec.DecodeError):
        return None


def write_holder(lock_fd: int, holder: Holder) -> None:
    """Write into the lock that one holds."""
    os.ftruncate(lock_fd, 0)
    os.pwrite(lock_fd, msgspec.json.encode(holder), 0)


def living(folder: Folder) -> Identity | None:
    """The guardian or master of the instance, whichever lives; None: neither."""
    holder, record = read_holder(folder), folder.read_record()
    candidates = [holder.guardian] if holder else []
    if record:
        candidates += [record.master, record.guardian]
    return next((who for who in candidates if who.is_alive()), None)


def running() -> list[Folder]:
    """The instances of this user that run now."""
    return [folder for folder in folders() if living(folder)]


def settings_file(given: Given) -> Path | None:
    """--config, else STREAMD_CONFIG, else the settings file of this folder, else None."""
    if chosen := given.config_file or os.environ.get("STREAMD_CONFIG"):
        return Path(chosen).absolute()
    if not Path("streamd.toml").exists() and not Path("pyproject.toml").exists():
        return None
    from streamd.config import find_file  # noqa: PLC0415 - 15 ms, only where there is a file

    return find_file(Path.cwd())


def _file_value(given: Given, key: str) -> str | None:
    path = settings_file(given)
    if path is None:
        return None
    from streamd.config import file_value  # noqa: PLC0415 - 15 ms, only where there is a file

    return file_value(path, key)


def named_app(given: Given) -> str | None:
    """What -A, STREAMD_APP or the settings file names; None: nothing does."""
    return given.app or os.environ.get("STREAMD_APP") or _file_value(given, "app")


def named_instance(given: Given) -> str | None:
    """What --name, STREAMD_NAME or the settings file names; None: nothing does."""
    return given.name or os.environ.get("STREAMD_NAME") or _file_value(given, "name")


def app_of(given: Given) -> str:
    """The app that is meant.

    Raises:
        UsageError: None is named; the text lists what could be meant.
    """
    if named := named_app(given):
        return named
    candidates = _apps_here()
    raise UsageError(
        "no app was named",
        seen=[f"{path} makes an App" for _, path in candidates],
        remedy=(
            f"-A {candidates[0][0]}, or set STREAMD_APP, or app in streamd.toml"
            if candidates
            else "-A with a module, module:attr or file.py; or streamd demo"
        ),
    )


def _apps_here() -> list[tuple[str, Path]]:
    """Modules and packages of this folder that seem to make an App, as (-A, path)."""
    found = []
    for path in sorted([*Path().glob("*.py"), *Path().glob("*/__init__.py")])[:200]:
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue
        if "streamd" in text and "App(" in text:
            named = str(path.parent) if path.name == "__init__.py" else str(path)
            found.append((named, path))
    return found


def instance_of(app: str, name: str | None) -> str:
    """The instance's name; of `proj.__main__` it is that of the package."""
    module, colon, attribute = app.partition(":")
    return instance_name(module.removesuffix(".__main__") + colon + attribute, name)


def folder_of(given: Given) -> Folder:
    """The runtime folder of the instance that is meant.

    Raises:
        NotRunning: None is named and none runs.
        UsageError: None is named and several run.
    """
    if name := named_instance(given):
        return Folder.of(instance_name("", name))
    if app := named_app(given):
        return Folder.of(instance_of(app, None))
    candidates = running()
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise NotRunning("no instance runs", remedy="streamd start -A APP")
    raise UsageError(
        f"{len(candidates)} instances run; which one is meant?",
        seen=[describe(folder) for folder in candidates],
        remedy=f"add --name {candidates[0].path.name}",
    )


def describe(folder: Folder) -> str:
    """An instance in a line."""
    record = folder.read_record()
    if record is None:
        return folder.path.name
    return f"{record.name}: {record.app} in {record.datadir} (pid {record.master.pid})"


def not_running(folder: Folder) -> StreamdError:
    """Why nobody answers at the instance's control socket."""
    name = folder.path.name
    if who := living(folder):
        error = StreamdError(
            f"{name} (pid {who.pid}) does not answer yet: it is starting or ending",
            remedy=f"streamd status --name {name}, in a moment",
        )
        error.exit_code = 1
        return error
    record = folder.read_record()
    return NotRunning(
        f"{name} does not run",
        seen=[f"{other.path.name} does" for other in running() if other.path.name != name],
        remedy=f"streamd start -A {record.app if record else name}",
    )


def wait_unlocked(folder: Folder, timeout_s: float | None) -> bool:
    """Wait until no process of the instance is left; False if some are after `timeout_s`."""
    if not folder.lock_path.exists():
        return True
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while (lock := folder.try_lock()) is None:
        if deadline is not None and time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    os.close(lock)
    return True


def is_found_anywhere() -> bool:
    """False where streamd was found only because this Python was started in its folder."""
    here = Path(streamd.__file__).parents[1].resolve()
    path = sys.path
    sys.path = [entry for entry in path if Path(entry or ".").resolve() != here]
    sys.path += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    try:
        return any(finder.find_spec("streamd", None) for finder in sys.meta_path)
    finally:
        sys.path = path


def room_path(room: str, file: str) -> str:
    """The path of a file in a room, found without importing it."""
    spec = importlib.util.find_spec(f"streamd.{room}")
    if spec is None or spec.origin is None:
        raise AppError(f"streamd is not installed whole: streamd.{room} is not there")
    return str(Path(spec.origin).with_name(file))
