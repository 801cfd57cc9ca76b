"""What runs away is ended to the last process, and nobody else is touched."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from supervisor_tree import IDLE, ROOT, Tree, allowed_s, eventually, tree_of

from streamd.supervisor import cgroups, tree

# Every millisecond: fork, leave the session, let the old one end; with nothing that could be
# found: no marker, no lock, no session, no parent.
RUNAWAY = """
import os
import streamd
app = streamd.App("proj")

RUN = '''
import os, time
while True:
    if os.fork():
        os._exit(0)
    os.setsid()
    time.sleep(0.001)
'''

@app.task
async def run():
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            os.execve(PYTHON, [PYTHON, "-I", "-S", "-c", RUN, "RUNAWAY"], {})
    print("they run")
"""

DEAF_LEAVES = """
import os, signal, time
import streamd
app = streamd.App("proj")

@app.task
async def run():
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            for name in ("TERM", "INT", "QUIT", "HUP", "USR1", "USR2"):
                signal.signal(getattr(signal, "SIG" + name), signal.SIG_IGN)
            os.execve("/bin/sleep", ["sleep", "612"], {})
    print("they run")
"""

SHELL = """
import os, subprocess, sys
import streamd
app = streamd.App("proj")

@app.task
async def run():
    line = (
        f"{sys.executable} -m streamd kill --tree --name proj > killed.txt 2>&1; "
        "echo $? >> killed.txt"
    )
    while not os.path.exists("now"):
        import asyncio
        await asyncio.sleep(0.05)
    subprocess.Popen(["sh", "-c", line], cwd=os.getcwd())
"""

# As setproctitle does without its own care for it: nothing of the environment can be seen.
WIPED = """
import ctypes, os, pathlib, signal, sys
import streamd
app = streamd.App("proj")

def wipe():
    fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])
    ctypes.memset(start, 0, end - start)

@app.task
async def run():
    wipe()
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            signal.pause()
    print("they run")
"""

TRIALS = 5


def have_cgroup() -> bool:
    path = cgroups.make("test-" + os.urandom(4).hex())
    if path is None:
        return False
    cgroups.remove(path)
    return True


def running(mark: str) -> list[int]:
    """The processes whose command line has this in it.

    The newest are looked at first: one that forks each millisecond is gone after that.
    """
    found = []
    for pid in sorted(map(int, filter(str.isdecimal, os.listdir("/proc"))), reverse=True):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if mark.encode() in line:
            found.append(pid)
    return found


def runaway(house: Tree) -> str:
    """Let the app of `house` run away; what its processes are known by."""
    mark = f"runaway-{os.urandom(4).hex()}"
    source = RUNAWAY.replace("PYTHON", repr(sys.executable)).replace('"RUNAWAY"', repr(mark))
    (house.place / "proj.py").write_text(source)
    house.run()
    eventually(lambda: "they run" in house.log)
    eventually(lambda: running(mark))
    return mark


@pytest.mark.parametrize("trial", range(TRIALS))
def test_what_forks_each_millisecond_is_ended_to_the_last(trial: int) -> None:
    end_runaway()


def end_runaway() -> None:
    """Let an app run away, and end its tree."""
    with tree_of() as house:
        mark = runaway(house)
        record = house.folder.read_record()
        began = time.monotonic()

        report = tree.kill_tree(house.marker, record, house.folder.lock_path)

        assert report.is_complete
        assert time.monotonic() - began < allowed_s(1.0)
        assert running(mark) == []


@pytest.mark.skipif(not have_cgroup(), reason="needs a writable cgroup v2")
def test_without_master_and_guardian_the_control_group_ends_it() -> None:
    with tree_of() as house:
        mark = runaway(house)
        record = house.folder.read_record()
        assert record is not None and record.cgroup
        kill_both(house)
        assert is_populated(record.cgroup)

        report = tree.kill_tree(house.marker, record, house.folder.lock_path)

        assert report.is_complete, (report.lock_free, [str(x) for x in report.survivors])
        assert running(mark) == []
        assert not Path(record.cgroup).exists()


@pytest.mark.skipif(not have_cgroup(), reason="needs a writable cgroup v2")
def test_what_cannot_be_ended_is_never_told_as_ended() -> None:
    with tree_of() as house:
        mark = runaway(house)
        record = house.folder.read_record()
        assert record is not None and record.cgroup
        kill_both(house)
        # As on a host without control groups; the group ends them after the test.
        without = msgspec.structs.replace(record, cgroup="")

        report = tree.kill_tree(house.marker, without, house.folder.lock_path, deadline_s=1.0)

        assert not (report.is_complete and is_populated(record.cgroup)), mark


def test_kill_tree_ends_what_has_wiped_its_environment() -> None:
    with tree_of(WIPED) as house:
        app = house.run().pid("app#0")
        eventually(lambda: "they run" in house.log)
        assert b"STREAMD_TREE" not in Path(f"/proc/{app}/environ").read_bytes()
        kill_both(house)

        report = tree.kill_tree(
            house.marker, house.folder.read_record(), house.folder.lock_path
        )

        assert report.is_complete
        found = tree.look_at(app)
        assert found is None or found.state in "ZX"  # whoever adopted it has not reaped it yet


@pytest.mark.skipif(not have_cgroup(), reason="needs a writable cgroup v2")
def test_the_control_group_is_removed_at_the_end() -> None:
    with tree_of() as house:
        record = house.run().folder.read_record()
        assert record is not None
        inside = cgroups.members(record.cgroup)
        pids = [house.pid(name) for name in ("master", "zygote", "log", "app#0")]
        assert set(pids) <= set(inside)
        assert house.pid("guardian") not in inside

        house.signal(signal.SIGTERM)

        assert house.wait_exit() == 0
        assert not Path(record.cgroup).exists()


def is_populated(group: str) -> bool:
    """True if the kernel knows of a process in the group: a look at each could miss it."""
    return "populated 1" in Path(group, "cgroup.events").read_text()


def kill_both(house: Tree) -> None:
    """End guardian and master at once, so that neither cleans up after the other."""
    master = house.pid("master")
    house.signal(signal.SIGSTOP)
    os.kill(master, signal.SIGSTOP)
    house.signal(signal.SIGKILL)
    os.kill(master, signal.SIGKILL)
    house.wait_exit()


def test_the_next_start_ends_what_master_and_guardian_left_when_both_were_killed() -> None:
    with tree_of(DEAF_LEAVES.replace("{}", "dict(os.environ)")) as house:
        begun = streamd(house, "start", "-p", "0")
        assert begun.returncode == 0, begun.stderr
        eventually(lambda: len(house.survivors_of_record()) >= 8)
        record = house.folder.read_record()
        assert record is not None
        for identity in (record.guardian, record.master):
            os.kill(identity.pid, signal.SIGSTOP)
        for identity in (record.guardian, record.master):
            os.kill(identity.pid, signal.SIGKILL)
        eventually(lambda: tree.find_tree(record.tree, record, house.folder.lock_path))

        again = streamd(house, "start", "-p", "0")

        assert again.returncode == 0, again.stderr
        assert "had died and left" in again.stderr + again.stdout
        new = house.folder.read_record()
        assert new is not None and new.tree != record.tree
        assert tree.find_tree(record.tree, record, Path("/nonexistent")) == []
        assert streamd(house, "kill", "--tree").returncode == 0


LEFT_ALONE = """
import subprocess
import streamd
app = streamd.App("proj")

@app.task
async def run():
    subprocess.Popen(["sleep", "614"])
    print("they run")
"""


def test_kill_tree_finds_what_is_left_where_nobody_holds_the_lock_any_more() -> None:
    with tree_of(LEFT_ALONE) as house:
        begun = streamd(house, "start", "-p", "0")
        assert begun.returncode == 0, begun.stderr
        left = eventually(lambda: running("\x00614\x00"))
        record = house.folder.read_record()
        assert record is not None
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for identity in (record.guardian, record.master):
                os.kill(identity.pid, number)
        eventually(lambda: tree.is_free(house.folder.lock_path))

        done = streamd(house, "kill", "--tree")

        assert done.returncode == 0 and "none left" in done.stdout, done.stdout + done.stderr
        assert not set(left) & set(running("\x00614\x00"))


def streamd(house: Tree, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line on this instance."""
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "STREAMD_APP": "proj",
        "STREAMD_RUNTIME_DIR": str(house.folder.path.parent),
        "STREAMD_DATADIR": str(house.place / "data"),
    }  # fmt: skip
    if words[0] == "kill":
        environment.pop("STREAMD_APP")
        words = (*words, "--name", "proj")
    return subprocess.run(
        [sys.executable, "-m", "streamd", *words],
        cwd=house.place, env=environment, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip


def test_children_that_ignore_every_signal_are_ended() -> None:
    with tree_of(DEAF_LEAVES) as house:
        house.run()
        eventually(lambda: "they run" in house.log)
        deaf = eventually(lambda: running("\x00612\x00"))

        report = tree.kill_tree(
            house.marker, house.folder.read_record(), house.folder.lock_path
        )

        assert report.is_complete
        assert not set(deaf) & set(running("\x00612\x00"))


def test_a_stop_ends_children_without_marker_session_and_lock() -> None:
    with tree_of(DEAF_LEAVES) as house:
        house.run()
        eventually(lambda: "they run" in house.log)
        deaf = eventually(lambda: running("\x00612\x00"))

        house.signal(signal.SIGTERM)

        assert house.wait_exit() == 0
        assert not set(deaf) & set(running("\x00612\x00"))


def test_kill_tree_in_a_shell_that_an_agent_started_survives_and_tells() -> None:
    with tree_of(SHELL) as house:
        house.run()
        told = house.place / "killed.txt"
        (house.place / "now").touch()

        eventually(lambda: told.exists() and told.read_text().endswith("\n0\n"), 15)

        assert "none left" in told.read_text()
        assert house.wait_exit() in (70, -signal.SIGKILL)
        assert house.survivors() == []


REUSE = """
import os, subprocess, sys, time
sys.path.insert(0, {root!r})
import msgspec
from streamd.instance import Identity, InstanceRecord, boot_id, identify
from streamd.supervisor import tree

old = subprocess.Popen(["sleep", "600"])
was = identify(old.pid)
record = InstanceRecord("proj", "proj", "proj", "start", "x" * 32, was, was, "", "", 0.0, "0")
old.kill()
old.wait()
time.sleep(0.03)  # another tick of the clock that start times are told in
for _ in range(200):
    with open("/proc/sys/kernel/ns_last_pid", "w") as file:
        file.write(str(was.pid - 1))
    new = subprocess.Popen(["sleep", "600"])
    if new.pid == was.pid:
        break
    new.kill()
    new.wait()
assert new.pid == was.pid, "the number did not come round"
report = tree.kill_tree("x" * 32, record, "/nonexistent/lock")
assert report.killed == [], report.killed
assert new.poll() is None, "a stranger was killed"
new.kill()
new.wait()
print("untouched")
"""


def have_namespaces() -> bool:
    done = subprocess.run(
        ["unshare", "-Urpf", "--mount-proc", "true"], stderr=subprocess.DEVNULL, check=False
    )
    return done.returncode == 0


@pytest.mark.skipif(not have_namespaces(), reason="needs user namespaces")
def test_a_pid_that_came_round_again_is_somebody_else() -> None:
    done = subprocess.run(
        ["unshare", "-Urpf", "--mount-proc", sys.executable, "-c",
         REUSE.format(root=str(ROOT))],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.stdout == "untouched\n", done.stderr


def test_a_stopped_guardian_is_woken_to_end_its_tree() -> None:
    with tree_of(IDLE) as house:
        house.run()
        house.signal(signal.SIGSTOP)

        report = tree.kill_tree(
            house.marker, house.folder.read_record(), house.folder.lock_path
        )

        assert report.is_complete
        assert house.wait_exit() == 70
