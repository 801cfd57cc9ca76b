"""The master as the guardian starts it.

python -m streamd.supervisor SPEC_FD LOCK_FD READY_FD
"""

import asyncio
import contextlib
import ctypes
import grp
import json
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
    if ready_fd >= 0:
        os.set_inheritable(ready_fd, False)
        os.set_blocking(ready_fd, False)
    try:
        prepare(spec)
        code = asyncio.run(run(spec, ready_fd))
    except StreamdError as error:
        tell(error, ready_fd)
        code = error.exit_code
    except Exception as error:
        traceback.print_exc()
        tell(StreamdError(f"the master failed: {type(error).__name__}: {error}"), ready_fd)
        code = EXIT_BUG
    sys.stderr.flush()
    # sqlitedict's thread is not waited for: a disk that hangs would keep the master.
    os._exit(code)


async def run(spec: StartSpec, ready_fd: int) -> int:
    """Make a master and run it."""
    task = asyncio.current_task()
    assert task is not None
    task.set_name("master")
    return await Master(spec, ready_fd, dict(os.environ)).run()


def follow_guardian(guardian: int) -> None:
    """End cold when the guardian dies, also if it has died by now."""
    # The default action of QUIT until the loop has its handler.
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
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


def tell(error: StreamdError, ready_fd: int) -> None:
    """Say why there is no master, to whoever started it."""
    told = {
        "message": str(error),
        "seen": error.seen,
        "remedy": error.remedy,
        "exit_code": error.exit_code,
        "traceback": "",
    }
    if ready_fd >= 0:
        with contextlib.suppress(OSError):  # it is not waited for
            os.write(ready_fd, json.dumps({"error": told}).encode() + b"\n")
        return
    lines = [f"Error: {error}", *(f"  {seen}" for seen in error.seen)]
    lines += [f"Try: {error.remedy}"] if error.remedy else []
    sys.stderr.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
