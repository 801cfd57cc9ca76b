"""Which installation of an app this is: tells its members of a group from another host's."""

import contextlib
import os
import uuid
from pathlib import Path

VARIABLE = "STREAMD_INSTANCE"
FILE = "installation"


def installation(datadir: Path) -> str:
    """The id in the data directory, made once; or what STREAMD_INSTANCE says (containers)."""
    if given := os.environ.get(VARIABLE):
        return given
    file = datadir / FILE
    with contextlib.suppress(FileNotFoundError):
        if known := file.read_text().strip():
            return known
    made = datadir / f"{FILE}.{os.getpid()}"
    made.write_text(f"{uuid.uuid4().hex[:12]}\n")
    # Of several processes that make one at the same moment, one is first.
    with contextlib.suppress(FileExistsError):
        os.link(made, file)
    made.unlink()
    return file.read_text().strip()
