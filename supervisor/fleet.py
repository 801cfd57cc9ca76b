"""All processes of an instance: how each is started, what its messages and its end mean.

The order of a run: `start` → a process exists → it says `Ready` → it ends → `_on_exit` asks the
policy → `start` again, now or later, or never. Every step moves the child's state.
"""

import asyncio
import glob
import logging
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

from streamd.errors import StreamdError
from streamd.instance import Folder, StartSpec
from streamd.link import Answer, Link, LinkLost, adopt
from streamd.supervisor.child import Child, Run, identity_of, spawn
from streamd.supervisor.ends import Ends
from streamd.supervisor.imports import ZYGOTE, Imports
from streamd.supervisor.logpipe import LogPipe
from streamd.supervisor.logs import Logs
from streamd.supervisor.owners import OwnerMap
from streamd.supervisor.policy import Ending, HangWatch
from streamd.supervisor.reaper import Reaper
from streamd.supervisor.registry import Kind, Registry
from streamd.supervisor.settings import Settings
from streamd.supervisor.states import Event, State
from streamd.wire import (
    Begin,
    Command,
    Declare,
    Draining,
    Failing,
    GroupInfo,
    GroupPlan,
    Hello,
    Lags,
    Leave,
    LogState,
    Message,
    Note,
    Open,
    Owns,
    Plan,
    Ready,
    Site,
    Stats,
)

log = logging.getLogger(__name__)

LINK_BYTES = 4096
DECLARE_S = 30.0
OWNERS_S = 0.0005  # times the number of processes: how long changes of owners are gathered
OWNERS_MAX_S = 0.05
SILENCE_S = 3.0  # of who shows a sign of life each second: no shorter silence is a hang

KINDS = ("zygote", "log", "canary", "agent", "web")  # the order of the children


class Fleet:
    """The children of the master."""

    def __init__(
        self,
        spec: StartSpec,
        folder: Folder,
        logs: Logs,
        registry: Registry,
        on_command: Callable[[Link, Command], Answer],
    ) -> None:
        zygote = Child(ZYGOTE, "zygote")
        self.children: dict[str, Child] = {ZYGOTE: zygote}  # replaced whole at each change
        self.owners = OwnerMap()
        self.reaper = Reaper()
        self.imports = Imports(self, zygote, spec, logs)
        self.settings: Settings | None = None
        self.web_listener: socket.socket | None = None
        self.gateway = ""  # where other hosts reach the web process
        self.restarting = True  # False: what ends stays down
        self.ended_cold: list[str] = []  # agent processes that did not end by themselves
        self._spec = spec
        self._folder = folder
        self._logs = logs
        self._registry = registry
        self._on_command = on_command
        self._declared: Declare | None = None  # what the log was told last
        self.runs: dict[Link, tuple[Child, Run]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # Held by who ends processes to start others in their places: two of them at once would
        # wait for an end that the other has followed by a start already.
        self.exchanging = asyncio.Lock()
        self.ends = Ends(self, spec, logs, registry)
        self._operational = False  # the start is done: what runs by the clock runs
        self._log_is_there = False  # once; later it may be restarting
        self._owners_timer: asyncio.TimerHandle | None = None

    # What there is.

    @property
    def hello(self) -> Hello | None:
        """What the app is that runs; None: not known yet."""
        return self.imports.code.hello

    @property
    def agents(self) -> list[Child]:
        """The agent processes, in order of the data flow."""
        return [child for child in self.children.values() if child.kind == "agent"]

    def of_group(self, group: str) -> list[Child]:
        """The agent processes that are named after this group."""
        return [child for child in self.agents if child.group == group]

    def group_info(self, child: Child) -> GroupInfo | None:
        """What the app says about the group of an agent process; None: it runs all groups."""
        hello = self.imports.of(child).hello
        if child.kind != "agent" or hello is None or self._spec.mode == "worker":
            return None
        return next((group for group in hello.groups if group.name == child.group), None)

    def add(self, name: str, kind: str, group: str = "") -> Child:
        """Make a place for a process; it is STOPPED."""
        child = Child(name, kind, group)
        child.last_exit = self._registry.last_exits.get(name)
        self._arrange([*self.children.values(), child])
        return child

    def remove(self, child: Child) -> None:
        """Forget a place whose process has ended; its counters go to another of its group."""
        heir = next((each for each in self.of_group(child.group) if each is not child), None)
        if child.kind == "agent" and heir is not None:
            heir.totals.add(child.totals)
        path = self._folder.process_path(child.name)
        for socket_path in path.parent.glob(f"{glob.escape(path.name)}*"):
            socket_path.unlink(missing_ok=True)
        self._arrange([each for each in self.children.values() if each is not child])

    def rename(self, child: Child, name: str) -> None:
        """Call a child by another name, whatever it is doing."""
        child.name = name
        if child.run is not None:
            child.run.logs.process = name
        self._arrange(list(self.children.values()))

    def _arrange(self, children: list[Child]) -> None:
        """Keep the children in the order of the data flow, whenever each was added."""
        hellos = [code.hello for code in self.imports.codes if code.hello is not None]
        groups = [group.name for hello in hellos for group in hello.groups]

        def place(child: Child) -> tuple[int, int, int]:
            group = groups.index(child.group) if child.group in groups else 0
            slot = child.name.partition("#")[2]
            return KINDS.index(child.kind), group, int(slot or 0)

        self.children = {child.name: child for child in sorted(children, key=place)}

    # Starting.

    def start(self, child: Child, event: Event = Event.START) -> None:
        """Move a child to STARTING and make its process."""
        child.move(event)
        self.make(child)

    def make(self, child: Child) -> None:
        """Make the process of a child that is STARTING; no failure is raised here."""
        self.spawn_task(self._make(child), f"start {child.name}")

    async def _make(self, child: Child) -> None:
        try:
            match child.kind:
                case "zygote":
                    self.imports.start_zygote(child)
                case "log":
                    arguments = [str(self._datadir), str(self._folder.log_path)]
                    await self._start_linked(child, self._log_module(), arguments)
                case "web":
                    assert self.web_listener is not None
                    number = self.web_listener.fileno()
                    await self._start_linked(child, "streamd.webgw", [str(number)], keep=number)
                    self.greet_web()
                case "agent" | "canary":
                    await self.imports.fork(child)
        except OSError as error:
            self.start_failed(child, f"could not be started: {error.strerror}")

    async def _start_linked(
        self, child: Child, module: str, arguments: list[str], *, keep: int = -1
    ) -> None:
        ours, theirs = socket.socketpair()
        # So small that what is sent each second shows soon whether it is read.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LINK_BYTES)
        logs = LogPipe(child.name, self._logs)
        link_fd = ours.fileno()
        link = await adopt(ours, child.name, self.take)
        try:
            pid = spawn(["-m", module], arguments, theirs, logs, keep=keep)
        except OSError:
            link.close()
            logs.close()
            raise
        run = self.began(child, pid, logs)
        run.link, run.link_fd = link, link_fd
        assert self.settings is not None
        limit_s = self.settings.hang_limit_s
        run.hangs = HangWatch(max(limit_s, SILENCE_S) if limit_s > 0.0 else 0.0)
        self.runs[link] = (child, run)

    def plan(self, child: Child) -> Plan:
        """What an agent process, or a canary, is to run."""
        hello = self.imports.of(child).hello
        assert hello is not None
        alone = self._spec.mode == "worker" or child.kind == "canary"
        if alone:
            groups = [GroupPlan(group.name, 0, 1) for group in hello.groups]
            slot = 0
        else:
            slot = int(child.name.partition("#")[2])
            groups = [GroupPlan(child.group, slot, len(self.of_group(child.group)))]
        parked = [
            suspect
            for group in groups
            if group.group in self.ends.suspects
            for suspect in self.ends.suspects[group.group].parked
        ]
        return Plan(
            process=child.name,
            groups=groups,
            address=str(self._folder.process_path(child.name)),
            runtime_dir=str(self._folder.path),
            datadir=str(self._datadir),
            careful=child.careful,
            parked=parked,
            leader=slot == 0,
            alone=alone,
            canary=child.kind == "canary",
            waits=not self._operational,
            early=not self._log_is_there,
            gateway=self.gateway,
        )

    def greet(self, child: Child, run: Run) -> None:
        """Take up with an agent process, and tell it what has come about since its `plan`."""
        assert run.link is not None and run.plan is not None
        self.runs[run.link] = (child, run)
        run.link.send(self.owners.frame())
        if self._operational and run.plan.waits:
            # It was on its way when everything else ran.
            run.link.send(Begin())
        if self._log_is_there and run.plan.early:
            run.link.send(Open())

    def let_open(self) -> None:
        """The log is there: processes open it, those that wait for it and all later ones."""
        self._log_is_there = True
        for child in self.agents:
            if child.run is not None and child.run.link is not None:
                child.run.link.send(Open())

    def begin_jobs(self) -> None:
        """Everything runs: tasks, timers and cron jobs start, also those of later processes."""
        self._operational = True
        for child in self.agents:
            if child.run is not None and child.run.link is not None:
                child.run.link.send(Begin())

    def _log_module(self) -> str:
        return "streamd.agentproc.cluster" if self.members_share else "streamd.agentproc.log"

    @property
    def _datadir(self) -> Path:
        assert self.settings is not None
        return self.settings.datadir

    def began(self, child: Child, pid: int, logs: LogPipe) -> Run:
        """A child has a process.

        Raises:
            OSError: It cannot be watched.
        """
        logs.pid = pid
        pidfd = self.reaper.watch(pid, lambda exit: self.ends.on_exit(child, exit))
        run = Run(pid, pidfd, identity_of(pid), logs)
        child.run = run
        child.starts += 1
        self._registry.started(child.name, run.identity, child.restarts)
        if child.state is State.STOPPING:
            # Told to stop while it was being made.
            run.signal(signal.SIGTERM)
        return run

    def start_failed(self, child: Child, why: str) -> None:
        """A child has no process, for this reason: the policy decides."""
        log.warning("%s %s", child.name, why)
        child.last_exit = why
        if child.state is State.STOPPING:
            child.move(Event.EXIT)
            return
        child.move(Event.EXIT)
        self.ends.decide(child, Ending.DEPENDENCY, who=child.name, uptime_s=0.0, settled=0)

    # Messages.

    async def take(self, link: Link, message: Message) -> Answer:
        """What a process says."""
        if link not in self.runs:
            # The process was faster than the word of its birth.
            self.imports.read_pending()
        if link not in self.runs:
            return None
        child, run = self.runs[link]
        run.heard_at = time.monotonic()
        match message:
            case LogState():
                run.log_state = message
            case Lags():
                run.lags = message
            case Ready():
                if child.state is State.STARTING and child.kind == "log":
                    await self._declare(child, link)
                elif child.state is State.STARTING:
                    self.is_running(child)
            case Owns():
                self._on_owns(child, run, message)
            case Stats():
                run.stats = message
            case Note():
                kind: Kind = "hosts" if child.kind == "web" else "disk"
                self.note(message.level, kind, f"{child.name}: {message.text}", child.name)
            case Draining():
                run.draining = message.left
            case Failing():
                run.failing = message
            case Command():
                return self._on_command(link, message)
            case _:
                log.error("%s sent a %s", child, type(message).__name__)
        return None

    def _on_owns(self, child: Child, run: Run, owns: Owns) -> None:
        run.owns[owns.group] = owns
        assert run.plan is not None
        place = next(plan for plan in run.plan.groups if plan.group == owns.group)
        if self.owners.set(child.name, run.plan.address, place.slot, place.slots, owns):
            self.tell_owners()

    def is_running(self, child: Child) -> None:
        """A child that is STARTING has said that it is ready."""
        assert child.run is not None
        child.move(Event.READY)
        took_s = time.monotonic() - child.run.started_at
        log.info("%s is RUNNING after %.2f s", child, took_s)
        if child.starts > 1:
            # The first time, the instance tells for all of them.
            text = f"{child} runs again after {took_s:.2f} s"
            self._registry.note("INFO", "start", text, child.name)

    def tell_owners(self) -> None:
        """Send the map of owners to everybody who asks owners.

        The web process gets each change at once. Agent processes, which ask for tables alone,
        get what has changed in a short while in one piece: with a hundred of them, a start
        would be ten thousand frames.
        """
        web = self.children.get("web")
        if web is not None and web.run is not None and web.run.link is not None:
            web.run.link.send(self.owners.frame())
        if self._owners_timer is None and self.hello is not None and self.hello.tables:
            delay_s = min(OWNERS_MAX_S, OWNERS_S * len(self.children))
            loop = asyncio.get_running_loop()
            self._owners_timer = loop.call_later(delay_s, self._tell_agents_owners)

    def _tell_agents_owners(self) -> None:
        self._owners_timer = None
        frame = self.owners.frame()
        for child in self.agents:
            if child.run is not None and child.run.link is not None:
                child.run.link.send(frame)

    def greet_web(self) -> None:
        """Tell the web process what to serve."""
        web = self.children.get("web")
        if web is None or web.run is None or web.run.link is None or self.hello is None:
            return
        hello = self.hello
        web.run.link.send(
            Site(
                hello.app_id,
                self._spec.name,
                hello.routes,
                hello.tables,
                hello.settings,
                self.gateway,
                str(self._folder.path),
            )
        )
        web.run.link.send(self.owners.frame())

    async def declare(self, *hellos: Hello) -> None:
        """Let the log make what these name, and know who reads what.

        Raises:
            StreamdError: It refuses; nothing was made.
        """
        before, self._declared = self._declared, declaration(hellos)
        child = self.children.get("log")
        link = child.run.link if child is not None and child.run is not None else None
        if child is None or link is None or child.state is not State.RUNNING:
            return  # it is told when it is there
        try:
            await link.request(self._declared, DECLARE_S)
        except LinkLost:
            return
        except StreamdError:
            self._declared = before
            raise

    async def _declare(self, child: Child, link: Link) -> None:
        """Tell the log process the app's topics and tables; only then is it RUNNING."""
        if self._declared is None:
            assert self.hello is not None
            self._declared = declaration([self.hello])
        try:
            await link.request(self._declared, DECLARE_S)
        except LinkLost:
            return
        except StreamdError as error:
            child.failing = Failing(str(error), error.seen, error.remedy, error.exit_code)
            self.kill(child, str(error), Ending.PERMANENT)
            return
        if child.state is State.STARTING:
            self.is_running(child)

    def note(self, level: str, kind: Kind, text: str, process: str = "") -> None:
        """Add to the history, and to the log."""
        self._registry.note(level, kind, text, process)
        log.log(logging.getLevelNamesMapping().get(level.upper(), logging.INFO), "%s", text)

    # Stopping.

    def stop(self, child: Child, number: int = signal.SIGTERM) -> None:
        """Ask a child to end, warm by TERM or cold by QUIT; what has no process is STOPPED.

        A child that is asked already is asked again only to end colder.
        """
        if child.state in (State.BACKOFF, State.FATAL, State.EXITED):
            child.move(Event.STOP)
        elif child.state in (State.STARTING, State.RUNNING):
            child.move(Event.STOP)
            self.imports.forget(child)
        elif child.state is not State.STOPPING or number == signal.SIGTERM:
            return
        if child.run is None:
            return
        if not self.restarting:
            self.leave(child)
        if child.kind == "zygote" and self.imports.let_go(child) and number == signal.SIGTERM:
            number = signal.SIGCONT
        child.run.signal(number)

    def leave(self, child: Child) -> None:
        """Tell an agent process, before it is stopped, that it ends for good."""
        if child.kind == "agent" and child.run is not None and child.run.link is not None:
            child.run.link.send(Leave())
            child.run.link.flush()  # it is to come before the signal

    @property
    def members_share(self) -> bool:
        """True where a group's processes share its partitions out among themselves (Kafka)."""
        return self.settings is not None and self.settings.broker.startswith("kafka")

    def kill(self, child: Child, why: str, ending: Ending = Ending.HANG) -> None:
        """End a child's process now; `ending` is what the policy goes by."""
        if child.run is not None:
            child.run.killed_for, child.run.killed_as = why, ending
            child.run.signal(signal.SIGKILL)

    async def wait_ended(self, children: Iterable[Child]) -> None:
        """Wait until none of these has a process."""
        for child in list(children):
            await child.wait_state(State.STOPPED)

    async def restart(self, child: Child, grace_s: float) -> State:
        """End a child warm, start it, wait until it runs or cannot; the state it came to."""
        async with self.exchanging:
            await self.end(child, grace_s)
            if not self.restarting:
                return child.state
            self.start_anew(child)
        await self.ends.wait_together_over()
        return await child.wait_state(State.RUNNING, State.FATAL, State.BACKOFF, State.STOPPED)

    async def end(self, child: Child, grace_s: float) -> None:
        """End a child warm; after `grace_s` cold, then by KILL. It is STOPPED then."""
        for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGKILL):
            if number == signal.SIGKILL:
                self.kill(child, "it did not end")
            else:
                self.stop(child, number)
            try:
                async with asyncio.timeout(grace_s if number == signal.SIGTERM else 1.0):
                    await child.wait_state(State.STOPPED)
            except TimeoutError:
                continue
            return
        # The kernel does not let it go yet.
        await child.wait_state(State.STOPPED)

    def start_anew(self, child: Child) -> None:
        """Start a child with nothing held against it."""
        child.budget.forgive()
        child.careful = False
        child.failing = None
        self.start(child)

    # Looking after them.

    def sweep(self) -> None:
        """Reap adopted orphans that ended."""
        self.imports.read_pending()
        self.reaper.sweep(expecting=self.imports.are_forking)

    # Tasks.

    def spawn_task(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        """Let a coroutine run by itself; its failure is logged."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)


def declaration(hellos: Sequence[Hello]) -> Declare:
    """What the log is to make and know for all of these at once; the last word counts."""
    topics = {topic.name: topic for hello in hellos for topic in hello.topics}
    tables = {table.name: table for hello in hellos for table in hello.tables}
    groups = [group for hello in hellos for group in hello.groups]
    kept_s = hellos[-1].settings["topic_retention"]
    return Declare(
        list(topics.values()), list(tables.values()), groups, kept_s, hellos[-1].settings
    )
