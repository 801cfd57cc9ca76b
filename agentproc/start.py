"""Starts the zygote: `python -P start.py LINK_FD`.

Before anything else is imported it makes the names that agent processes use. Each look-up by a
name counts a reference to it, so a forked process copies the pages that names are in. An import
takes a name that is there already, and these are there side by side.
"""

import sys
from os.path import dirname, join

with open(join(dirname(__file__), "names.txt")) as _file:
    NAMES = [sys.intern(line) for line in _file.read().split()]

from streamd.agentproc.zygote import main  # noqa: E402

if __name__ == "__main__":
    main()
