"""USR1 with many processes: every stack, whole, soon, and nobody is disturbed."""

import os
import re
import signal
import time

from supervisor_tree import Tree, allowed_s, eventually, tree_of

# Some of them are stuck, each in another way; the others work.
MIXED = """
import asyncio, re, threading, time
import streamd
app = streamd.App("proj")
jobs = app.topic("jobs", value_type=str, partitions=COUNT)
done = app.topic("done", value_type=str, partitions=1)
lock = threading.Lock()

@app.agent(jobs, processes=COUNT)
async def work(stream):
    async for job in stream:
        if job == "gil":
            print("stuck", job)
            re.match(r"(a+)+$", "a" * 60 + "b")
        elif job == "sleep":
            print("stuck", job)
            time.sleep(600)
        elif job == "deadlock":
            print("stuck", job)
            with lock, lock:
                pass
        await done.send(value=job)

@app.agent(done)
async def see(stream):
    count = 0
    async for job in stream:
        count += 1
        print("seen", count)

@app.task
async def feed():
    for number, how in enumerate(("gil", "sleep", "deadlock")):
        await jobs.send(value=how, partition=number)
    while True:
        for partition in range(3, COUNT):
            await jobs.send(value="well", partition=partition)
        await asyncio.sleep(0.2)
"""

PROCESSES = 30
DUMPED = re.compile(r"^.*== (work#\d+) \(pid \d+\)", re.MULTILINE)


def seen(house: Tree) -> int:
    """How many jobs were done by the last word."""
    counts = re.findall(r"seen (\d+)", house.log)
    return int(counts[-1]) if counts else 0


def test_every_process_shows_its_stacks_in_a_second_also_those_that_are_stuck() -> None:
    dump_all(PROCESSES)


def dump_all(count: int) -> None:
    """Let three of so many processes be stuck, and look at the stacks of all."""
    with tree_of(MIXED.replace("COUNT", str(count))) as house:
        house.run(option_hang_limit="0")
        eventually(lambda: house.log.count("stuck ") == 3, 20)
        before = eventually(lambda: seen(house))
        began = time.monotonic()

        house.signal(signal.SIGUSR1)

        eventually(lambda: len(set(DUMPED.findall(house.log))) == count, 10)
        assert time.monotonic() - began < allowed_s(1.0)
        blocks = re.split(r"(?m)^.*?== (?=\S+ \(pid \d+\))", house.log)[1:]
        of_work = [block for block in blocks if block.startswith("work#")]
        stuck = [block for block in of_work if "its loop does not turn" in block]
        assert len(of_work) == count and len(stuck) == 3
        assert all("in work" in block for block in stuck)
        whole = [block for block in of_work if "-- end of tasks --" in block]
        assert len(whole) == count - 3
        eventually(lambda: seen(house) > before, 10)


def test_a_hundred_usr1_in_a_row_cost_nothing() -> None:
    with tree_of(MIXED.replace("COUNT", "4")) as house:
        master = house.run(option_hang_limit="0").pid("master")
        eventually(lambda: house.log.count("stuck ") == 3, 20)
        pids = {row["name"]: row["pid"] for row in house.ask("status")["processes"]}
        descriptors = {pid: held(pid) for pid in pids.values()}

        for _ in range(100):
            house.signal(signal.SIGUSR1)
            os.kill(master, signal.SIGUSR1)

        before = len(house.ask("status")["history"])
        eventually(lambda: len(house.ask("status")["history"]) > before + 2, 20)
        assert {r["name"]: r["pid"] for r in house.ask("status")["processes"]} == pids
        eventually(lambda: all(held(pid) <= count for pid, count in descriptors.items()), 10)


def held(pid: int) -> int:
    """How many descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))


SHOWS_SIGNALS = """
import signal, subprocess, threading, pathlib
import streamd
app = streamd.App("proj")

def show(who, text):
    for line in text.splitlines():
        if line.startswith(("SigBlk:", "SigIgn:")):
            print("signals of", who, *line.split())

@app.task
async def tell():
    show("process", pathlib.Path("/proc/self/status").read_text())
    show("child", subprocess.run(
        ["cat", "/proc/self/status"], capture_output=True, text=True).stdout)
    def of_thread():
        show("thread", pathlib.Path("/proc/thread-self/status").read_text())
    thread = threading.Thread(target=of_thread)
    thread.start()
    thread.join()
    print("shown")
"""

# What docs/internals.md names: INT; and PIPE, as Python has it.
IGNORED = {signal.SIGINT, signal.SIGPIPE}


def test_processes_their_threads_and_children_have_no_signal_blocked_and_few_ignored() -> None:
    with tree_of(SHOWS_SIGNALS) as house:
        house.run()
        eventually(lambda: "shown" in house.log)

        lines = re.findall(r"signals of (\w+) (\w+): (\w+)", house.log)

        assert {who for who, _, _ in lines} == {"process", "child", "thread"}
        for who, what, mask in lines:
            # glibc keeps two signals for its threads, and shows them to nobody.
            numbers = {n for n in signal.valid_signals() if int(mask, 16) >> (n - 1) & 1}
            assert numbers <= (IGNORED if what == "SigIgn" else set()), (who, what)


def test_a_signal_to_one_process_is_not_one_to_the_master() -> None:
    with tree_of() as house:
        app, master = house.run().pid("app#0"), house.pid("master")
        told = len(house.log)

        for name in ("INT", "CHLD", "CONT", "USR1", "WINCH"):
            os.kill(app, getattr(signal, f"SIG{name}"))
        before = len(house.ask("status")["history"])
        eventually(lambda: len(house.ask("status")["history"]) > before + 1, 10)
        assert house.pid("app#0") == app
        for name in ("TERM", "QUIT", "HUP", "USR2"):
            os.kill(app, getattr(signal, f"SIG{name}"))
            app = house.wait_other("app#0", app)

        assert house.pid("master") == master
        assert house.process("app#0")["restarts"] == 4
        said = house.log[told:]
        words = ("stopping", "eload", "the log file was opened", "TTIN", "== ")
        assert not [word for word in words if word in said], said
