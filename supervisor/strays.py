"""What processes leave behind: whose it is, and what is done about it.

A stray is an orphan that the master has adopted. One of a process that runs is that process's
own business. With the setting `strays` at "kill", one whose process has ended, or whose origin
cannot be told, is asked to end by TERM, and killed after the grace; with "keep" it lives as
long as the instance, which leaves nothing in either case.
"""

import os
import signal
from typing import TYPE_CHECKING

from streamd.supervisor.child import Run
from streamd.supervisor.reaper import Stray

if TYPE_CHECKING:
    from streamd.supervisor.fleet import Fleet

KEEP, KILL = "keep", "kill"


def is_from(stray: Stray, process: str, run: Run) -> bool:
    """True if the stray comes from this very run of a process.

    It is in the process's session, or has its name in its environment and is younger.
    """
    if stray.session == run.pid:
        return True
    # Of the same tick it is the run's before: a replacement is there in less than one, and
    # takes longer than that until user code runs.
    return stray.origin == process and stray.start_ticks > run.identity.start_ticks


class Strays:
    """Ends the strays of a fleet that nobody answers for."""

    def __init__(self, fleet: "Fleet") -> None:
        self._fleet = fleet
        self._asked: dict[int, float] = {}  # pid -> when it was asked to end; inf: killed

    def look(self, now: float) -> None:
        """Judge every stray that lives; to be called about once a second, after a sweep."""
        settings = self._fleet.settings
        if settings is None or settings.strays != KILL:
            return
        strays = self._fleet.reaper.strays
        self._asked = {pid: at for pid, at in self._asked.items() if pid in strays}
        for stray in strays.values():
            asked_at = self._asked.get(stray.pid)
            if asked_at is None and not self._is_answered_for(stray):
                self._asked[stray.pid] = now
                whose = f", which {stray.origin} left behind," if stray.origin else ""
                self._end(stray, signal.SIGTERM, f"{stray}{whose} is ended")
            elif asked_at is not None and now - asked_at > settings.grace_s:
                self._asked[stray.pid] = float("inf")
                text = f"{stray} did not end in {settings.grace_s:g} s: it is killed"
                self._end(stray, signal.SIGKILL, text)

    def _is_answered_for(self, stray: Stray) -> bool:
        return any(
            child.run is not None and is_from(stray, child.name, child.run)
            for child in self._fleet.children.values()
        )

    def _end(self, stray: Stray, number: int, text: str) -> None:
        self._fleet.note("WARNING", "stray", text, stray.origin)
        # It is a child of ours: its pid is nobody else's before it is reaped, by us.
        os.kill(stray.pid, number)
        os.kill(stray.pid, signal.SIGCONT)
