"""Floods the log of a real tree with numbered lines, and accounts for each of them."""

import asyncio
import json
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from supervisor_tree import Tree, tree_of

from streamd.link import connect
from streamd.wire import Append, OutRecord

LINE_BYTES = 300  # of a line's text; the file has some more

SOURCE = """
import asyncio, json, logging, os, signal, subprocess, sys, time
import streamd
app = streamd.App("proj")
log = logging.getLogger("flood")

def say(name, number, prints):
    text = f"{name} {number} ".ljust(300, "x")
    print(text) if prints else log.info(text)

async def flood(name, order):
    begun = time.monotonic()
    for number in range(order["lines"]):
        say(name, number, order["prints"])
        if order["pause_s"] and number % 50 == 49:
            await asyncio.sleep(order["pause_s"])
    with open(f"done-{name}.new", "w") as file:
        file.write(str(time.monotonic() - begun))
    os.rename(f"done-{name}.new", f"done-{name}")
    if order["kill"]:
        os.kill(os.getpid(), signal.SIGKILL)
"""

AGENT = """
@app.agent(app.topic("NAME", value_type=dict, partitions=1), on_error="skip")
async def NAME(stream):
    async for order in stream:
        await flood("NAME", order)
"""

_NOTICE = re.compile(r"(\d+) log lines were dropped here: the log pipe was full")


def names(agents: int) -> list[str]:
    return [f"a{number}" for number in range(agents)]


def source(agents: int) -> str:
    """An app of agents that say what an order tells them to."""
    return SOURCE + "".join(AGENT.replace("NAME", name) for name in names(agents))


def order(
    house: Tree,
    who: list[str],
    lines: int,
    *,
    pause_s: float = 0.0,
    prints: bool = False,
    kill: bool = False,
) -> None:
    """Let agents say so many lines each; a pause follows each fifty."""
    told = {"lines": lines, "pause_s": pause_s, "prints": prints, "kill": kill}

    async def append() -> None:
        link = await connect(house.folder.log_path, "log")
        value = json.dumps(told).encode()
        await link.request(Append([OutRecord(name, None, value) for name in who]), 10.0)
        link.close()

    asyncio.run(append())


def took_s(house: Tree, name: str) -> float | None:
    """How long an agent has flooded; None while it does."""
    path = house.place / f"done-{name}"
    return float(path.read_text()) if path.exists() else None


def log_files(house: Tree) -> list[Path]:
    """The log's files, the oldest first."""
    path = house.logfile
    old = sorted(path.parent.glob(f"{path.name}.*"), key=lambda each: -int(each.suffix[1:]))
    return [*old, path]


@dataclass
class Account:
    """What the log's files hold of a flood."""

    arrived: Counter[str] = field(default_factory=Counter)  # agent -> its whole lines
    dropped: Counter[str] = field(default_factory=Counter)  # agent -> lines told as dropped
    mangled: list[str] = field(default_factory=list)
    out_of_order: int = 0

    def of(self, name: str) -> int:
        """Lines of an agent that are accounted for."""
        return self.arrived[name] + self.dropped[name]


def account(house: Tree) -> Account:
    """Look at every line of the log."""
    found = Account()
    last: dict[str, int] = {}
    for path in log_files(house):
        for line in path.read_text(errors="replace").splitlines():
            _, process, text = line[20:].lstrip().partition("#0  ")
            name = line[20:].split()[1].partition("#")[0] if process else ""
            if not re.fullmatch(r"a\d+", name):
                if "xxxxxx" in line:
                    found.mangled.append(line)
                continue
            if notice := _NOTICE.search(text):
                found.dropped[name] += int(notice[1])
                continue
            said, _, rest = text.partition(" ")
            number = rest.partition(" ")[0]
            if said != name or text != f"{name} {number} ".ljust(LINE_BYTES, "x"):
                if "x" * 20 in text:
                    found.mangled.append(line)
                continue
            found.arrived[name] += 1
            found.out_of_order += int(number) <= last.get(name, -1)
            last[name] = int(number)
    return found


@dataclass
class Flood:
    """What became of one flood."""

    lines: int
    account: Account
    took_s: float
    rss_before_bytes: int
    rss_most_bytes: int
    answer_most_s: float  # of `status`, meanwhile
    largest_file_bytes: int

    @property
    def mb_per_s(self) -> float:
        """Of lines that arrived."""
        return self.account.arrived.total() * LINE_BYTES / self.took_s / 1e6

    @property
    def problems(self) -> list[str]:
        """What must not be."""
        missing = self.lines - self.account.arrived.total() - self.account.dropped.total()
        grown_bytes = self.rss_most_bytes - self.rss_before_bytes
        return [
            *([f"{missing} lines are missing and were not told"] if missing else []),
            *(f"mangled: {line}" for line in self.account.mangled[:5]),
            *([f"{self.account.out_of_order} out of order"] * bool(self.account.out_of_order)),
            *([f"the master grew by {grown_bytes >> 20} MiB"] * (grown_bytes > 64 << 20)),
        ]

    def __str__(self) -> str:
        return (
            f"{self.lines * LINE_BYTES / 1e6:.0f} MB in {self.took_s:.1f} s: "
            f"{self.mb_per_s:.0f} MB/s arrived, {self.account.dropped.total()} of {self.lines} "
            f"lines dropped and told; master {self.rss_before_bytes >> 20} -> "
            f"{self.rss_most_bytes >> 20} MiB; status took {self.answer_most_s * 1000:.0f} ms "
            f"at most: {'; '.join(self.problems) or 'all accounted for'}"
        )


def flood(
    agents: int = 10,
    lines: int = 330_000,
    *,
    pause_s: float = 0.0,
    prints: bool = False,
    max_size_bytes: int = 64 << 20,
    keep: int = 1000,
) -> Flood:
    """Let every agent of an instance say so many lines at once; the default is 1 GB."""
    with tree_of(source(agents)) as house:
        house.run(option_hang_limit="0", log_max_size_bytes=max_size_bytes, log_keep=keep)
        who = names(agents)
        master = psutil.Process(house.pid("master"))
        before_bytes = most_bytes = master.memory_info().rss
        began_at = time.monotonic()
        answer_most_s = 0.0
        order(house, who, lines, pause_s=pause_s, prints=prints)
        deadline = began_at + 60.0 + agents * lines / 5000
        while any(took_s(house, name) is None for name in who):
            assert time.monotonic() < deadline, house.log[-2000:]
            asked_at = time.monotonic()
            house.ask("status")
            answer_most_s = max(answer_most_s, time.monotonic() - asked_at)
            most_bytes = max(most_bytes, master.memory_info().rss)
            time.sleep(0.1)
        took = time.monotonic() - began_at
        # What was dropped last is told before a process ends.
        house.signal(signal.SIGTERM)
        house.wait_exit(30.0)
        largest = max(path.stat().st_size for path in log_files(house))
        return Flood(
            agents * lines, account(house), took, before_bytes, most_bytes, answer_most_s,
            largest,
        )  # fmt: skip
