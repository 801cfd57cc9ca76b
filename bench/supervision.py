"""What supervising costs, beside the supervisors that people use: one table, with ratios.

Every supervisor has so many children, one after another, on the same machine in the same run.
A figure of streamd ends when the process is ready, one of the others when it exists.
"""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from instance import private_bytes, shared_out_bytes
from supervisors import OTHERS, Kind, Other, Streamd, is_alive

EVENTS = 100  # for each agent that is to have worked
REST_S = 2.0  # reports of the last events are over then
STUCK = 3
GONE_S = 0.2  # after the death of the master


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    children: int
    singles: int  # children killed one after another
    kills: int  # of the master of streamd
    other_kills: int  # of the master of another
    idle_s: float


FULL = Size(children=100, singles=20, kills=20, other_kills=3, idle_s=10.0)
SMALL = Size(children=20, singles=5, kills=3, other_kills=1, idle_s=3.0)

Figures = dict[str, float | None]


@dataclass(frozen=True)
class Row:
    """A figure: its name, the text of a value, and what is aimed at."""

    key: str
    title: str
    show: Callable[[float], str]
    aim: float

    def text(self, value: float | None) -> str:
        """The value as text; "-" where the supervisor does not do it."""
        return "-" if value is None else self.show(value)


def ms(value: float) -> str:
    return f"{value * 1000:.0f} ms"


def seconds(value: float) -> str:
    return f"{value:.2f} s"


def mib(value: float) -> str:
    return f"{value / 2**20:.1f} MiB"


def percent(value: float) -> str:
    return f"{value:.2f} %"


def rows(size: Size) -> list[Row]:
    """The rows of the table; the aims are those for a hundred children."""
    n = size.children
    return [
        Row("one", f"one of {n} killed, replaced, p50", ms, 0.020),
        Row("all", f"{n} killed at once, all replaced", seconds, 1.0),
        Row("start", f"start of {n}", seconds, 0.6),
        Row("term", f"TERM of {n} idle", seconds, 0.3),
        Row("rss", "master: resident memory", mib, 25 * 2**20),
        Row("cpu", "master: CPU, idle", percent, 0.3),
        Row("private", "one more child, idle: private memory", mib, 3 * 2**20),
        Row("pss", "one more child, idle: PSS", mib, 3 * 2**20),
        Row("worked", f"one more child, {EVENTS} events: private", mib, 5e6),
        Row("alive", f"alive {GONE_S:g} s after kill -9 of the master", "{:.0f}".format, 0),
        Row("usr1", f"USR1, {STUCK} of {n} stuck: all stacks", seconds, 1.0),
    ]


def cpu_ns(pid: int) -> int:
    """CPU that all threads of a process have had; finer than the ticks of `stat`."""
    return sum(
        int(path.read_text().split()[0])
        for path in Path(f"/proc/{pid}/task").glob("*/schedstat")
    )


def resident_bytes(pid: int) -> int:
    """Resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(subject: Streamd | Other, size: Size) -> Iterator[tuple[str, float | None]]:
    """The figures of one supervisor, as they come; it is ended before this returns."""
    began_at = time.monotonic()
    subject.start()
    subject.wait_ready()
    yield "start", time.monotonic() - began_at
    # What a start leaves to do is not idling.
    time.sleep(2.0)
    yield "rss", float(resident_bytes(subject.master))
    before, began_at = cpu_ns(subject.master), time.monotonic()
    time.sleep(size.idle_s)
    spent_s = (cpu_ns(subject.master) - before) / 1e9
    yield "cpu", 100.0 * spent_s / (time.monotonic() - began_at)
    yield "private", float(median(private_bytes(pid) for pid in subject.children()))
    yield "pss", float(median(shared_out_bytes(pid) for pid in subject.children()))
    if subject.restarts:
        yield "one", median(replace(subject, 1) for _ in range(size.singles))
        yield "all", replace(subject, size.children)
    else:
        yield "one", None
        yield "all", None
    time.sleep(1.0)
    began_at = time.monotonic()
    subject.stop()
    yield "term", time.monotonic() - began_at


def replace(subject: Streamd | Other, count: int) -> float:
    """Kill so many children at once; how long until as many new ones are there, in seconds."""
    before = subject.children()
    chosen = sorted(before)[:count]
    time.sleep(0.1)
    began_at = time.monotonic()
    for pid in chosen:
        os.kill(pid, signal.SIGKILL)
    subject.wait_replaced(before, count)
    return time.monotonic() - began_at


def left_alive(subject: Streamd | Other, trials: int) -> float:
    """The children that live after a kill -9 of the master, at most, over some trials."""
    most = 0
    for _ in range(trials):
        subject.start()
        subject.wait_ready()
        children = subject.children()
        os.kill(subject.master, signal.SIGKILL)
        time.sleep(GONE_S)
        most = max(most, sum(map(is_alive, children)))
        subject.kill(children)
    return most


def memory_after_work(subject: Streamd) -> float:
    """Private memory of an agent that has settled events and rests, the median, in bytes."""
    subject.start()
    subject.wait_ready()
    subject.work(EVENTS)
    time.sleep(REST_S)
    children = subject.children()
    private = float(median(private_bytes(pid) for pid in children))
    subject.kill(children)
    return private


def time_stacks(subject: Streamd) -> float:
    """From USR1 to the stacks of all agents in the log, in seconds."""
    subject.start()
    subject.wait_ready()
    # Those that get stuck do so a second after they are ready.
    time.sleep(2.0)
    began_at = time.monotonic()
    subject.signal(signal.SIGUSR1)
    subject.wait_stacks()
    took_s = time.monotonic() - began_at
    subject.kill(subject.children())
    return took_s


def measure_streamd(size: Size) -> Iterator[tuple[str, float | None]]:
    """All figures of streamd."""
    with tempfile.TemporaryDirectory(prefix="sb-") as folder:
        yield from measure(Streamd(Path(folder), size.children), size)
        yield "worked", memory_after_work(Streamd(Path(folder), size.children))
        yield "alive", left_alive(Streamd(Path(folder), size.children), size.kills)
        yield "usr1", time_stacks(Streamd(Path(folder), size.children, stuck=STUCK))


def measure_other(kind: Kind, size: Size) -> Iterator[tuple[str, float | None]]:
    """All figures of one of the others; none has events, or shows what a stuck child does."""
    with tempfile.TemporaryDirectory(prefix="sb-") as folder:
        yield from measure(Other(kind, Path(folder), size.children), size)
        yield "alive", left_alive(Other(kind, Path(folder), size.children), size.other_kills)
        yield "worked", None
        yield "usr1", None


def run(*, small: bool = False) -> Iterator[str]:
    """Lines of the report: each figure as it comes, then the table."""
    size = SMALL if small else FULL
    table = rows(size)
    by_key = {row.key: row for row in table}
    yield f"supervision, {size.children} children each, {os.cpu_count()} cores"
    told: dict[str, Figures] = {}
    subjects = [("streamd", measure_streamd(size))]
    subjects += [(f"{kind.name} {kind.version}", measure_other(kind, size)) for kind in OTHERS]
    for name, figures in subjects:
        told[name] = {}
        for key, value in figures:
            told[name][key] = value
            yield f"  {name:18} {by_key[key].title:42} {by_key[key].text(value):>9}"
    yield ""
    yield from as_table(table, told)
    yield ""
    yield "  children: streamd an agent, ready; gunicorn a worker; the others `sleep`"
    yield "  ratio: the best of the others to streamd; above 1, streamd is better"


def as_table(table: list[Row], told: dict[str, Figures]) -> Iterator[str]:
    """A line for each figure: the aim, streamd, the others, and the ratio to their best."""
    head = "".join(f"{name.split()[0]:>11}" for name in told)
    yield f"  {'':42}{'aim':>9}{head}{'ratio':>8}"
    for row in table:
        values = [figures[row.key] for figures in told.values()]
        cells = "".join(f"{row.text(value):>11}" for value in values)
        yield f"  {row.title:42}{row.text(row.aim):>9}{cells}{ratio(values):>8}"


def ratio(values: list[float | None]) -> str:
    """How many times less the first value is than the least of the others."""
    ours, *others = values
    theirs = [value for value in others if value is not None]
    if not theirs or ours is None:
        return "-"
    if ours == 0:
        return "∞" if min(theirs) > 0 else "1.0"
    return f"{min(theirs) / ours:.1f}"
