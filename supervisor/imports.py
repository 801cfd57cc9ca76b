"""The imports of the app, the zygotes that hold them, and the forks that these are asked for.

`fork` asks for one → the zygote, or what it forked, says `Forked` → a process exists, and its
run begins. Where a zygote is lost meanwhile, its successor forks what is missing.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from streamd.errors import StreamdError
from streamd.failpoints import failpoint
from streamd.instance import StartSpec
from streamd.link import Link, adopt
from streamd.supervisor.child import Child, spawn
from streamd.supervisor.logpipe import LogPipe
from streamd.supervisor.logs import Logs
from streamd.supervisor.pages import BeatPage, DumpFile
from streamd.supervisor.policy import Ending, HangWatch
from streamd.supervisor.settings import Settings
from streamd.supervisor.states import Event, State
from streamd.supervisor.zygote import ZygoteLink
from streamd.wire import (
    Failing,
    Fork,
    Forked,
    ForkFailed,
    Hello,
    Import,
    ImportFailed,
    Message,
    Plan,
)

if TYPE_CHECKING:
    from streamd.supervisor.fleet import Fleet

log = logging.getLogger(__name__)

# Run by its path: a package that is imported first would make names before it does.
ZYGOTE_SCRIPT = Path(__file__).parent.parent / "agentproc" / "start.py"

ZYGOTE_END_S = 2.0
OOM_SCORE = 500  # of an agent process

ZYGOTE = "zygote"
NEXT_ZYGOTE = "zygote-new"  # while a reload is under way
LAST_ZYGOTE = "zygote-old"  # until it has ended


@dataclass(slots=True, eq=False)
class Code:
    """One import of the app, from which processes are forked, and the zygote that holds it.

    There are two only while a reload is under way.
    """

    child: Child
    imported: asyncio.Future[Hello]  # the first answer of the first zygote
    hello: Hello | None = None
    link: ZygoteLink | None = None
    waiting: list[Child] = field(default_factory=list)  # to be forked once the zygote is there

    @property
    def is_ready(self) -> bool:
        """True if the zygote forks now."""
        return self.link is not None and self.child.state is State.RUNNING

    @property
    def is_lost(self) -> bool:
        """True if the zygote ended and none will take its place."""
        return self.child.state is State.STOPPED


@dataclass(slots=True)
class PendingFork:
    """A fork that a zygote was asked for."""

    child: Child
    plan: Plan
    via: ZygoteLink
    link: Link
    logs: LogPipe
    page: BeatPage
    dump: DumpFile
    asked_at: float  # monotonic

    def close(self) -> None:
        self.link.close()
        self.logs.close()
        self.page.close()
        self.dump.close()


class Imports:
    """The zygotes of a fleet."""

    def __init__(self, fleet: "Fleet", zygote: Child, spec: StartSpec, logs: Logs) -> None:
        self.code = Code(zygote, asyncio.get_running_loop().create_future())  # that runs
        self.codes = [self.code]  # and, during a reload, the other one
        self._fleet = fleet
        self._spec = spec
        self._logs = logs
        self._ids = itertools.count(1)
        self._forks: dict[int, PendingFork] = {}  # asked for, not told yet

    def of(self, child: Child) -> Code:
        """What an agent process is forked from."""
        return child.code or self.code

    def held_by(self, zygote: Child) -> Code:
        """What a zygote has imported, or is to."""
        return next(code for code in self.codes if code.child is zygote)

    # A reload.

    def begin_beside(self) -> Code:
        """Begin to import the app anew, in a zygote beside the one that runs.

        Until `adopt` or `drop` no zygote is restarted: another import might be of another code.
        """
        child = self._fleet.add(NEXT_ZYGOTE, "zygote")
        code = Code(child, asyncio.get_running_loop().create_future())
        self.codes = [self.code, code]
        self._fleet.start(child)
        return code

    async def adopt(self, code: Code) -> None:
        """Run `code` from now on; the zygote of the other one ends."""
        assert code.hello is not None
        before, self.code = self.code, code
        for child in self._fleet.agents:
            child.code = None
        self._fleet.settings = Settings.of(code.hello)
        self._fleet.rename(before.child, LAST_ZYGOTE)
        self._fleet.rename(code.child, ZYGOTE)
        await self.drop(before)

    async def drop(self, code: Code) -> None:
        """End the zygote of an import that nothing is forked from any more."""
        fleet = self._fleet
        fleet.stop(code.child)
        try:
            async with asyncio.timeout(ZYGOTE_END_S):
                await code.child.wait_state(State.STOPPED)
        except TimeoutError:
            fleet.kill(code.child, "it did not end")
            await code.child.wait_state(State.STOPPED)
        fleet.remove(code.child)
        self.codes = [self.code]
        if self.code.is_lost and fleet.restarting:
            fleet.start(self.code.child)

    # Orders.

    def start_zygote(self, child: Child) -> None:
        """Make the process of a zygote, and let it import.

        Raises:
            OSError: It cannot be made.
        """
        code = self.held_by(child)
        ours, theirs = socket.socketpair()
        logs = LogPipe(child.name, self._logs)
        pid = spawn([str(ZYGOTE_SCRIPT)], [], theirs, logs)
        code.link = ZygoteLink(ours, partial(self._take, code), partial(self._on_lost, code))
        self._fleet.began(child, pid, logs)
        code.link.send(
            Import(
                self._spec.app,
                self._spec.options,
                self._spec.config_file,
                self._spec.mode == "worker",
            )
        )

    async def fork(self, child: Child) -> None:
        """Ask for an agent process, now or once its zygote is there.

        Raises:
            OSError: A descriptor that it needs cannot be had.
        """
        fleet = self._fleet
        with contextlib.ExitStack() as made:  # given back where the next cannot be made
            ours, theirs = socket.socketpair()
            made.callback(theirs.close)
            link = await adopt(ours, child.name, fleet.take)
            made.callback(link.close)
            code = self.of(child)
            if child.state is not State.STARTING:
                # Told to stop before there was anything to stop.
                child.move(Event.EXIT)
                return
            if not code.is_ready or code.link is None:
                if code.is_lost:
                    self.fork_without(child, code)
                else:
                    code.waiting.append(child)
                return
            logs = LogPipe(child.name, self._logs)
            made.callback(logs.close)
            page = BeatPage()
            made.callback(page.close)
            dump = DumpFile()
            made.callback(dump.close)
            id = next(self._ids)
            plan = fleet.plan(child)
            failpoint("master.before-fork")
            code.link.send(
                Fork(id, plan),
                id=id,
                descriptors=[theirs.fileno(), logs.write_end, page.fd, dump.fd],
            )
            self._forks[id] = PendingFork(
                child, plan, code.link, link, logs, page, dump, time.monotonic()
            )
            made.pop_all()
        theirs.close()
        logs.close_write_end()

    def fork_without(self, child: Child, code: Code) -> None:
        """Its code is gone with its zygote: take the new one, where that is the other."""
        if code is self.code and self.code is not self.codes[-1]:
            child.code = self.codes[-1]
            self._fleet.make(child)
        else:
            why = f"could not be forked: {code.child.name} has ended"
            self._fleet.start_failed(child, why)

    def forget(self, child: Child) -> None:
        """Fork it no more, if that is not asked for yet."""
        for code in self.codes:
            if child in code.waiting:
                code.waiting.remove(child)
                child.move(Event.EXIT)

    def let_go(self, zygote: Child) -> bool:
        """Close the link of a zygote that is idle: it ends by itself then. False: it is not."""
        code = self.held_by(zygote)
        is_idle = all(fork.via is not code.link for fork in self._forks.values())
        if code.link is None or code.hello is None or not is_idle:
            return False
        code.link.close()
        code.link = None
        return True

    # Answers.

    @property
    def are_forking(self) -> bool:
        """True while a process may exist that was not told of."""
        return bool(self._forks)

    def oldest_fork(self, zygote: Child) -> PendingFork | None:
        """The fork that a zygote has not made for the longest time, if there is one."""
        link = self.held_by(zygote).link
        forks = [fork for fork in self._forks.values() if fork.via is link]
        return min(forks, key=lambda fork: fork.asked_at, default=None)

    def read_pending(self) -> None:
        """Take what zygotes have said until now."""
        for code in self.codes:
            if code.link is not None:
                code.link.read_pending()

    def _take(self, code: Code, message: Message) -> None:
        match message:
            case Hello():
                self._on_hello(code, message)
            case ImportFailed():
                code.child.failing = Failing(
                    message.message, message.seen, message.remedy, message.exit_code
                )
                if not code.imported.done():
                    code.imported.set_exception(ImportRefused(message))
                else:
                    log.error(
                        "the app cannot be imported any more: %s; what runs goes on, what ends "
                        "cannot be restarted",
                        message.message,
                    )
            case Forked():
                self._on_forked(message)
            case ForkFailed():
                # A process that forks and was killed may have told before.
                if fork := self._forks.pop(message.id, None):
                    fork.close()
                    self._fleet.start_failed(fork.child, message.error)
            case _:
                log.error("the zygote sent a %s", type(message).__name__)

    def _on_hello(self, code: Code, hello: Hello) -> None:
        child = code.child
        if code.hello is not None and not is_same_app(code.hello, hello):
            child.failing = Failing(
                "the app on disk is not the one that runs: "
                "its groups, topics or tables changed",
                [],
                "streamd reload runs the new one",
                78,
            )
            log.error("%s; what ends cannot be restarted", child.failing.message)
            self._fleet.kill(child, "the app changed", Ending.PERMANENT)
            return
        if code.hello is None:
            code.hello = hello
        if child.state is State.STARTING:
            self._fleet.is_running(child)
        if not code.imported.done():
            code.imported.set_result(hello)
        waiting, code.waiting = code.waiting, []
        for each in waiting:
            self._fleet.make(each)

    def _on_forked(self, message: Forked) -> None:
        fork = self._forks.pop(message.id, None)
        if fork is None:
            return  # told by both sides of the fork
        failpoint("master.forked")
        try:
            run = self._fleet.began(fork.child, message.pid, fork.logs)
        except OSError as error:
            # Gone already, or no descriptor is left to watch it by: it is swept up.
            with contextlib.suppress(ProcessLookupError):
                os.kill(message.pid, signal.SIGKILL)
            fork.close()
            self._fleet.start_failed(fork.child, f"could not be watched: {error.strerror}")
            return
        run.link, run.page, run.dump, run.plan = fork.link, fork.page, fork.dump, fork.plan
        info = self._fleet.group_info(fork.child)
        yield_to_others(run.pid, info.nice if info is not None else 0)
        assert self._fleet.settings is not None
        run.hangs = HangWatch(self._fleet.settings.hang_limit_s)
        self._fleet.greet(fork.child, run)

    def _on_lost(self, code: Code, zygote: ZygoteLink) -> None:
        # What it had forked has told, as has who forked it: the link ends after their words.
        lost = [id for id, fork in self._forks.items() if fork.via is zygote]
        for id in lost:
            fork = self._forks.pop(id)
            fork.close()
            if fork.child.state is State.STARTING:
                code.waiting.append(fork.child)
            else:
                fork.child.move(Event.EXIT)
        if code.link is not zygote:
            return
        code.link = None
        if code.child.run is not None:
            # One that has lost its link is of no use, whatever it does.
            code.child.run.signal(signal.SIGTERM)


class ImportRefused(StreamdError):
    """The app cannot be imported."""

    def __init__(self, failed: ImportFailed) -> None:
        super().__init__(failed.message, seen=failed.seen, remedy=failed.remedy)
        self.exit_code = failed.exit_code
        self.traceback = failed.traceback


def is_same_app(before: Hello, now: Hello) -> bool:
    """True if a process of `now` can run beside those of `before`."""
    return all(
        msgspec.msgpack.encode(getattr(before, part))
        == msgspec.msgpack.encode(getattr(now, part))
        for part in ("app_id", "groups", "topics", "tables", "routes")
    )


def yield_to_others(pid: int, nice: int) -> None:
    """Let an agent process be ended before the master where memory is short, and give way."""
    with contextlib.suppress(OSError):
        path = Path(f"/proc/{pid}/oom_score_adj")
        if int(path.read_text()) < OOM_SCORE:
            path.write_text(str(OOM_SCORE))
    if nice:
        with contextlib.suppress(OSError):
            now = os.getpriority(os.PRIO_PROCESS, pid)
            os.setpriority(os.PRIO_PROCESS, pid, min(19, now + nice))
