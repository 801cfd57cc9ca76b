"""What many ends leave behind, and whether each is told right: short here, long in chaos.

Each function returns what is wrong, in sentences; nothing, if all is right.
"""

import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

from supervisor_tree import ROOT, Tree, eventually, tree_of

GROWTH_BYTES = 2 * 2**20


def crash_cycles(count: int) -> list[str]:
    """Let one process of an instance die so many times, each time once it runs."""
    with tree_of() as house:
        master = house.run().pid("master")
        parents = {master, house.pid("zygote"), house.pid("guardian")}
        _crash(house, 10)  # what is made once
        before = held_by(master)
        _crash(house, count)
        after = held_by(master)
        wrong = [f"zombie {pid}" for pid in zombies_of(parents)]
        wrong += [
            f"{name} of the master: {before[name]} before, {after[name]} after"
            for name in ("fds", "threads")
            if after[name] != before[name]
        ]
        if (grown := after["rss"] - before["rss"]) >= GROWTH_BYTES:
            wrong.append(f"the master grew by {grown} bytes")
        return wrong


def instant_exits(count: int, forks: str) -> list[str]:
    """Let so many processes end before anybody hears of them, forked "once" or "twice"."""
    source = INSTANT.format(root=str(ROOT), count=count, forks=forks)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source],
        capture_output=True, text=True, timeout=90 + count / 10, check=False,
    )  # fmt: skip
    expected = f"{count} exits, 0 wrong, 0 strays\n"
    return [] if done.stdout == expected else [done.stdout + done.stderr]


def _crash(house: Tree, count: int) -> None:
    for _ in range(count):
        pid = house.pid("app#0")
        os.kill(pid, signal.SIGKILL)
        eventually(partial(is_other, house, pid), 20)


def is_other(house: Tree, pid: int) -> bool:
    row = house.process("app#0")
    return bool(row["state"] == "RUNNING" and row["pid"] != pid)


def held_by(pid: int) -> dict[str, int]:
    """What a process has of the kernel's; once nothing of it is on its way any more."""

    def look() -> dict[str, int]:
        return {
            "fds": len(os.listdir(f"/proc/{pid}/fd")),
            "threads": len(os.listdir(f"/proc/{pid}/task")),
            "rss": int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096,
        }

    lowest = look()
    waited = threading.Event()
    for _ in range(20):
        waited.wait(0.02)
        now = look()
        lowest = {name: min(lowest[name], now[name]) for name in lowest}
    return lowest


def zombies_of(parents: set[int]) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] == "Z" and int(fields[1]) in parents:
            found.append(int(entry))
    return found


# As the zygote does it: the pid is told by a process that is not the child's parent, and the
# child may have ended long before that is read.
INSTANT = """
import asyncio, os, signal, socket, struct, sys
sys.path.insert(0, {root!r})
from streamd.agentproc import forking
from streamd.supervisor import tree
from streamd.supervisor.policy import Exit
from streamd.supervisor.reaper import Reaper

COUNT, FORKS = {count}, {forks!r}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT, signal.SIGHUP)

async def main():
    tree.become_subreaper()
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        for number in range(COUNT):
            middle = os.fork() if FORKS == "twice" else -1
            if middle <= 0:
                pid = os.fork() if middle == 0 else forking.fork_for_parent()
                if pid == 0:
                    if number % 3 == 0:
                        os.kill(os.getpid(), SIGNALS[number % len(SIGNALS)])
                    os._exit(number % 256)
                theirs.send(struct.pack("ii", number, pid))
                if middle == 0:
                    os._exit(0)
            if middle > 0:
                os.waitpid(middle, 0)
        os._exit(0)
    theirs.close()
    ours.setblocking(False)
    reaper, exits, done = Reaper(), {{}}, asyncio.Event()
    loop = asyncio.get_running_loop()
    buffer = b""

    def ended(number, exit):
        assert number not in exits, "told twice"
        exits[number] = exit
        if len(exits) == COUNT:
            done.set()

    def read():
        nonlocal buffer
        try:
            buffer += ours.recv(65536)
        except BlockingIOError:
            return
        while len(buffer) >= 8:
            number, pid = struct.unpack("ii", buffer[:8])
            buffer = buffer[8:]
            reaper.watch(pid, lambda exit, number=number: ended(number, exit))

    loop.add_reader(ours, read)
    async with asyncio.timeout(60):
        await done.wait()
    wrong = [
        (number, exit) for number, exit in exits.items()
        if exit != (Exit(None, int(SIGNALS[number % len(SIGNALS)])) if number % 3 == 0
                    else Exit(number % 256))
    ]
    print(len(exits), "exits,", len(wrong), "wrong,", reaper.reaped_strays, "strays")

asyncio.run(main())
"""
