"""What holds before user code: limits, environment, folder, user; and memory that grows."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from supervisor_tree import Tree, eventually, tree_of

TELLS = """
import os, resource
import streamd
app = streamd.App("proj")

def told():
    return {
        "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "nproc": resource.getrlimit(resource.RLIMIT_NPROC)[0],
        "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "umask": open("/proc/self/status").read().partition("Umask:")[2].split()[0],
        "greeting": os.environ.get("GREETING"),
        "cwd": os.getcwd(),
        "ids": [os.getresuid(), os.getresgid(), os.getgroups()],
    }

at_import = told()

@app.task
async def tell():
    print("told", repr(at_import == told()), repr(told()))

@app.agent(nice=3)
async def polite(stream):
    async for _ in stream:
        pass
"""

GROWS = """
import asyncio
import streamd
app = streamd.App("proj", topic_partitions=2)
held = []

@app.agent(processes=2, max_memory=LIMIT)
async def grow(stream):
    async for _ in stream:
        pass

@app.task
async def idle():
    await asyncio.sleep(600)

import streamd.agentproc.process as process
before = process.Process._report

async def report(self):
    if self._plan.process.startswith("grow"):
        asyncio.get_running_loop().create_task(leak())
    await before(self)

async def leak():
    while True:
        held.append(bytearray(STEP))
        await asyncio.sleep(0.05)

process.Process._report = report
"""

LARGE_IMPORT = """
import asyncio
import streamd
app = streamd.App("proj", max_memory=40 * 2**20)
held = [bytes([number % 256]) * 4096 for number in range(25_000)]

@app.task
async def idle():
    print("holds", len(held))
    await asyncio.sleep(600)
"""

NOBODY = 65534


def may_mount() -> bool:
    """True for root who has all of root's rights."""
    if os.geteuid() != 0:
        return False
    return (
        subprocess.run(["unshare", "--mount", "true"], stderr=subprocess.DEVNULL).returncode
        == 0
    )


needs_root = pytest.mark.skipif(not may_mount(), reason="needs root")


def told(house: Tree) -> dict[str, Any]:
    """What the task has printed."""
    line = eventually(
        lambda: next((each for each in house.log.splitlines() if " told " in each), None), 10
    )
    same, _, values = str(line).partition(" told ")[2].partition(" ")
    assert same == "True", "it changed between the import and the task"
    return dict(eval(values))


def test_limits_variables_and_the_nice_value_hold_before_user_code() -> None:
    with tree_of(TELLS) as house:
        house.run(
            nofile=512,
            core_bytes=0,
            nice=2,
            env=["GREETING=hello world"],
            nproc=4_000,
            umask=0o27,
        )

        values = told(house)

        assert values["nofile"] == 512
        assert values["nproc"] == 4_000
        assert values["core"] == 0
        assert values["nice"] == 2
        assert values["umask"] == "0027"
        assert values["greeting"] == "hello world"
        assert values["cwd"] == str(house.place)
        assert os.getpriority(os.PRIO_PROCESS, house.pid("polite#0")) == 5
        assert os.getpriority(os.PRIO_PROCESS, house.pid("log")) == 2


def test_a_limit_that_cannot_be_set_ends_the_start_with_the_reason() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with tree_of() as house:
        house.start(nofile=hard + 2**40)

        error = house.wait_ready()["error"]

        assert error["exit_code"] == 4
        assert "the limit nofile=" in error["message"]


def test_a_user_that_does_not_exist_ends_the_start_with_the_reason() -> None:
    with tree_of() as house:
        house.start(user="nobody-of-this-name")

        error = house.wait_ready()["error"]

        assert error["exit_code"] == 78
        assert "names nobody: 'nobody-of-this-name'" in error["message"]


@needs_root
def test_the_rights_of_root_are_given_up_before_user_code() -> None:
    with tree_of(TELLS) as house:
        within = let_nobody_in(house)

        house.start(within=within, user=str(NOBODY))
        word = house.wait_ready()
        assert "ready" in word, word
        values = told(house)

        assert values["ids"][0] == (NOBODY,) * 3
        assert values["ids"][1] == (NOBODY,) * 3
        assert 0 not in values["ids"][2]
        for name in ("master", "zygote", "log", "app#0"):
            assert os.stat(f"/proc/{house.pid(name)}").st_uid in (NOBODY, 0)
            assert f"Uid:\t{NOBODY}\t{NOBODY}" in status_of(house.pid(name))
        assert house.folder.path.stat().st_uid == NOBODY
        assert (house.place / "data").stat().st_uid == NOBODY
        assert house.folder.control_path.stat().st_uid == NOBODY


@needs_root
def test_who_gave_up_his_rights_still_dies_with_the_master() -> None:
    with tree_of(TELLS) as house:
        house.start(within=let_nobody_in(house), user=str(NOBODY))
        assert "ready" in house.wait_ready()
        pids = [house.pid(name) for name in ("zygote", "app#0", "polite#0")]

        os.kill(house.pid("master"), signal.SIGKILL)

        eventually(lambda: not [pid for pid in pids if Path(f"/proc/{pid}").exists()], 5)
        assert house.wait_exit() == 70


@needs_root
def test_root_is_told_of_a_folder_that_everybody_can_write() -> None:
    with tree_of() as house:
        house.place.chmod(0o777)
        house.run()

        assert "which every user of this host can change" in house.log


def status_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def let_nobody_in(house: Tree) -> list[str]:
    """Let another user reach the app and Python; what to start the guardian within."""
    house.place.chmod(0o755)
    house.folder.path.parent.mkdir(exist_ok=True)
    house.folder.path.parent.chmod(0o711)
    (house.place / "data").mkdir()
    house.logfile.touch()
    for path in (house.place / "data", house.logfile):
        os.chown(path, NOBODY, NOBODY)
    closed = closed_folder(Path(os.path.realpath(sys.executable)))
    if closed is None:
        return []
    # In a mount namespace of its own the closed folder is open, and holds Python alone.
    inner = Path(os.path.realpath(sys.executable)).relative_to(closed).parts[0]
    script = (
        'set -e; keep=$(mktemp -d); mount --bind "$0/$1" "$keep"; '
        'mount -t tmpfs -o mode=755 none "$0"; mkdir "$0/$1"; mount --bind "$keep" "$0/$1"; '
        'umount "$keep"; rmdir "$keep"; shift; exec "$@"'
    )
    return ["unshare", "--mount", "sh", "-c", script, str(closed), inner]


def closed_folder(path: Path) -> Path | None:
    """The folder above `path` that other users cannot enter."""
    return next((each for each in path.parents if not each.stat().st_mode & 0o001), None)


def test_a_process_that_grows_is_drained_and_replaced_one_at_a_time() -> None:
    source = GROWS.replace("LIMIT", str(40 * 2**20)).replace("STEP", str(2**20))
    with tree_of(source) as house:
        house.run(option_memory_check="150ms")
        before = {name: house.pid(name) for name in ("grow#0", "grow#1", "app#0")}
        most_down = 0

        def both() -> bool:
            nonlocal most_down
            rows = [house.process(name) for name in ("grow#0", "grow#1")]
            most_down = max(most_down, sum(row["state"] != "RUNNING" for row in rows))
            return all(row["recycles"] for row in rows)

        eventually(both, 30)

        rows = {name: house.process(name) for name in before}
        assert most_down <= 1
        assert rows["grow#0"]["pid"] != before["grow#0"]
        assert rows["grow#0"]["restarts"] == 0
        assert rows["app#0"]["pid"] == before["app#0"]
        assert "was ended by" not in house.log
        assert "over its limit of 40.0 MiB" in house.log


def test_a_fresh_process_that_is_over_the_limit_is_not_replaced_again_and_again() -> None:
    source = GROWS.replace("LIMIT", str(2**20)).replace("STEP", "1")
    with tree_of(source) as house:
        house.run(option_memory_check="100ms")

        eventually(lambda: "replacing it does not help" in house.log, 30)

        recycles = [house.process(name)["recycles"] for name in ("grow#0", "grow#1")]
        before = len(house.ask("status")["history"])
        eventually(lambda: len(house.ask("status")["history"]) > before + 2, 10)
        assert [house.process(name)["recycles"] for name in ("grow#0", "grow#1")] == recycles
        assert max(recycles) <= 1


def test_a_fresh_process_of_a_large_import_is_not_replaced() -> None:
    with tree_of(LARGE_IMPORT) as house:
        pid = house.run(option_memory_check="100ms").pid("app#0")
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
        assert resident > 100 * 2**20

        # More than twenty looks: a process is replaced after two.
        before = len(house.ask("status")["history"])
        eventually(lambda: len(house.ask("status")["history"]) > before + 2, 10)

        row = house.process("app#0")
        assert (row["pid"], row["recycles"]) == (pid, 0)


@pytest.mark.parametrize("what", [resource.RLIMIT_NOFILE], ids=["open files"])
def test_a_start_that_finds_no_descriptor_waits_and_comes_right(what: int) -> None:
    with tree_of() as house:
        master = house.run().pid("master")
        app = house.pid("app#0")
        eventually(lambda: len(house.ask("status")["history"]) > 1)
        before = resource.prlimit(master, what)
        used = len(os.listdir(f"/proc/{master}/fd"))
        resource.prlimit(master, what, (used + 1, before[1]))
        os.kill(app, signal.SIGKILL)
        eventually(lambda: "Too many open files" in house.log, 10)

        resource.prlimit(master, what, before)

        row = eventually(lambda: running(house), 70)
        assert row["pid"] != app
        fds_after(master, used)


@needs_root
def test_a_start_that_may_not_fork_waits_with_the_reason_and_comes_right() -> None:
    with tree_of() as house:
        house.start(within=let_nobody_in(house), user=str(NOBODY))
        assert "ready" in house.wait_ready()
        zygote, app = house.pid("zygote"), house.pid("app#0")
        # Root is not asked; the user has processes by now.
        limit_processes(zygote, "0")
        os.kill(app, signal.SIGKILL)
        reason = "fork failed: Resource temporarily unavailable (EAGAIN)"
        eventually(lambda: reason in house.log, 10)
        eventually(lambda: house.process("app#0")["state"] == "BACKOFF", 10)

        limit_processes(zygote, limit_text(resource.getrlimit(resource.RLIMIT_NPROC)[0]))

        eventually(lambda: running(house), 70)
        assert house.pid("app#0") != app
        assert house.pid("zygote") == zygote


def limit_text(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


def limit_processes(pid: int, most: str) -> None:
    """Set the soft limit of a process that is nobody's, as its own user may."""
    subprocess.run(
        ["prlimit", "--pid", str(pid), f"--nproc={most}:"],
        user=NOBODY, group=NOBODY, extra_groups=[], check=True,
    )  # fmt: skip


def test_a_zygote_that_finds_no_descriptor_is_replaced_and_the_start_comes_right() -> None:
    with tree_of() as house:
        zygote, app = house.run().pid("zygote"), house.pid("app#0")
        hard = resource.prlimit(zygote, resource.RLIMIT_NOFILE)[1]
        # What it has it keeps; nothing more can be sent to it.
        resource.prlimit(zygote, resource.RLIMIT_NOFILE, (1, hard))

        os.kill(app, signal.SIGKILL)

        eventually(lambda: (running(house) or {"pid": app})["pid"] != app, 30)
        assert house.process("zygote")["pid"] != zygote
        assert "only 0 of 4 descriptors came with the order to fork app#0" in house.log
        assert "Traceback" not in house.log


def running(house: Tree) -> dict[str, Any] | None:
    row = house.process("app#0")
    return row if row["state"] == "RUNNING" else None


def fds_after(master: int, used: int) -> None:
    """Wait until the master has no more descriptors than before."""
    eventually(lambda: len(os.listdir(f"/proc/{master}/fd")) <= used, 10)
