"""What processes use: CPU and memory, as the kernel tells it.

Read from /proc by hand and not through psutil: with a hundred processes the master would spend
ten times as long on it, and a megabyte. Nobody reads all of them each second: a look that was
not asked for reads a few, by turns.
"""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

READS = 8  # a look that nobody has asked for
PRIVATE_READS = 4  # a look; one that nobody has asked for does one
PRIVATE_EACH_S = 15.0

_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Figures:
    """The figures of the processes that were looked at last."""

    def __init__(self) -> None:
        self._cpu: dict[int, tuple[float, int]] = {}  # pid -> when read (monotonic), ticks
        self._private: dict[int, tuple[float, int]] = {}  # pid -> when read, bytes
        self._rows: dict[int, dict[str, Any]] = {}

    def look(self, pids: Iterable[int], *, fresh: bool) -> dict[int, dict[str, Any]]:
        """The figures of these processes; others are forgotten.

        Args:
            fresh: Read all of them anew.
        """
        wanted = list(pids)
        for gone in self._rows.keys() - set(wanted):
            for known in (self._rows, self._cpu, self._private):
                known.pop(gone, None)
        by_age = sorted(wanted, key=lambda pid: self._cpu.get(pid, (0.0, 0))[0])
        for pid in by_age if fresh else by_age[:READS]:
            self._read(pid)
        now = time.monotonic()
        old = [
            pid for pid in by_age if now - self._private.get(pid, (0.0, 0))[0] > PRIVATE_EACH_S
        ]
        for pid in old[: PRIVATE_READS if fresh else 1]:
            self._private[pid] = now, private_bytes(pid)
        for pid in wanted:
            if pid not in self._rows:
                self._read(pid)
            self._rows[pid]["private_bytes"] = self._private.get(pid, (0.0, 0))[1]
        return self._rows

    def _read(self, pid: int) -> None:
        now = time.monotonic()
        row = {"pid": pid, "cpu_percent": 0.0, "rss_bytes": 0, "private_bytes": 0}
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                # The command stands in parentheses and may hold anything.
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            fields = []
        if fields:
            ticks = int(fields[11]) + int(fields[12])
            read_at, before = self._cpu.get(pid, (now, ticks))
            span_s = now - read_at
            if span_s > 0.0:
                used_s = (ticks - before) / _TICKS_A_SECOND
                row["cpu_percent"] = round(100.0 * used_s / span_s, 1)
            row["rss_bytes"] = int(fields[21]) * _PAGE_BYTES
            self._cpu[pid] = now, ticks
        self._rows[pid] = row


def private_bytes(pid: int) -> int:
    """Memory that only this process has; up to 7 ms for a large one. 0: it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    private = [line.split()[1] for line in text.splitlines() if line.startswith("Private_")]
    return 1024 * sum(map(int, private))


def resident_bytes(pid: int) -> int:
    """All memory of a process, shared too: never less than what is private. 0: it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0
