"""How often the kernel has killed a process for lack of memory.

Where the instance is in a control group whose kills are counted, a kill was one of ours. The
count of the whole host is the last resort: then a kill at the same moment may be another's.
"""

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


OWED_S = 2.0  # an end is seen so soon after the kill; what is left then was no process of ours


class KernelKills:
    """The kills since this was made."""

    def __init__(self) -> None:
        self._path, self.is_sure = _source()
        self._seen = self._count()
        self._owed = 0  # kills whose processes have not been named
        self._owed_until = 0.0  # monotonic

    def take(self, now: float) -> bool:
        """True if a process that was ended by KILL may be one of the kernel's kills.

        Each kill is given once: of two processes that die at one moment, both have theirs.
        """
        before, self._seen = self._seen, self._count()
        if now > self._owed_until:
            self._owed = 0
        if self._seen > before:
            self._owed += self._seen - before
            self._owed_until = now + OWED_S
        if self._owed == 0:
            return False
        self._owed -= 1
        return True

    def _count(self) -> int:
        try:
            lines = self._path.read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _source() -> tuple[Path, bool]:
    """The file that counts the kills, the nearest first, and whether they are all ours."""
    groups = {}
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, folder = line.split(":", 2)
            for controller in controllers.split(","):
                groups[controller] = folder.lstrip("/")
    except OSError:
        groups = {}
    candidates = [
        CGROUP / groups.get("", "-") / "memory.events",
        CGROUP / "memory" / groups.get("memory", "-") / "memory.oom_control",
    ]
    for path in candidates:
        try:
            if "oom_kill " in path.read_text():
                return path, True
        except OSError:
            continue
    return Path("/proc/vmstat"), False
