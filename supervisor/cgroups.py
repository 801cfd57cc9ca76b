"""A control group for the tree, where the one that streamd was started in is ours to divide.

The kernel keeps every process of a tree in its group, whatever it does to its environment, its
session or its parents, and `cgroup.kill` ends all of them in one step. Ours to divide is a
group that systemd has delegated (`Delegate=yes`), and the root of the hierarchy as this process
sees it: a container's own. The guardian stays outside of the group, ends it, and removes it.

Standard library only, and no import of streamd: the guardian loads this by path.
"""

import contextlib
import os
import signal
import time

PREFIX = "streamd-"
WAIT_S = 0.001
OLD_S = 60.0  # an empty group of that age is of a tree whose guardian was killed


def make(tree: str) -> str | None:
    """Make the group of a tree; its folder, or None where there is none to be had."""
    parent = own()
    if parent is None or not _is_ours(parent):
        return None
    _remove_old(parent)
    path = os.path.join(parent, PREFIX + tree[:16])
    try:
        os.mkdir(path)
    except OSError:
        return None
    if not os.path.exists(os.path.join(path, "cgroup.kill")):
        # A kernel before 5.14.
        os.rmdir(path)
        return None
    return path


def enter(path: str) -> bool:
    """Let this process, and what it starts from now on, be in the group; False: it may not."""
    return _write(os.path.join(path, "cgroup.procs"), "0")


def members(path: str) -> list[int]:
    """The processes in the group and the groups below it."""
    found: list[int] = []
    for folder, _, files in os.walk(path):
        if "cgroup.procs" in files:
            with contextlib.suppress(OSError):
                with open(os.path.join(folder, "cgroup.procs"), "rb") as file:
                    found += map(int, file.read().split())
    return found


def kill(
    path: str, spared: "set[int] | frozenset[int]" = frozenset(), limit_s: float = 5.0
) -> bool:
    """Kill every process of the group at once; True if none is left. Blocks.

    Args:
        spared: Processes that are taken out of the group first: who calls this, and his shell.
    """
    if not os.path.isdir(path):
        return True
    spare(path, spared)
    deadline = time.monotonic() + limit_s
    while members(path):
        if not _write(os.path.join(path, "cgroup.kill"), "1"):
            for pid in members(path):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return False
        time.sleep(WAIT_S)
    return True


def spare(path: str, spared: "set[int] | frozenset[int]") -> None:
    """Take these processes out of the group."""
    for pid in set(members(path)) & spared:
        _write(os.path.join(os.path.dirname(path), "cgroup.procs"), str(pid))


def remove(path: str) -> None:
    """Remove an empty group, and the empty groups below it."""
    for folder, _, _ in os.walk(path, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def own() -> str | None:
    """The folder of the group that this process is in; None without cgroup v2."""
    root = mount_point()
    if root is None:
        return None
    try:
        with open("/proc/self/cgroup") as file:
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("0::/"):
            inside = line.removeprefix("0::/")
            # Outside of the namespace's root: there is no folder for it here.
            return None if inside.startswith("..") else os.path.join(root, inside).rstrip("/")
    return None


def mount_point() -> str | None:
    """Where cgroup v2 is mounted, or None."""
    try:
        with open("/proc/self/mountinfo") as file:
            for line in file:
                fields, _, kind = line.partition(" - ")
                if kind.startswith("cgroup2 "):
                    return fields.split()[4]
    except OSError:
        return None
    return None


def _remove_old(parent: str) -> None:
    with contextlib.suppress(OSError):
        for name in os.listdir(parent):
            path = os.path.join(parent, name)
            if name.startswith(PREFIX) and time.time() - os.stat(path).st_mtime > OLD_S:
                remove(path)  # the kernel refuses while a process is in it


def _is_ours(path: str) -> bool:
    if not os.access(path, os.W_OK):
        return False
    if path == mount_point():
        return True
    for name in ("user.delegate", "trusted.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(path, name) == b"1":
                return True
    return False


def _write(path: str, text: str) -> bool:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError:
        return False
    return True
