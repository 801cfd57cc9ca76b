"""What people and signals change while an instance runs: restart, scale, reload.

One change at a time: another waits for its turn and says so. A change belongs to the master and
not to who asked for it: it goes on when the client goes away, and several may follow one.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from streamd.errors import StreamdError, UsageError
from streamd.supervisor import rolling, scaling
from streamd.supervisor.reload import Reload
from streamd.supervisor.scaling import AutoScale, Load
from streamd.supervisor.states import State
from streamd.wire import Hello

if TYPE_CHECKING:
    from streamd.supervisor.master import Master

log = logging.getLogger(__name__)

AUTO = "auto"
RELOADING = "reloading"


class Change:
    """One change: what it did, and how it ended."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.lines: list[str] = []
        self.result: Any = None
        self.error: StreamdError | None = None
        self.has_begun = False
        self.has_ended = False
        self._news = asyncio.Event()

    def say(self, line: str) -> None:
        """Tell a step."""
        log.info("%s: %s", self.what, line)
        self.lines.append(line)
        self._wake()

    def end(self, error: StreamdError | None = None) -> None:
        """It is over."""
        self.error, self.has_ended = error, True
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def follow(self) -> AsyncIterator[str]:
        """Yield every line, the first ones too, until it has ended.

        Raises:
            StreamdError: It failed.
        """
        told = 0
        while True:
            for line in self.lines[told:]:
                told += 1
                yield line
            if self.has_ended and told == len(self.lines):
                break
            await self._news.wait()
        if self.error is not None:
            raise self.error

    async def wait(self) -> Any:
        """Wait for its end; the result.

        Raises:
            StreamdError: It failed.
        """
        async for _ in self.follow():
            continue
        return self.result


class Changes:
    """The changes of one master."""

    def __init__(self, master: "Master") -> None:
        self._master = master
        self._fleet = master.fleet
        self._turn = asyncio.Lock()
        self._queue: list[Change] = []  # the first one is under way, or about to be
        self._tasks: set[asyncio.Task[None]] = set()
        self._autos: dict[str, AutoScale] | None = None  # groups that follow their lag
        self._sizes: dict[str, int] = {}  # groups that are to have another size soon
        self._settled = asyncio.Event()  # the start is over, well or not

    def open(self) -> None:
        """The instance has started: what waited may begin."""
        self._settled.set()

    def give_up(self) -> None:
        """The instance stops: nothing is changed any more."""
        self._settled.set()
        for task in self._tasks:
            task.cancel()

    @property
    def is_idle(self) -> bool:
        """True while nothing is changed, and nothing waits to be."""
        return not self._queue

    @property
    def is_reloading(self) -> bool:
        """True while a reload is under way."""
        return any(each.what == RELOADING and each.has_begun for each in self._queue)

    @property
    def sentence(self) -> str:
        """What is under way, "" if nothing is."""
        if not self._queue or not self._queue[0].has_begun:
            return ""
        change = self._queue[0]
        text = f"{change.what[:1].upper()}{change.what[1:]}"
        return f"{text}: {change.lines[-1]}." if change.lines else f"{text}."

    # What can be asked for.

    def restart(self, names: Sequence[str], *, is_told: bool = False) -> Change:
        """Restart processes, each once the one before it runs.

        Args:
            is_told: The history knows already why.

        Raises:
            StreamdError: The instance is not up.
        """
        self._refuse_unless_up("restarted")

        async def work(change: Change) -> list[str]:
            for name in names:
                child = self._fleet.children.get(name)
                if child is None:
                    change.say(f"{name} is not there any more")
                    continue
                if not is_told:
                    text = f"{child} is restarted: it was asked for"
                    self._master.registry.note("INFO", "restart", text, name)
                grace_s = rolling.grace_s(self._fleet)
                state = await self._fleet.restart(child, grace_s)
                if state is not State.RUNNING:
                    raise StreamdError(
                        f"{name} is {state.value} after its restart: {child.last_exit}",
                        remedy=f"streamd logs {name}",
                    )
            return list(names)

        return self._begin(f"restarting {', '.join(names)}", work)

    def scale(self, group: str, processes: int | str) -> Change:
        """Give a group so many processes, or let their number follow its lag ("auto").

        Raises:
            StreamdError: It cannot have so many, or the instance is not up.
        """
        self._refuse_unless_up("scaled")
        if self._master.is_worker:
            raise UsageError(
                "a worker runs all groups in one process",
                remedy="streamd start gives each group its processes",
            )
        hello = self._fleet.hello
        assert hello is not None
        if processes == AUTO:
            scaling.check_size(hello, group, 1)
            self._auto()[group] = AutoScale()
            change = Change(f"scaling {group}")
            change.result = len(self._fleet.of_group(group))
            change.say(f"{group} follows how far it is behind")
            change.end()
            return change
        assert isinstance(processes, int)
        scaling.check_size(hello, group, processes)
        if self._auto().pop(group, None) is not None:
            log.info("%s does not follow its lag any more: its size was set by hand", group)
        return self._resize(group, processes, f"scaling {group} to {processes}")

    def reload(self) -> Change:
        """Read the code anew; one that waits for its turn already is joined.

        Raises:
            StreamdError: The instance stops, or would lose what it holds.
        """
        if self._master.phase == "stopping":
            raise StreamdError(f"{self._master.name} is stopping: nothing is reloaded any more")
        settings = self._fleet.settings
        if settings is not None and settings.broker.startswith("memory"):
            raise StreamdError(
                "the broker memory:// keeps everything in the process that a reload replaces",
                remedy="stop and start, or use embedded://",
            )
        for change in self._queue:
            if change.what == RELOADING and not change.has_begun:
                change.say("another reload was asked for while this one waits: both are one")
                return change
        return self._begin(RELOADING, self._reload)

    def more(self) -> Change | None:
        """One process more for the group furthest behind; None: no group can have more."""
        load = scaling.next_to_grow(self._loads())
        return None if load is None else self.scale(load.group, load.processes + 1)

    def fewer(self) -> Change | None:
        """One process less for the group with most; None: all have one."""
        load = scaling.next_to_shrink(self._loads())
        return None if load is None else self.scale(load.group, load.processes - 1)

    def follow_lag(self, now: float) -> None:
        """Look at the groups that follow their lag; to be called once a second."""
        if self._queue or self._master.phase != "running" or self._master.is_worker:
            return
        hello = self._fleet.hello
        autos = self._auto()
        if hello is None or not autos:
            return
        leasts = {group.name: group.processes for group in hello.groups}
        cores = len(os.sched_getaffinity(0))
        for load in self._loads():
            if load.group not in autos:
                continue
            least = min(leasts[load.group], load.most)
            most = max(least, min(load.most, cores))
            step = autos[load.group].decide(load, least=least, most=most, now=now)
            if step is not None:
                self._master.registry.note(
                    "INFO",
                    "scale",
                    f"{load.group} follows its lag: {load.processes} -> {step.processes} "
                    f"processes ({step.reason})",
                )
                self._resize(
                    load.group, step.processes, f"scaling {load.group} to {step.processes}"
                )
                return

    def auto_groups(self) -> set[str]:
        """The groups whose processes follow their lag."""
        return set(self._auto())

    # How they are done.

    def _resize(self, group: str, processes: int, what: str) -> Change:
        async def work(change: Change) -> int:
            before = len(self._fleet.of_group(group))
            if before == processes:
                change.say(f"{group} has {_count(processes)} already")
                return processes
            how = (
                "shares its partitions"
                if self._fleet.members_share
                else ("is drained: its partitions are shared")
            )
            change.say(f"{group} {how} out anew")
            try:
                await rolling.resize(self._fleet, group, processes)
            except StreamdError as error:
                if not self._fleet.restarting:
                    raise
                change.say(f"{error}; back to {_count(before)}")
                await rolling.resize(self._fleet, group, before)
                raise StreamdError(
                    f"{group} has {_count(before)} as before: {error}",
                    seen=error.seen,
                    remedy=error.remedy,
                ) from error
            text = f"{group} has {_count(processes)}, had {before}"
            self._master.registry.note("INFO", "scale", text)
            change.say(f"{group} has {_count(processes)}, had {before}")
            return processes

        async def counted(change: Change) -> int:
            try:
                return await work(change)
            finally:
                if self._sizes.get(group) == processes:
                    del self._sizes[group]

        self._sizes[group] = processes
        return self._begin(what, counted)

    async def _reload(self, change: Change) -> str:
        master = self._master
        if master.phase != "running":
            raise StreamdError(f"{master.name} is {master.phase}: nothing is reloaded")
        before = self._fleet.hello
        master.notify.reloading()
        try:
            reload = Reload(self._fleet, alone=master.is_worker, say=change.say)
            processes = await reload.run()
        except StreamdError as error:
            master.registry.note("ERROR", "reload", f"reload: {error}")
            raise
        finally:
            if master.phase == "running":
                master.notify.reloaded(master.snapshots.sentence("running"))
        hello = self._fleet.hello
        assert before is not None and hello is not None
        self._take_autos(before, hello)
        for warning in hello.warnings:
            log.warning("%s", warning)
        text = f"{_count(processes)} run{'s' * (processes == 1)} the new code"
        master.registry.note("INFO", "reload", f"reloaded: {text}")
        return text

    def _begin(self, what: str, work: Callable[[Change], Awaitable[Any]]) -> Change:
        change = Change(what)
        if self._queue:
            change.say(f"waits until this is done: {self._queue[-1].what}")
        elif self._master.phase == "starting":
            change.say("waits until the start is done")
        self._queue.append(change)
        task = asyncio.get_running_loop().create_task(self._run(change, work), name=what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return change

    async def _run(self, change: Change, work: Callable[[Change], Awaitable[Any]]) -> None:
        try:
            await self._settled.wait()
            async with self._turn:
                change.has_begun = True
                change.result = await work(change)
        except asyncio.CancelledError:
            change.end(
                StreamdError(f"{self._master.name} is stopping; given up: {change.what}")
            )
        except StreamdError as error:
            log.error("%s: %s", change.what, error)
            change.end(error)
        except Exception as error:
            log.exception("%s failed", change.what)
            change.end(StreamdError(f"{change.what}: {type(error).__name__}: {error}"))
        else:
            change.end()
        finally:
            self._queue.remove(change)

    def _refuse_unless_up(self, done: str) -> None:
        if self._master.phase != "running":
            raise StreamdError(
                f"{self._master.name} is {self._master.phase}: nothing can be {done} now"
            )

    def _auto(self) -> dict[str, AutoScale]:
        hello = self._fleet.hello
        if self._autos is None and hello is not None:
            self._autos = {group.name: AutoScale() for group in hello.groups if group.auto}
        return self._autos if self._autos is not None else {}

    def _take_autos(self, before: Hello, now: Hello) -> None:
        """What was set by hand stays, unless the new code says something else than the old."""
        autos = self._auto()
        said_before = {group.name: group.auto for group in before.groups}
        for group in now.groups:
            if group.auto != said_before.get(group.name, False):
                if group.auto:
                    autos[group.name] = AutoScale()
                else:
                    autos.pop(group.name, None)
        for name in autos.keys() - {group.name for group in now.groups}:
            del autos[name]

    def _loads(self) -> list[Load]:
        """Every group that has agents, as it works now."""
        hello = self._fleet.hello
        if hello is None or self._master.is_worker:
            return []
        figures = self._master.snapshots.group_figures()
        return [
            Load(
                group.name,
                self._sizes.get(group.name, len(self._fleet.of_group(group.name))),
                scaling.most_processes(hello, group.name),
                *figures.get(group.name, (0, 0.0)),
            )
            for group in hello.groups
            if group.agents
        ]


def _count(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"
