"""The app itself, imported into this process, for commands that need more than its instance."""

import os
from pathlib import Path
from typing import cast

import msgspec

from streamd.app import App
from streamd.cli import talk, target
from streamd.cli.options import Given
from streamd.errors import NotRunning, StreamdError
from streamd.finder import find_app, reference_to
from streamd.instance import InstanceRecord
from streamd.wire import Hello


def name_of(app: App) -> str:
    """What -A would have to say to mean this app."""
    return reference_to(app)


def import_app(given: Given, *, as_running: bool = False) -> tuple[App, str]:
    """The app that is meant, configured, and where it was found. Runs the user's module.

    Where nothing names an app, it is that of the only instance that runs, found from where
    that was started and configured by its settings file.

    Args:
        as_running: Use the data directory of the running instance, whatever it was started
            with: what is sent must come to where it is read.

    Raises:
        UsageError: No app is named.
        AppError: It cannot be imported or contradicts itself.
        ConfigError: A setting has a value that cannot be used.
    """
    record = _running_record(given)
    named, workdir, file = target.named_app(given), Path.cwd(), target.settings_file(given)
    if named is None and record is not None:
        named, workdir = record.app, Path(record.workdir or workdir)
        file = file or (Path(record.config_file) if record.config_file else None)
    named = named or target.app_of(given)
    if given.app_object is not None and named == name_of(given.app_object):
        app, origin = given.app_object, named
    else:
        found, origin = find_app(named, workdir)
        app = cast(App, found)
    settings = dict(given.settings)
    if as_running and record is not None and record.datadir:
        settings.setdefault("datadir", record.datadir)
    app.configure(os.environ, file, settings)
    return app, origin


def _running_record(given: Given) -> InstanceRecord | None:
    """What the running instance that is meant wrote down; None: none runs."""
    try:
        folder = target.folder_of(given)
    except StreamdError:
        # None runs, or one of several: a command that imports can do without.
        return None
    return folder.read_record() if target.living(folder) else None


async def hello_of(given: Given) -> tuple[Hello, bool]:
    """What the app is, and whether the running instance said so; else it is imported."""
    try:
        folder = target.folder_of(given)
        data = await talk.ask(folder, "hello")
    except NotRunning:
        app, origin = import_app(given)
        return app.hello(origin, alone=False), False
    return msgspec.convert(data, Hello), True


async def figures_of(given: Given) -> dict[str, object]:
    """The running instance's snapshot, {} where it has none to give."""
    try:
        snapshot = await talk.ask(target.folder_of(given), "status")
    except StreamdError:
        return {}
    return cast(dict[str, object], snapshot)
