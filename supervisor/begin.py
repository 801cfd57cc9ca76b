"""The first steps of the master: what must hold before any code of the user's runs."""

import asyncio
import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import traceback
from typing import NoReturn

import msgspec

from streamd.errors import StreamdError
from streamd.instance import StartSpec
from streamd.supervisor import cgroups, limits, tree
from streamd.supervisor.master import Master
from streamd.supervisor.progress import Progress

_PR_SET_PDEATHSIG = 1
_M_ARENA_MAX = -8
EXIT_GUARDIAN_GONE = 70
EXIT_BUG = 70


def main() -> NoReturn:
    """Run the master with the descriptors of the arguments."""
    tree.show_as("master")
    spec_fd, lock_fd, ready_fd = (int(argument) for argument in sys.argv[1:4])
    guardian = int(os.environ["STREAMD_GUARDIAN"])
    follow_guardian(guardian)
    faulthandler.enable()
    share_one_heap()
    if cgroup := os.environ["STREAMD_CGROUP"]:
        cgroups.enter(cgroup)
    with open(spec_fd, "rb") as file:
        file.seek(0)
        spec = msgspec.json.decode(file.read(), type=StartSpec)
    progress = Progress(ready_fd)
    try:
        limits.prepare(spec)
        # Who changes his user loses the signal of his parent's death.
        follow_guardian(guardian)
        code = asyncio.run(run(spec, lock_fd, progress))
    except StreamdError as error:
        progress.tell_error(error)
        code = error.exit_code
    except Exception as error:
        traceback.print_exc()
        progress.tell_error(StreamdError(f"the master failed: {type(error).__name__}: {error}"))
        code = EXIT_BUG
    sys.stderr.flush()
    # sqlitedict's thread is not waited for: a disk that hangs would keep the master.
    os._exit(code)


async def run(spec: StartSpec, lock_fd: int, progress: Progress) -> int:
    """Make a master and run it."""
    task = asyncio.current_task()
    assert task is not None
    task.set_name("master")
    return await Master(spec, lock_fd, progress, dict(os.environ)).run()


def share_one_heap() -> None:
    """Let the registry's thread have no heap of its own, which is half empty for ever."""
    with contextlib.suppress(AttributeError):  # glibc's
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def follow_guardian(guardian: int) -> None:
    """End cold when the guardian dies, also if it has died by now."""
    # QUIT is blocked until the loop has its handler, and not lost.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT, 0, 0, 0)
    if os.getppid() != guardian:
        os._exit(EXIT_GUARDIAN_GONE)
