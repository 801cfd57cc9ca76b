"""Which installation of an app this is: tells its members of a group from another host's."""

import contextlib
import os
import uuid
from pathlib import Path

VARIABLE = "STREAMD_INSTANCE"
FILE = "installation"


def installation(datadir: Path) -> str:
    """The id in the data directory, made once; or what STREAMD_INSTANCE says (containers)."""
    if known := installation_there(datadir):
        return known
    file = datadir / FILE
    made = datadir / f"{FILE}.{os.getpid()}"
    made.write_text(f"{uuid.uuid4().hex[:12]}\n")
    # Of several processes that make one at the same moment, one is first.
    with contextlib.suppress(FileExistsError):
        os.link(made, file)
    made.unlink()
    return file.read_text().strip()


def installation_there(datadir: Path) -> str:
    """What `installation` says, or "" where it would have to make one."""
    if given := os.environ.get(VARIABLE):
        return given
    with contextlib.suppress(FileNotFoundError):
        return (datadir / FILE).read_text().strip()
    return ""
