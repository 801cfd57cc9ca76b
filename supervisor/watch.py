"""Finding processes that exist and do nothing: stopped, stuck, with a loop that does not turn.

A process that is only slow to start, or waits for what it asked for, is left alone: its loop
turns. What is found is named with the place where it hangs, killed, and counted as a crash.
"""

import logging
import signal

from streamd.instance import process_state
from streamd.supervisor import stacks
from streamd.supervisor.child import Child, Run
from streamd.supervisor.fleet import Fleet
from streamd.supervisor.policy import Ending
from streamd.supervisor.states import State

log = logging.getLogger(__name__)

HANG_DUMP_S = 0.5
HOLDER_S = 2.0  # a stopped process may hold up all writers that long


class Watch:
    """Looks at every process of a fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def look(self, now: float, *, was_late: bool) -> None:
        """Judge every process that runs; to be called some times a second.

        Args:
            was_late: The last look is too long ago for beats to mean anything.
        """
        for child in self._fleet.children.values():
            run = child.run
            if run is None or child.state is not State.RUNNING or run.killed_for is not None:
                continue
            if child.kind == "zygote":
                self._look_at_forks(child, now, was_late=was_late)
            elif run.hangs is not None and was_late:
                run.hangs.forgive(now)
            elif run.hangs is not None:
                beat = last_beat(child.kind, run, now)
                if run.hangs.is_hung(beat, now):
                    self._end(child, run, "its loop did not turn", now - beat)
        self._look_at_holder()

    def _look_at_forks(self, child: Child, now: float, *, was_late: bool) -> None:
        fleet = self._fleet
        oldest = fleet.oldest_fork(child)
        if oldest is None or fleet.settings is None:
            return
        if was_late:
            oldest.asked_at = now
        elif now - oldest.asked_at > fleet.settings.hang_limit_s:
            fleet.note("ERROR", f"{child} did not fork {oldest.child.name}; it is replaced")
            fleet.kill(child, "it did not fork")

    def _look_at_holder(self) -> None:
        """End a stopped process that has the turn to write to the log."""
        log_child = self._fleet.children.get("log")
        if log_child is None or log_child.run is None or log_child.run.log_state is None:
            return
        state = log_child.run.log_state
        for child in self._fleet.agents:
            run = child.run
            if run is None or run.pid != state.holder_pid or run.killed_for is not None:
                continue
            if state.holder_s > HOLDER_S and _state_of(run.pid) == "T":
                self._end(child, run, "it was stopped with the turn to write", state.holder_s)

    def _end(self, child: Child, run: Run, why: str, since_s: float) -> None:
        run.killed_for, run.killed_as = why, Ending.HANG
        self._fleet.spawn_task(self._name_and_kill(child, run, since_s), f"end {child.name}")

    async def _name_and_kill(self, child: Child, run: Run, since_s: float) -> None:
        state = _state_of(run.pid)
        dump = (await stacks.collect([child], HANG_DUMP_S)).get(child.name, "")
        if state == "T":
            reason = "it was stopped by a signal"
        elif where := stacks.guilty(dump):
            reason = f"it is in {where}"
        else:
            reason = f"its kernel state is {state}"
        self._fleet.note(
            "ERROR",
            f"{child} hangs: its loop has not turned for {since_s:.1f} s, {reason}; "
            "it is killed and restarted",
        )
        log.error("stacks of %s before it was killed:\n%s", child.name, dump)
        run.signal(signal.SIGKILL)


def last_beat(kind: str, run: Run, now: float) -> float:
    """When the process showed last that its loop turns, monotonic; 0.0: not yet."""
    if run.page is not None:
        return run.page.beat
    if kind == "log":
        # It tells its state each second.
        return run.heard_at
    if run.link is not None and run.link.pending_bytes == 0:
        # It takes the snapshot that is sent each second.
        run.taken_at = now
    return run.taken_at


def _state_of(pid: int) -> str:
    try:
        return process_state(pid)
    except ProcessLookupError:
        return "X"
