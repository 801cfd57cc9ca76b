"""A process `log`, on either broker, as the operating system and the master see it.

    python -m streamd.agentproc.MODULE LINK_FD DATADIR ADDRESS

TERM asks it to stop, QUIT ends it at once with 3, USR1 shows its stacks, and the end of the
link to the master ends it with 70, for a successor may be about to start.
"""

import asyncio
import faulthandler
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from streamd.agentproc.stacks import write_task_stacks
from streamd.link import Link
from streamd.log import setup_child_logging

COLD = 3
ORPHANED = 70


class Arguments(NamedTuple):
    """What the process was started with."""

    end: socket.socket  # of the link to the master
    datadir: Path
    address: Path  # of the socket for clients


def begin() -> Arguments:
    """Be the process `log` from now on; what the command line says."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    setup_child_logging("info")
    Path("/proc/self/comm").write_text("log")
    end = socket.socket(fileno=int(sys.argv[1]))
    end.set_inheritable(False)
    return Arguments(end, Path(sys.argv[2]), Path(sys.argv[3]))


def obey_signals() -> asyncio.Event:
    """Obey signals with the running loop; the event is set once it is to stop."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    loop.add_signal_handler(signal.SIGQUIT, os._exit, COLD)
    loop.add_signal_handler(signal.SIGUSR1, write_task_stacks, 2, loop)
    # Registered after it and chained: the threads' stacks come even if the loop does not turn.
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=True)
    return stopping


def ends_with_master(stopping: asyncio.Event) -> Callable[[Link], None]:
    """For a link's `on_lost`: end at once, but where it was to stop anyway."""

    def orphaned(link: Link) -> None:
        if not stopping.is_set():
            os._exit(ORPHANED)

    return orphaned
