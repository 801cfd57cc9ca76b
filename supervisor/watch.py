"""Finding processes that exist and do nothing: stopped, stuck, with a loop that does not turn.

What was killed and is still there, the kernel holds: it is UNKILLABLE, and told with the place.

A process that is only slow to start, or waits for what it asked for, is left alone: its loop
turns. What is found is named with the place where it hangs, killed, and counted as a crash.

Before its first `Ready` a process has `start_limit` for each sign of life: a turn of its loop,
another stage of its start. The zygote is not judged before that: an import may take long.
"""

import array
import fcntl
import logging
import signal
import termios
import time

from streamd.instance import process_state
from streamd.supervisor import stacks, tree
from streamd.supervisor.child import Child, Run
from streamd.supervisor.fleet import Fleet
from streamd.supervisor.policy import Ending, HangWatch
from streamd.supervisor.states import State

log = logging.getLogger(__name__)

HANG_DUMP_S = 0.5
STARTS_SOON = ("agent", "canary", "web")  # the log may check a large file first
UNKILLABLE_S = 5.0  # after KILL
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
            if run is None:
                continue
            if run.killed_at:
                self._look_at_killed(child, run, now)
            if run.killed_for is not None:
                continue
            drains = child.state is State.STOPPING and run.page is not None
            if child.state is State.RUNNING or drains:
                if child.kind == "zygote":
                    self._look_at_forks(child, now, was_late=was_late)
                elif run.hangs is not None and was_late:
                    run.hangs.forgive(now)
                elif run.hangs is not None:
                    if run.page is not None and run.hangs.is_clear(now):
                        # Reading a hundred pages each time would be half of idling.
                        continue
                    beat = last_beat(child.kind, run, now)
                    if run.hangs.is_hung(beat, now):
                        self._end(child, run, "its loop did not turn", now - beat)
            elif child.state is State.STARTING and child.kind in STARTS_SOON:
                self._look_at_start(child, run, now, was_late=was_late)
        self._look_at_holder()

    def _look_at_killed(self, child: Child, run: Run, now: float) -> None:
        if not run.held_in and now - run.killed_at > UNKILLABLE_S:
            run.held_in = tree.held_in(run.pid)
            self._fleet.note(
                "ERROR",
                "hang",
                f"{child} is UNKILLABLE: it was killed {now - run.killed_at:.0f} s ago and the "
                f"kernel holds it ({run.held_in}); it is replaced once it is let go",
                child.name,
            )

    def _look_at_start(self, child: Child, run: Run, now: float, *, was_late: bool) -> None:
        assert self._fleet.settings is not None
        if run.starts is None:
            run.starts = HangWatch(self._fleet.settings.start_limit_s)
        if was_late:
            run.starts.forgive(now)
            return
        alive = run.started_at
        if run.page is not None:
            alive = max(alive, run.page.beat, run.page.stage_since)
        if run.starts.is_hung(alive, now):
            self._end(
                child,
                run,
                "it gave no sign of life while it started",
                now - alive,
                told="it starts and has given no sign of life",
            )

    def _look_at_forks(self, child: Child, now: float, *, was_late: bool) -> None:
        fleet = self._fleet
        oldest = fleet.imports.oldest_fork(child)
        if oldest is None or fleet.settings is None:
            return
        if was_late:
            oldest.asked_at = now
        elif 0.0 < fleet.settings.hang_limit_s < now - oldest.asked_at:
            text = f"{child} did not fork {oldest.child.name}; it is replaced"
            fleet.note("ERROR", "hang", text, child.name)
            fleet.kill(child, "it did not fork")

    def _look_at_holder(self) -> None:
        """End a stopped process that has the turn to write to the log."""
        log_child = self._fleet.children.get("log")
        if log_child is None or log_child.run is None or log_child.run.log_state is None:
            return
        state = log_child.run.log_state
        if state.holder_s <= HOLDER_S:
            return
        for child in self._fleet.agents:
            run = child.run
            if run is None or run.pid != state.holder_pid or run.killed_for is not None:
                continue
            if _state_of(run.pid) == "T":
                self._end(child, run, "it was stopped with the turn to write", state.holder_s)

    def _end(
        self,
        child: Child,
        run: Run,
        why: str,
        since_s: float,
        *,
        told: str = "its loop has not turned",
    ) -> None:
        run.killed_for, run.killed_as = why, Ending.HANG
        text = f"{told} for {since_s:.1f} s"
        self._fleet.spawn_task(self._name_and_kill(child, run, text), f"end {child.name}")

    async def _name_and_kill(self, child: Child, run: Run, text: str) -> None:
        state = _state_of(run.pid)
        # A stopped process writes no stacks: there is nothing to wait for.
        dump_s = 0.0 if state == "T" else HANG_DUMP_S
        at = stacks.work_of(run.page, time.monotonic()) if run.page is not None else ""
        dump = (await stacks.collect([child], dump_s)).get(child.name, "")
        if state == "T":
            reason = "it was stopped by a signal"
        elif where := stacks.guilty(dump):
            reason = f"it is in {where}"
        else:
            reason = f"its kernel state is {state}"
        if at:
            reason += f", at {at}"
        then = "killed" if child.state is State.STOPPING else "killed and restarted"
        self._fleet.note(
            "ERROR",
            "hang",
            f"{child} hangs: {text}, {reason}; it is {then}",
            child.name,
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
    if run.link is not None and run.link.pending_bytes == 0 and unread_bytes(run) == 0:
        # It takes the snapshot that is sent each second.
        run.taken_at = now
    return run.taken_at


def unread_bytes(run: Run) -> int:
    """How much of what was sent to a process lies in the kernel, not read by it."""
    if run.link_fd < 0 or run.link is None or run.link.closed.is_set():
        return 0
    unread = array.array("i", [0])
    fcntl.ioctl(run.link_fd, termios.TIOCOUTQ, unread)
    return unread[0]


def _state_of(pid: int) -> str:
    try:
        return process_state(pid)
    except ProcessLookupError:
        return "X"
