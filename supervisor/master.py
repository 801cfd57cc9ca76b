"""The master: one loop that obeys signals, looks after the processes, and tells how it goes.

Start: import the app → data directory and port → log and web → groups, sinks first → ready.
Stop: web → tasks and pages → groups, sources first → zygote → log → whatever is left.
A signal's handler only puts the signal into a queue; `handle_term` and the like carry it out.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec

import streamd
from streamd.errors import ConfigError, StreamdError
from streamd.failpoints import failpoint
from streamd.instance import Folder, InstanceRecord, StartSpec, identify
from streamd.link import Answer, Link
from streamd.supervisor import claims, limits, logpipe, policy, stacks, tree
from streamd.supervisor.changes import Change, Changes
from streamd.supervisor.child import Child
from streamd.supervisor.control import Control
from streamd.supervisor.fleet import Fleet
from streamd.supervisor.imports import ImportRefused
from streamd.supervisor.logs import open_logs, open_output
from streamd.supervisor.notify import Notify
from streamd.supervisor.policy import LateWatch
from streamd.supervisor.progress import Progress
from streamd.supervisor.recycling import Recycling
from streamd.supervisor.registry import Registry
from streamd.supervisor.settings import Settings
from streamd.supervisor.snapshot import Snapshots
from streamd.supervisor.states import State
from streamd.supervisor.strays import Strays
from streamd.supervisor.watch import Watch
from streamd.wire import Command, Hello, Snapshot

log = logging.getLogger(__name__)

TICK_S = 0.25
LATE_S = 1.0
SECOND_S = 1.0
WEB_GOODBYE_S = 1.0
COLD_S = 0.6  # for agent processes to end by QUIT
LAST_S = 0.4  # for the log to end by TERM, and for what was killed
UNKILLABLE_S = 2.0  # what has not ended by then, the kernel holds; the guardian waits on
PROGRESS_S = 5.0
STACKS_S = 0.7
EXTEND_S = 30.0

EXIT_WARM = 0
EXIT_COLD = 3
EXIT_BUG = 70

SIGNALS = ("TERM", "INT", "QUIT", "HUP", "USR1", "USR2", "TTIN", "TTOU", "CHLD", "CONT")


class Master:
    """One run of the master."""

    def __init__(
        self, spec: StartSpec, lock_fd: int, progress: Progress, environment: dict[str, str]
    ) -> None:
        self.folder = Folder(Path(spec.folder))
        self._tree_lock = claims.TreeLock(self.folder, lock_fd)
        self._listeners = claims.given_listeners(environment)
        self.registry = Registry()
        self.logs = open_logs(spec)
        self.fleet = Fleet(spec, self.folder, self.logs, self.registry, self._on_command)
        self.phase = "starting"  # "starting" | "running" | "stopping"
        self._spec = spec
        self._progress = progress
        self.notify = Notify(environment)
        self._control = Control(self)
        self._signals: deque[int] = deque()
        self._wake = asyncio.Event()
        self._work: asyncio.Task[None] | None = None  # the start, or the stop
        self._jobs: set[asyncio.Task[None]] = set()
        self._interrupts = 0
        self._log_problem: str | None = None  # that was told last
        self._exit_code: int | None = None
        self._has_lost_folder = False
        self._began_at = time.monotonic()
        self._late = LateWatch(LATE_S)
        self._watch = Watch(self.fleet)
        self._record = InstanceRecord(
            name=spec.name,
            app=spec.app,
            app_id="",
            mode=spec.mode,
            tree=spec.tree,
            guardian=identify(os.getppid()),
            master=identify(os.getpid()),
            datadir="",
            web="",
            started_at=time.time(),
            version=streamd.__version__,
            unit=systemd_unit() if "STREAMD_NOTIFY_FD" in environment else "",
            cgroup=environment.get("STREAMD_CGROUP", ""),
            workdir=spec.workdir,
            config_file=spec.config_file or "",
        )
        self.changes = Changes(self)
        self._recycling = Recycling(self.fleet, self.changes)
        self._strays = Strays(self.fleet)
        self.snapshots = self._make_snapshots("")

    @property
    def name(self) -> str:
        """The instance's name."""
        return self._spec.name

    @property
    def is_worker(self) -> bool:
        """True if all groups run in one process."""
        return self._spec.mode == "worker"

    # The loop.

    async def run(self) -> int:
        """Start, look after everything until told to stop, leave nothing; the exit code."""
        self._install_handlers()
        tree.become_subreaper()
        limits.warn_of_root(self._spec.workdir)
        self.folder.write_record(self._record)
        failpoint("master.locked")
        await self._control.serve()
        self._begin(self._start(), "start")
        loop = asyncio.get_running_loop()
        second_at = alive_at = self._began_at
        while self._exit_code is None:
            self._handle_signals()
            now = time.monotonic()
            late = self._late.was_late(now, time.clock_gettime(time.CLOCK_BOOTTIME))
            self._watch.look(now, was_late=late)
            if self.phase == "running":
                self._recycling.look(now)
            if now >= alive_at:
                alive_at = now + min(SECOND_S, self.notify.watchdog_s or SECOND_S)
                self.notify.alive()
            if now >= second_at:
                second_at = now + SECOND_S
                self._keep_lock()
                try:
                    self._each_second(now)
                except Exception:
                    # Figures are no reason to end a fleet that works.
                    log.exception("the state could not be told")
            tick = loop.call_later(TICK_S, self._wake.set)
            await self._wake.wait()
            tick.cancel()
            self._wake.clear()
        self._leave_nothing()
        return self._exit_code

    def _look_after_logs(self) -> None:
        self.logs.tell_repeats(time.time())
        problem, before = self.logs.problem, self._log_problem
        if problem != before:
            self._log_problem = problem
            if problem is not None:
                self.fleet.note("ERROR", "disk", problem)
            else:
                self.fleet.note("INFO", "disk", "the log is written again")

    def enqueue(self, number: int) -> None:
        """Take a signal; it is carried out by the loop."""
        if number != signal.SIGCHLD or number not in self._signals:
            # One look at the children sees all that ended: a hundred may end at once.
            self._signals.append(number)
        self._wake.set()

    def _install_handlers(self) -> None:
        loop = asyncio.get_running_loop()
        for name in SIGNALS:
            number = getattr(signal, f"SIG{name}")
            loop.add_signal_handler(number, self.enqueue, number)
        # The guardian has blocked them for the time until now.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def _handle_signals(self) -> None:
        while self._signals:
            name = signal.Signals(self._signals.popleft()).name.removeprefix("SIG")
            getattr(self, f"handle_{name.lower()}")()

    def _tell_systemd(self) -> None:
        sentence = self.snapshots.sentence(self.phase)
        if self.phase == "running" and not self.notify.is_ready and self._is_up():
            self.notify.ready(sentence)
        self.notify.status(sentence)
        if self.phase != "running" or not self.notify.is_ready or self.changes.is_reloading:
            self.notify.extend(EXTEND_S)

    def _is_up(self) -> bool:
        """True if every process runs, or has ended as its restart type says it may."""
        return all(
            child.state in (State.RUNNING, State.STOPPED)
            for child in self.fleet.children.values()
        )

    def _keep_lock(self) -> None:
        try:
            if self._tree_lock.keep():
                log.warning(
                    "%s was deleted, and made anew: without it a second start would not see "
                    "that this instance runs",
                    self.folder.lock_path,
                )
        except OSError as error:
            if not self._has_lost_folder:
                self._has_lost_folder = True
                log.error(
                    "the runtime folder %s is gone (%s): no command reaches this instance any "
                    "more; TERM to pid %d stops it",
                    self.folder.path,
                    error.strerror,
                    os.getppid(),
                )

    def _each_second(self, now: float) -> None:
        self._look_after_logs()
        self.fleet.sweep()
        self._strays.look(now)
        self.snapshots.tick(now)
        self.changes.follow_lag(now)
        self._tell_web()
        self.registry.commit()
        self._tell_systemd()

    def _tell_web(self) -> None:
        web = self.fleet.children.get("web")
        if web is not None and web.run is not None and web.run.link is not None:
            told = self.snapshots.build(self.phase, fresh=False)
            web.run.link.send(Snapshot(msgspec.json.encode(told)))

    # Signals.

    def handle_term(self) -> None:
        """Stop warm; again: say what drains."""
        if self.phase == "stopping":
            log.info("still stopping: %s", "; ".join(self.left()) or "almost done")
            return
        self._stop("stopping: what runs is finished first")
        self._begin(self._stop_warm(), "stop warm")

    def handle_int(self) -> None:
        """First: stop warm; second: stop cold. The guardian counts for itself."""
        self._interrupts += 1
        if self._interrupts == 1:
            self.handle_term()
        else:
            self.handle_quit()

    def handle_quit(self) -> None:
        """Stop cold: what runs is done again at the next start."""
        if self._work is not None and self._work.get_name() == "stop cold":
            return
        self._stop("stopping cold: events that run now will be done again")
        self._begin(self._stop_cold(EXIT_COLD), "stop cold")

    def handle_hup(self) -> None:
        """Read the code anew. One that comes while the instance stops is ignored."""
        try:
            self.changes.reload()
        except StreamdError as error:
            log.warning("HUP is ignored: %s", error)

    def handle_usr1(self) -> None:
        """Write the stacks of everything to the log."""
        self._do(self._log_stacks(), "stacks")

    def handle_usr2(self) -> None:
        """Open the log file anew."""
        try:
            self.logs.reopen()
        except OSError as error:
            log.error(
                "the log file cannot be opened anew: %s; the old one is written on",
                error.strerror,
            )
            return
        log.info("the log file was opened anew")

    def handle_ttin(self) -> None:
        """One process more for the group furthest behind."""
        self._change_by_signal("TTIN", self.changes.more, "no group can have more processes")

    def handle_ttou(self) -> None:
        """One process less for the group with most of them."""
        self._change_by_signal("TTOU", self.changes.fewer, "no group has more than one process")

    def _change_by_signal(
        self, name: str, change: Callable[[], Change | None], otherwise: str
    ) -> None:
        try:
            changed = change()
        except StreamdError as error:
            log.warning("%s is ignored: %s", name, error)
            return
        log.info("%s: %s", name, changed.what if changed is not None else otherwise)

    def handle_chld(self) -> None:
        """A child ended; known ones are seen through their pidfd."""
        self.fleet.sweep()

    def handle_cont(self) -> None:
        """The master was stopped: nobody's beat was looked at meanwhile."""
        self._watch.look(time.monotonic(), was_late=True)

    # Start.

    async def _start(self) -> None:
        try:
            await self._start_all()
        except StreamdError as error:
            failure = error
        except Exception as error:
            log.exception("the start failed")
            failure = StreamdError(f"{type(error).__name__}: {error}")
            failure.exit_code = EXIT_BUG
        else:
            return
        self.logs.flush(1.0)
        trace = failure.traceback if isinstance(failure, ImportRefused) else ""
        self._progress.tell_error(failure, trace)
        # In the foreground the error stands on the terminal already.
        told = self._spec.foreground and self._spec.logfile is None
        self._stop("the start failed" if told else f"the start failed: {failure}")
        self._begin(self._stop_cold(failure.exit_code), "stop cold")

    async def _start_all(self) -> None:
        fleet = self.fleet
        self._progress.tell("zygote", "starting", f"imports {self._spec.app}")
        fleet.start(fleet.children["zygote"])
        hello = await fleet.imports.code.imported
        settings = fleet.settings = Settings.of(hello)
        for warning in hello.warnings:
            log.warning("%s", warning)
        for group in hello.groups:
            log.info("group %s: %s (%s)", group.name, _count(group.processes), group.why)
        self._claim(hello, settings)
        failpoint("master.claimed")
        kept = _where_kept(hello, settings)
        log.info("%s runs %s on the %s", self._spec.name, hello.origin, kept)
        self._progress.tell(
            "zygote", "ready", f"{hello.origin}, {len(hello.groups)} groups, {kept}"
        )
        self._make_children(hello, settings)
        for kind in ("log", "web"):
            if kind in fleet.children:
                fleet.start(fleet.children[kind])
        # Made while the log starts, which takes as long as they do; they open it afterwards.
        agents = self._in_order(policy.start_order([group.name for group in hello.groups]))
        for child in agents:
            fleet.start(child)
        if "log" in fleet.children:
            await self._wait_log(fleet.children["log"])
        fleet.let_open()
        web = [child for child in fleet.children.values() if child.kind == "web"]
        await asyncio.gather(*(self._wait_ready(child) for child in (*web, *agents)))
        failpoint("master.before-ready")
        self.phase = "running"
        self.fleet.begin_jobs()
        self.changes.open()
        # Who was told that all is ready asks the stats page at once.
        self._tell_web()
        self._tell_systemd()
        self._progress.tell_ready(self._record.web)
        self.registry.note(
            "INFO",
            "start",
            f"started by {self._spec.mode}: pid {os.getpid()}, {len(fleet.children)} processes "
            f"after {self._progress.after_s:.1f} s",
        )
        where = f" {self._record.web}/" if self._record.web.startswith("http") else ""
        log.info(
            "%s is ready after %.1f s.%s %s",
            self._spec.name,
            self._progress.after_s,
            where,
            self.snapshots.sentence("running"),
        )
        give_back_memory()

    def _claim(self, hello: Hello, settings: Settings) -> None:
        if settings.broker.startswith("memory") and self._spec.mode != "worker":
            raise ConfigError(
                f"broker={settings.broker!r} keeps nothing and joins no processes: "
                "it is for tests",
                remedy="leave broker out, or name embedded:// or kafka://…; or use worker",
            )
        claims.claim_datadir(settings.datadir, self._spec.name)
        self.registry.open(settings.datadir / "registry.db")
        if not self._spec.foreground and self._spec.logfile is None:
            path = settings.datadir / "streamd.log"
            self.logs.move_to(open_output(self._spec, str(path)))
        web = ""
        if settings.web_enabled:
            listener = claims.take_web(self._listeners)
            if listener is not None:
                log.info("the web port is systemd's: %s", claims.url_of(listener))
            else:
                listener = claims.claim_port(settings.web_bind, settings.web_port)
            self.fleet.web_listener = listener
            web = claims.url_of(listener)
            self.fleet.gateway = claims.gateway_of(listener, settings.web_host)
        for name, needless in self._listeners.items():
            log.warning("the socket %r of systemd serves nothing here: it is closed", name)
            needless.close()
        self._listeners.clear()
        self._record = msgspec.structs.replace(
            self._record, app_id=hello.app_id, datadir=str(settings.datadir), web=web
        )
        self.folder.write_record(self._record)
        self.snapshots = self._make_snapshots(settings.broker)

    def _make_children(self, hello: Hello, settings: Settings) -> None:
        fleet = self.fleet
        if not settings.broker.startswith("memory"):
            fleet.add("log", "log")
        if self._spec.mode == "worker":
            fleet.add("app#0", "agent", "app")
        else:
            for group in hello.groups:
                for slot in range(group.processes):
                    fleet.add(f"{group.name}#{slot}", "agent", group.name)
        if settings.web_enabled:
            fleet.add("web", "web")

    def _in_order(self, groups: Sequence[str]) -> list[Child]:
        """The agent processes, group by group."""
        named = [child for group in groups for child in self.fleet.of_group(group)]
        return named + [child for child in self.fleet.agents if child not in named]

    async def _wait_log(self, child: Child) -> None:
        """Wait for the log; what is wrong with it ends the start, for somebody is there.

        One that was killed from outside is restarted, and waited for.
        """
        self._progress.tell(child.name, "starting")
        while child.state is not State.RUNNING:
            given_up = child.state in (State.BACKOFF, State.FATAL)
            if given_up or child.failing is not None or child.budget.crashes:
                raise _failure_of(child)
            await child.wait_change()
        self._tell_ready(child)

    async def _wait_ready(self, child: Child) -> None:
        """Wait for a process; one that crashes too often leaves the instance degraded.

        Raises:
            StreamdError: It says that it can never run.
        """
        self._progress.tell(child.name, "starting")
        state = await child.wait_state(State.RUNNING, State.FATAL, State.STOPPED)
        if state is State.RUNNING:
            self._tell_ready(child)
            return
        if state is State.STOPPED:
            # It has done what it was for; its restart type says that it stays so.
            self._progress.tell(child.name, "ended", child.last_exit or "")
            return
        self._progress.tell(child.name, "fatal", child.last_exit or "")
        if child.exit_code == 78:
            raise _failure_of(child)

    def _tell_ready(self, child: Child) -> None:
        partitions = self.fleet.owners.partitions(child.name)
        detail = f"pid {child.run.pid}" if child.run else ""
        if child.kind == "web":
            detail = self._record.web
        elif partitions:
            detail += f", partitions {' '.join(map(str, partitions))}"
        self._progress.tell(child.name, "ready", detail)

    # Stop.

    def _stop(self, why: str) -> None:
        if self.phase != "stopping":
            self.registry.note("INFO", "stop", why)
        self.phase = "stopping"
        self.fleet.restarting = False
        self.changes.give_up()
        self.notify.stopping()
        self._record = msgspec.structs.replace(self._record, stopping=True)
        with contextlib.suppress(OSError):  # the folder is gone; the lock tells the end
            self.folder.write_record(self._record)
        log.info("%s", why)

    async def _stop_warm(self) -> None:
        fleet = self.fleet
        grace_s = fleet.settings.grace_s if fleet.settings else COLD_S
        self._do(self._log_draining(), "log what drains")
        for canary in self._kind("canary"):
            fleet.stop(canary, signal.SIGKILL)
        try:
            async with asyncio.timeout(grace_s):
                await self._end_warm(self._kind("web"), WEB_GOODBYE_S)
                for rank in policy.stop_ranks(fleet.hello.groups if fleet.hello else []):
                    await self._end_warm(
                        [child for group in rank for child in fleet.of_group(group)]
                    )
                await self._end_warm(fleet.agents)
                failpoint("master.stopping")
                await self._end_warm(self._kind("zygote"))
                await self._end_warm(self._kind("log"))
                await fleet.wait_ended(fleet.children.values())
        except TimeoutError:
            log.warning(
                "the grace of %g s is over; ended cold, and done again at the next start: %s",
                grace_s,
                "; ".join(self.left()),
            )
            await self._stop_cold(EXIT_COLD)
            return
        self._exit_code = EXIT_WARM
        if fleet.ended_cold:
            log.warning(
                "killed while they stopped; what they worked on is done again: %s",
                ", ".join(fleet.ended_cold),
            )
            self._exit_code = EXIT_COLD
        self._wake.set()

    async def _end_warm(self, children: Sequence[Child], limit_s: float | None = None) -> None:
        for child in children:
            self.fleet.stop(child)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self.fleet.wait_ended(children)

    async def _stop_cold(self, exit_code: int) -> None:
        fleet = self.fleet
        for child in fleet.children.values():
            if child.kind == "agent":
                fleet.stop(child, signal.SIGQUIT)
            elif child.kind != "log":
                # Neither keeps anything.
                fleet.stop(child, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(COLD_S):
                await fleet.wait_ended(fleet.agents)
        deaf = [child for child in fleet.agents if child.run is not None]
        if deaf:
            log.warning("killed, since they did not end: %s", ", ".join(map(str, deaf)))
        for child in deaf:
            fleet.kill(child, "it did not end")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_S):
                await self._end_warm(self._kind("log"))
                await fleet.wait_ended(fleet.children.values())
        self._exit_code = exit_code
        self._wake.set()

    def _kind(self, kind: str) -> list[Child]:
        return [child for child in self.fleet.children.values() if child.kind == kind]

    def left(self) -> list[str]:
        """What still has to end, and what it works on."""
        return [
            child.name + (f" ({', '.join(child.run.draining)})" if child.run.draining else "")
            for child in self.fleet.children.values()
            if child.run is not None
        ]

    async def _log_draining(self) -> None:
        await asyncio.sleep(SECOND_S)
        while self._exit_code is None:
            log.info("stopping: still there: %s", "; ".join(self.left()))
            await asyncio.sleep(PROGRESS_S)

    def _leave_nothing(self) -> None:
        """Kill what is left, wait for it, and tidy the runtime folder up. Blocks."""
        self._control.close()
        strays = [str(stray) for stray in self.fleet.reaper.strays.values()]
        if strays:
            log.info("ending what processes left behind: %s", ", ".join(strays))
        self.fleet.reaper.forget_all()
        for found in tree.kill_children(UNKILLABLE_S):
            log.error(
                "UNKILLABLE: %d %s (%s)", found.pid, found.command, tree.held_in(found.pid)
            )
        logpipe.drain_all()
        for path in self.folder.path.iterdir():
            if path.is_socket():
                path.unlink(missing_ok=True)
        took_s = time.monotonic() - self._began_at
        self.registry.note("INFO", "stop", f"ended with {self._exit_code} after {took_s:.0f} s")
        self.registry.close(0.2)
        words = {EXIT_WARM: "warm", EXIT_COLD: "cold"}
        how = words.get(self._exit_code or 0, f"with exit code {self._exit_code}")
        log.info("%s stopped %s", self._spec.name, how)
        self.logs.flush(0.3)

    # What the verbs of `control` need.

    def snapshot(self) -> dict[str, Any]:
        """The state of this moment."""
        return self.snapshots.build(self.phase)

    async def restart(self, names: Sequence[str]) -> None:
        """Restart processes, one at a time; each must run before the next is touched.

        Raises:
            StreamdError: One did not come to run, or the instance is not up.
        """
        await self.changes.restart(names).wait()

    async def collect_stacks(self, names: Sequence[str] | None) -> dict[str, str]:
        """The stacks of these processes, or of all; process name → text."""
        blocks = {}
        if names is None or "master" in names:
            head = f"== master (pid {os.getpid()}): {self.phase}"
            blocks["master"] = f"{head}\n{stacks.own_stacks()}"
        children = [
            child
            for child in self.fleet.children.values()
            if names is None or child.name in names
        ]
        return blocks | await stacks.collect(children, STACKS_S)

    async def _log_stacks(self) -> None:
        for text in (await self.collect_stacks(None)).values():
            log.info("%s", text.rstrip())

    def _on_command(self, link: Link, command: Command) -> Answer:
        return self._control.carry_out(link, command)

    def _make_snapshots(self, broker: str) -> Snapshots:
        record = self._record
        fixed = {
            "name": record.name,
            "app": record.app,
            "pid": record.master.pid,
            "guardian_pid": record.guardian.pid,
            "mode": record.mode,
            "since": record.started_at,
            "web": record.web,
            "broker": broker.partition(":")[0],
            "datadir": record.datadir,
            "version": record.version,
        }
        return Snapshots(fixed, self.fleet, self.registry, self.changes, self.logs)

    # Tasks.

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Let the start or the stop be replaced by what is to be done now."""
        if self._work is not None and self._work is not asyncio.current_task():
            self._work.cancel()
        self._work = asyncio.get_running_loop().create_task(work, name=name)
        self._work.add_done_callback(self._work_done)

    def _work_done(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed; everything is killed", task.get_name(), exc_info=error)
            self._exit_code = EXIT_BUG
            self._wake.set()

    def _do(self, job: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(job, name=name)
        self._jobs.add(task)
        task.add_done_callback(self._job_done)

    def _job_done(self, task: "asyncio.Task[None]") -> None:
        self._jobs.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("%s: %s", task.get_name(), error)


def _failure_of(child: Child) -> StreamdError:
    failing = child.failing
    if failing is None:
        error = StreamdError(
            f"{child.name} {child.last_exit}",
            remedy="the lines above say more, or streamd logs",
        )
    else:
        error = StreamdError(failing.message, seen=failing.seen, remedy=failing.remedy)
    error.exit_code = failing.exit_code if failing else child.exit_code or 1
    return error


def _where_kept(hello: Hello, settings: Settings) -> str:
    """The broker, without its password, and the data directory, for people."""
    if settings.broker.startswith("embedded"):
        return f"embedded log in {settings.datadir}"
    broker = next((each.value for each in hello.settings_shown if each.name == "broker"), "")
    return f"broker {broker}, data directory {settings.datadir}"


def give_back_memory() -> None:
    """Let the system have what the imports and the start have freed: two megabytes."""
    with contextlib.suppress(AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)


def _count(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


def systemd_unit() -> str:
    """The unit that this process is in, "" if it is in none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            unit = line.rpartition("/")[2]
            if unit.endswith(".service"):
                return unit
    return ""
