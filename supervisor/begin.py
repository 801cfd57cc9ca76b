"""The first steps of the master: what must hold before any code of the user's runs."""

import asyncio
import ctypes
import grp
import os
import pwd
import resource
import signal
import sys
import traceback
from typing import NoReturn

import msgspec

from streamd.errors import ConfigError, NotPermitted, StreamdError
from streamd.instance import StartSpec
from streamd.supervisor.master import Master
from streamd.supervisor.progress import Progress

_PR_SET_PDEATHSIG = 1
EXIT_GUARDIAN_GONE = 70
EXIT_BUG = 70


def main() -> NoReturn:
    """Run the master with the descriptors of the arguments."""
    spec_fd, _, ready_fd = (int(argument) for argument in sys.argv[1:4])
    follow_guardian(int(os.environ["STREAMD_GUARDIAN"]))
    with open(spec_fd, "rb") as file:
        file.seek(0)
        spec = msgspec.json.decode(file.read(), type=StartSpec)
    progress = Progress(ready_fd)
    try:
        prepare(spec)
        code = asyncio.run(run(spec, progress))
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


async def run(spec: StartSpec, progress: Progress) -> int:
    """Make a master and run it."""
    task = asyncio.current_task()
    assert task is not None
    task.set_name("master")
    return await Master(spec, progress, dict(os.environ)).run()


def follow_guardian(guardian: int) -> None:
    """End cold when the guardian dies, also if it has died by now."""
    # QUIT is blocked until the loop has its handler, and not lost.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT, 0, 0, 0)
    if os.getppid() != guardian:
        os._exit(EXIT_GUARDIAN_GONE)


def prepare(spec: StartSpec) -> None:
    """Set what must hold before any code of the user's runs.

    Raises:
        StreamdError: It cannot be set.
    """
    check_identity(spec)
    try:
        os.chdir(spec.workdir)
        if spec.umask is not None:
            os.umask(spec.umask)
        if spec.nofile is not None:
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (spec.nofile, max(spec.nofile, hard)))
    except (OSError, ValueError) as error:
        raise StreamdError(f"the process cannot be set up: {error}") from error


def check_identity(spec: StartSpec) -> None:
    """Refuse to run as somebody else than asked for.

    Raises:
        ConfigError: There is no such user or group.
        NotPermitted: This process is another's.
    """
    try:
        uid = pwd.getpwnam(spec.user).pw_uid if spec.user is not None else os.geteuid()
        gid = grp.getgrnam(spec.group).gr_gid if spec.group is not None else os.getegid()
    except KeyError as error:
        raise ConfigError(f"the settings user and group name nobody: {error}") from error
    if (uid, gid) != (os.geteuid(), os.getegid()):
        raise NotPermitted(
            f"this process is uid {os.geteuid()}, gid {os.getegid()}, and was to run as "
            f"user={spec.user!r} group={spec.group!r}: it does not change by itself",
            remedy="start it as that user: User= in systemd, or sudo -u NAME streamd …",
        )
