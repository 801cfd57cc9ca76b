"""Finding and ending every process of a tree.

Three means are exact: a subreaper that kills its children until it has none (`kill_children`),
the tree's control group, where it has one, and `tree.lock`, which is free only when no process
of the tree is left. `kill_tree` lets the guardian, a subreaper, do it, and the control group;
what outlives both is found by what it cannot shed together: the environment marker,
the lock's descriptor, the identity that the master wrote down, its session, their parents.
Never by name. Identity is checked through a pidfd before each signal: pids are reused.

Standard library only, and no import of streamd at run time: the guardian loads this by path.
"""

import ctypes
import fcntl
import os
import select
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING or __package__:
    from streamd.supervisor import cgroups
else:
    # The guardian has loaded this by path.
    import cgroups
if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from streamd.instance import Identity, InstanceRecord

EMPTY_PASSES = 3
GUARDIAN_S = 3.0  # it ends a tree in milliseconds
_MARKER = b"STREAMD_TREE="
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37


class Found:
    """A process that was found, as it was when it was seen."""

    __slots__ = ("command", "how", "pid", "ppid", "session", "start_ticks", "state")

    def __init__(
        self, pid: int, state: str, ppid: int, session: int, start_ticks: int, command: str
    ) -> None:
        self.pid = pid
        self.state = state
        self.ppid = ppid
        self.session = session
        self.start_ticks = start_ticks
        self.command = command
        self.how = ""  # why it belongs to the tree

    def __str__(self) -> str:
        return f"{self.pid} {self.command} ({self.how or 'state ' + self.state})"


class Report:
    """What `kill_tree` did. `survivors` is empty and `lock_free` true if nothing is left."""

    __slots__ = ("killed", "lock_free", "passes", "survivors")

    def __init__(self) -> None:
        self.killed: list[Found] = []  # in a dry run: what would be killed
        self.survivors: list[Found] = []
        self.passes = 0
        self.lock_free = False

    @property
    def is_complete(self) -> bool:
        """True if nothing of the tree is left."""
        return self.lock_free and not self.survivors


def become_subreaper() -> None:
    """Make orphaned descendants children of this process.

    Raises:
        OSError: The kernel does not do it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    is_one = ctypes.c_int()
    if (
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0
        or libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(is_one), 0, 0, 0) != 0
        or is_one.value != 1
    ):
        raise OSError(ctypes.get_errno(), "this process cannot become a subreaper")


def show_as(name: str) -> None:
    """Let this process be shown under a name by `ps`, `top` and `streamd kill --dry-run`."""
    with open("/proc/self/comm", "w") as file:
        file.write(name)


def look_at(pid: int) -> Found | None:
    """What /proc says about `pid`, or None if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    # The command stands in parentheses and may hold anything: the last one ends it.
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    if len(fields) < 20:
        return None
    command = head.partition("(")[2]
    return Found(pid, fields[0], int(fields[1]), int(fields[3]), int(fields[19]), command)


def children() -> list[int]:
    """The pids of this process's children, zombies too."""
    try:
        found: list[int] = []
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/children", "rb") as file:
                found += map(int, file.read().split())
        return found
    except OSError:
        # A kernel without CONFIG_PROC_CHILDREN.
        own = os.getpid()
        return [each.pid for each in everything() if each.ppid == own]


def everything() -> "Iterable[Found]":
    """Every process of this host that can be seen."""
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (found := look_at(int(entry))) is not None:
            yield found


def held_in(pid: int) -> str:
    """Where in the kernel a process waits, as "state D, in percpu_rwsem_wait"."""
    found = look_at(pid)
    if found is None:
        return "gone"
    try:
        with open(f"/proc/{pid}/wchan") as file:
            place = file.read()
    except OSError:
        place = ""
    return f"state {found.state}, in {place if place not in ('', '0') else '?'}"


def kill_children(deadline_s: float = 10.0) -> list[Found]:
    """Kill until this process has no child; what is adopted meanwhile is killed as well.

    Blocks, for milliseconds as a rule. This process must be a subreaper.

    Returns:
        What is still there after `deadline_s`: processes that the kernel does not let go.
    """
    deadline = time.monotonic() + deadline_s
    rounds = 0
    while True:
        for pid in children():
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        try:
            while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG) is not None:
                continue
        except ChildProcessError:
            return []
        if time.monotonic() > deadline:
            return [found for pid in children() if (found := look_at(pid)) is not None]
        rounds += 1
        if rounds % 20 == 0:
            time.sleep(0.0005)


def is_free(lock_path: "str | Path") -> bool:
    """True if nobody holds the flock on this file; a file that does not exist is free."""
    try:
        fd = os.open(lock_path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def find_tree(
    tree: str, record: "InstanceRecord | None", lock_path: "str | Path"
) -> list[Found]:
    """The processes of a tree that are alive now, but this one and its ancestors.

    Args:
        tree: The value of STREAMD_TREE that the tree was started with; "" if unknown.
        record: What the master wrote down, if it can be read.
        lock_path: The instance's `tree.lock`.
    """
    seen = {found.pid: found for found in everything() if found.state not in "ZX"}
    spared = spared_by(record)
    marker = b"\0" + _MARKER + os.fsencode(tree) + b"\0" if tree else b""
    lock = _file_id(lock_path)
    members: dict[int, Found] = {}
    for found in seen.values():
        if marker and marker in _environment(found.pid):
            found.how = "marker"
        elif lock is not None and _holds(found.pid, lock):
            found.how = "tree.lock"
        else:
            continue
        members[found.pid] = found
    if record is not None and record.master.boot_id == _boot_id():
        for identity in (record.guardian, record.master):
            known = seen.get(identity.pid)
            if known is not None and known.start_ticks == identity.start_ticks:
                known.how = known.how or "identity"
                members[known.pid] = known
        for pid in cgroups.members(record.cgroup) if record.cgroup else ():
            if pid in seen and pid not in members:
                seen[pid].how = "cgroup"
                members[pid] = seen[pid]
        # A session's number is not given to another process while a member lives.
        for found in seen.values():
            old_enough = found.start_ticks >= record.master.start_ticks
            if found.session == record.master.pid and old_enough and found.pid not in members:
                found.how = "session"
                members[found.pid] = found
    _add_descendants(members, seen)
    return [found for found in members.values() if found.pid not in spared]


def kill_tree(
    tree: str,
    record: "InstanceRecord | None",
    lock_path: "str | Path",
    *,
    dry_run: bool = False,
    deadline_s: float = 10.0,
) -> Report:
    """End a whole tree, with or without a living master. Blocks until it is done.

    A living guardian is let do it: what forks faster than it can be found, only a subreaper
    ends. Every pass stops what it finds before it kills, so that nothing it has seen forks
    away. It is done when three passes in a row found nothing and `tree.lock` is free.

    Args:
        dry_run: Find once and signal nothing.
        deadline_s: When to give up and name what is left.
    """
    report = Report()
    deadline = time.monotonic() + deadline_s
    empty = 0
    if record is not None and not dry_run:
        report.killed = find_tree(tree, record, lock_path)
        _let_guardian_end_it(record)
    while True:
        found = find_tree(tree, record, lock_path)
        report.passes += 1
        if dry_run:
            report.killed = found
            report.lock_free = is_free(lock_path)
            return report
        # The guardian is stopped before anything dies: it would end who calls from within.
        _end(found, report)
        if record is not None and record.cgroup:
            cgroups.kill(record.cgroup, spared_by(record))
        empty = 0 if found else empty + 1
        report.lock_free = is_free(lock_path)
        if (empty >= EMPTY_PASSES and report.lock_free) or time.monotonic() > deadline:
            report.survivors = found
            if record is not None and record.cgroup:
                cgroups.remove(record.cgroup)
            return report
        time.sleep(0.001 if found else 0.01)


def _let_guardian_end_it(record: "InstanceRecord") -> None:
    """Kill the master, if both live, and wait until the guardian has ended the rest.

    Not from within the tree: the guardian would end who calls.
    """
    held = []
    for identity in (record.guardian, record.master):
        try:
            fd = os.pidfd_open(identity.pid)
        except OSError:
            continue
        held.append(fd)
    both_live = len(held) == 2 and all(
        _is(look_at(identity.pid), identity) for identity in (record.guardian, record.master)
    )
    if both_live and not _is_below(record.guardian.pid):
        _signal(held[0], signal.SIGCONT)
        _signal(held[1], signal.SIGKILL)
        select.select([held[0]], [], [], GUARDIAN_S)
    for fd in held:
        os.close(fd)


def _is_below(ancestor: int) -> bool:
    pid = os.getpid()
    while pid > 1 and pid != ancestor:
        found = look_at(pid)
        pid = found.ppid if found is not None else 0
    return pid == ancestor


def _end(found: "list[Found]", report: Report) -> None:
    """Stop all of them, then kill all of them; only these very processes."""
    held: list[tuple[int, Found]] = []
    for each in found:
        try:
            fd = os.pidfd_open(each.pid)
        except OSError:
            continue
        held.append((fd, each))
        now = look_at(each.pid)
        if now is None or now.start_ticks != each.start_ticks:
            os.close(fd)
            held.pop()
            continue
        _signal(fd, signal.SIGSTOP)
    known = {(each.pid, each.start_ticks) for each in report.killed}
    for fd, each in held:
        if _signal(fd, signal.SIGKILL) and (each.pid, each.start_ticks) not in known:
            report.killed.append(each)
        os.close(fd)


def _signal(pidfd: int, number: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _add_descendants(members: "dict[int, Found]", seen: "dict[int, Found]") -> None:
    """Add children of members and who is in a session that a member leads, all the way."""
    grown = True
    while grown:
        grown = False
        leaders = {found.pid for found in members.values() if found.session == found.pid}
        for found in seen.values():
            if found.pid in members:
                continue
            if found.ppid in members or found.session in leaders:
                found.how = "descendant"
                members[found.pid] = found
                grown = True


def spared_by(record: "InstanceRecord | None") -> set[int]:
    """This process and all above it that are no processes of the tree.

    A shell that an agent started carries the marker: `streamd kill` in it must not die, though
    the agent, the master and the guardian above it do.
    """
    above: list[Found] = []
    pid = os.getpid()
    while pid > 1 and (found := look_at(pid)) is not None:
        above.append(found)
        pid = found.ppid
    trunk: set[int] = set()
    if record is not None:
        for number, found in enumerate(above):
            if _is(found, record.master) or _is(found, record.guardian):
                trunk.add(found.pid)
            if _is(found, record.master) and number > 1:
                trunk.add(above[number - 1].pid)  # its child: the agent process
    return {0, 1, os.getpid()} | {found.pid for found in above} - trunk


def _is(found: "Found | None", identity: "Identity") -> bool:
    """True if this is that very process, and it lives."""
    return (
        found is not None
        and found.pid == identity.pid
        and found.start_ticks == identity.start_ticks
        and identity.boot_id == _boot_id()
        and found.state not in "ZX"
    )


def _environment(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return b"\0" + file.read() + b"\0"
    except OSError:
        return b""


def variable(pid: int, name: bytes) -> str:
    """A variable of the environment that a process was started with; "" if it has none."""
    before, found, after = _environment(pid).partition(b"\0" + name + b"=")
    return after.partition(b"\0")[0].decode(errors="replace") if found else ""


def _file_id(path: "str | Path") -> tuple[int, int] | None:
    try:
        there = os.stat(path)
    except OSError:
        return None
    return there.st_dev, there.st_ino


def _holds(pid: int, lock: tuple[int, int]) -> bool:
    """True if `pid` has a descriptor through which the lock is held, not only the file open."""
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            if _file_id(f"/proc/{pid}/fd/{fd}") != lock:
                continue
            with open(f"/proc/{pid}/fdinfo/{fd}", "rb") as file:
                if b"\nlock:" in file.read():
                    return True
    except OSError:
        return False
    return False


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
