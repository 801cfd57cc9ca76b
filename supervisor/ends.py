"""What becomes of a child that ended: started again at once or later, given up, or left alone.

Everything that a process has left behind is read before it is decided: its last words on its
link, its page, its stacks. The policy decides; this carries it out.
"""

import asyncio
import logging
import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from streamd.errors import StreamdError
from streamd.failpoints import failpoint
from streamd.instance import StartSpec
from streamd.supervisor import policy, stacks
from streamd.supervisor.child import Child, Run
from streamd.supervisor.logs import Logs
from streamd.supervisor.oom import KernelKills
from streamd.supervisor.policy import Ending, Exit, RestartType, Suspects
from streamd.supervisor.registry import Kind, Registry
from streamd.supervisor.states import Event, State
from streamd.wire import Plan

if TYPE_CHECKING:
    from streamd.supervisor.fleet import Fleet

log = logging.getLogger(__name__)

LAST_LINES = 10  # of the log of a process that is given up

OF_ENDING = {
    Ending.OUTSIDE: " from outside",
    Ending.OUT_OF_MEMORY: ": out of memory",
    Ending.EARLY: ", which nobody had asked it to",
}


class Ends:
    """The ends of a fleet's children.

    Attributes:
        suspects: Group -> the events that took it down.
    """

    def __init__(self, fleet: "Fleet", spec: StartSpec, logs: Logs, registry: Registry) -> None:
        self.suspects: dict[str, Suspects] = {}
        self._fleet = fleet
        self._spec = spec
        self._logs = logs
        self._registry = registry
        self._kernel_kills = KernelKills()
        self._together_over = asyncio.Event()  # no strategy restarts others with one that died
        self._together_over.set()

    def on_exit(self, child: Child, exit: Exit) -> None:
        assert child.run is not None
        child.run.pidfd = -1
        self._fleet.spawn_task(self._bury(child, child.run, exit), f"bury {child.name}")

    async def _bury(self, child: Child, run: Run, exit: Exit) -> None:
        if run.link is not None:
            # It has ended: whatever it has said is in the socket by now.
            await run.link.drain()
            self._fleet.runs.pop(run.link, None)
        failpoint("master.on-exit")
        child.run = None
        place = run.page.place if run.page is not None else None
        settled, uptime_s = run.settled, time.monotonic() - run.started_at
        stack = stacks.last_stack(run.dump.read()) if run.dump is not None else ""
        run.close()
        if child.kind == "zygote":
            self._fleet.imports.read_pending()
        if run.stats is not None:
            child.totals.add(run.stats)
        child.failing = run.failing or child.failing
        child.exit_code = exit.code if exit.code is not None else 128 + (exit.signal or 0)
        child.last_exit = str(exit) + (f" ({run.killed_for})" if run.killed_for else "")
        self._registry.ended(child.name, child.last_exit)
        if self._fleet.owners.drop(child.name):
            self._fleet.tell_owners()
        if child.state is State.STOPPING:
            child.move(Event.EXIT)
            log.info("%s (pid %d) %s", child.name, run.pid, child.last_exit)
            if (
                run.killed_as is Ending.HANG
                and child.kind == "agent"
                and not self._fleet.restarting
            ):
                self._fleet.ended_cold.append(child.name)
            return
        child.move(Event.EXIT)
        if (
            child.kind == "zygote"
            and not (code := self._fleet.imports.held_by(child)).imported.done()
        ):
            code.imported.set_exception(
                StreamdError(
                    f"the process that imports {self._spec.app} {child.last_exit} "
                    "before it was done"
                )
            )
        ending = run.killed_as or policy.classify(
            exit,
            out_of_memory=exit.signal == signal.SIGKILL
            and self._kernel_kills.take(time.monotonic()),
        )
        child.last_exit += OF_ENDING.get(ending, "")
        if ending is Ending.OUT_OF_MEMORY and not self._kernel_kills.is_sure:
            child.last_exit += "?"
        rehearsed = child.kind == "canary" and exit.code == 0
        level = logging.INFO if rehearsed else logging.WARNING
        log.log(level, "%s (pid %d) %s", child.name, run.pid, child.last_exit)
        if stack:
            where = stacks.guilty(stack) or "no Python code"
            log.error("%s ended in %s:\n%s", child.name, where, stack)
        if run.failing is not None:
            log.error("%s: %s", child.name, run.failing.message)
        if run.plan is not None and child.kind == "agent" and policy.is_crash(ending):
            self._suspect(child, run.plan, place)
        child.careful = policy.is_crash(ending) or (child.careful and settled == 0)
        if run.killed_as is Ending.HANG and child.kind != "zygote":
            child.hangs += 1
        who = f"{child.name} (pid {run.pid})"
        self.decide(child, ending, who=who, uptime_s=uptime_s, settled=settled)

    def decide(
        self, child: Child, ending: Ending, *, who: str, uptime_s: float, settled: int
    ) -> None:
        """Say what becomes of a child that ended; `who` names the process that it was."""
        if child.kind == "canary" or (
            child.kind == "zygote" and len(self._fleet.imports.codes) > 1
        ):
            child.move(Event.STOP)
            for code in self._fleet.imports.codes:
                if code.is_lost:
                    waiting, code.waiting = code.waiting, []
                    for each in waiting:
                        self._fleet.imports.fork_without(each, code)
            return
        decision = child.budget.decide(
            ending,
            now=time.monotonic(),
            uptime_s=uptime_s,
            settled=settled,
            random=random.random(),
            type=self.restart_type(child),
        )
        kind: Kind = "memory" if ending is Ending.OUT_OF_MEMORY else "restart"
        ended = f"{who} {child.last_exit}"
        if not self._fleet.restarting:
            child.move(Event.STOP)
        elif decision.done:
            child.move(Event.STOP)
            log.info("%s is not restarted: %s", child.name, decision.reason)
            text = f"{ended}; it is not restarted: {decision.reason}"
            self._registry.note("INFO", "exit", text, child.name)
        elif not decision.restart:
            self._give_up(child, decision, time.time() - uptime_s)
        elif (others := self._dying_with(child)) and self._together_over.is_set():
            child.move(Event.DELAY)
            self._together_over.clear()
            names = ", ".join(other.name for other in others)
            log.warning("%s died; restarted with it: %s", child.name, names)
            text = f"{ended}; restarted with it, since strategy says so: {names}"
            self._registry.note("WARNING", kind, text, child.name)
            self._fleet.spawn_task(
                self._restart_together(child, decision.delay_s),
                f"restart with {child.name}",
            )
        elif decision.delay_s == 0.0:
            text = f"{ended}; restarted at once: {decision.reason}"
            self._registry.note("WARNING", kind, text, child.name)
            child.restarts += 1
            self._fleet.start(child, Event.RESTART)
        else:
            text = f"{ended}; restarted in {decision.delay_s:.1f} s: {decision.reason}"
            self._registry.note("WARNING", kind, text, child.name)
            child.move(Event.DELAY)
            log.warning(
                "%s is restarted in %.1f s (%s)", child.name, decision.delay_s, decision.reason
            )
            self._call_at(child, decision.delay_s, self._retry)

    def _give_up(self, child: Child, decision: policy.Decision, since: float) -> None:
        child.move(Event.GIVE_UP)
        child.given_up_for = decision.reason
        lines = self._logs.select(
            lambda line: line.process == child.name, lines=LAST_LINES, since=since
        )
        child.last_lines = [line.text for line in lines]
        text = f"{child.name} is FATAL: {decision.reason}; last: {child.last_exit}"
        if child.last_lines:
            text += "\nits last lines:\n" + "\n".join(child.last_lines)
        self._fleet.note("ERROR", "fatal", text, child.name)
        retry_s = (
            self._fleet.settings.fatal_retry_s if self._fleet.settings is not None else 0.0
        )
        if decision.probe and retry_s > 0.0:
            self._call_at(child, retry_s, self._probe)

    def _call_at(
        self, child: Child, delay_s: float, then: Callable[[Child, float], None]
    ) -> None:
        child.retry_at = time.monotonic() + delay_s
        asyncio.get_running_loop().call_at(child.retry_at, then, child, child.retry_at)

    def _probe(self, child: Child, due: float) -> None:
        """Try once more what was given up."""
        if child.state is State.FATAL and child.retry_at == due and self._fleet.restarting:
            text = f"{child.name} was given up; it is tried once more"
            self._fleet.note("INFO", "restart", text, child.name)
            child.budget.probing = True
            child.restarts += 1
            self._fleet.start(child)

    def restart_type(self, child: Child) -> RestartType:
        """When a child is started again after it ended by itself."""
        group = self._fleet.group_info(child)
        return RestartType(group.restart) if group is not None else RestartType.PERMANENT

    def _dying_with(self, child: Child) -> list[Child]:
        """The other processes that are restarted when this one died, in order of the start."""
        if child.kind != "agent" or self._fleet.settings is None or self._fleet.hello is None:
            return []
        groups = policy.dies_with(
            self._fleet.settings.strategy,
            child.group,
            [group.name for group in self._fleet.hello.groups],
        )
        return [
            other
            for group in groups
            for other in self._fleet.of_group(group)
            if other is not child and other.state.has_process
        ]

    async def _restart_together(self, child: Child, delay_s: float) -> None:
        """End the others warm, sources first; then start all of them, sinks first."""
        assert self._fleet.settings is not None
        due = time.monotonic() + delay_s
        try:
            async with self._fleet.exchanging:
                # Looked at now: who held the lock may have changed what there is.
                others = self._dying_with(child)
                for other in reversed(others):
                    await self._fleet.end(other, self._fleet.settings.grace_s)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            async with self._fleet.exchanging:
                if self._fleet.restarting:
                    self._start_together(child, others)
        finally:
            self._together_over.set()

    def _start_together(self, child: Child, others: Sequence[Child]) -> None:
        assert self._fleet.hello is not None
        order = policy.start_order([group.name for group in self._fleet.hello.groups])
        there = [
            each for each in (child, *others) if self._fleet.children.get(each.name) is each
        ]
        for each in sorted(there, key=lambda each: order.index(each.group)):
            if each is child and each.state is State.BACKOFF:
                each.restarts += 1
                self._fleet.start(each, Event.RETRY)
            elif each.state is State.STOPPED:
                each.restarts += 1
                self._fleet.start(each)

    async def wait_together_over(self) -> None:
        """Wait until no strategy restarts others with one that died."""
        await self._together_over.wait()

    def _retry(self, child: Child, due: float) -> None:
        if child.state is State.BACKOFF and child.retry_at == due and self._fleet.restarting:
            child.restarts += 1
            self._fleet.start(child, Event.RETRY)

    def _suspect(self, child: Child, plan: Plan, place: policy.Place | None) -> None:
        group = child.group
        if place is not None and self._fleet.hello is not None:
            agents = {
                each.name: info.name
                for info in self._fleet.hello.groups
                for each in info.agents
            }
            group = agents.get(place[0], group)
        suspects = self.suspects.setdefault(group, Suspects())
        parked = suspects.on_death(place, careful=plan.careful)
        if parked is not None:
            child.budget.blame_event()
            self._fleet.note(
                "ERROR",
                "park",
                f"{parked.agent}: {parked.topic}[{parked.partition}]@{parked.position} took "
                f"its process down {parked.deaths} times: it goes to the dead letters",
                child.name,
            )
