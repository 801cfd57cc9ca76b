"""A reload: new code takes the place of the code that runs, with no event lost or done twice.

Import beside the old → compare → canary → declare → one process after the other, sinks first →
a look whether all do well → the old zygote ends. What goes wrong before the first process is
exchanged touches nothing; what goes wrong later is put back by the old zygote.
"""

import asyncio
import logging
from collections.abc import Callable

from streamd.errors import AppError, StreamdError
from streamd.supervisor import policy, rolling, scaling
from streamd.supervisor.child import Child
from streamd.supervisor.differences import changes, refuse_what_cannot_run_beside
from streamd.supervisor.fleet import Fleet
from streamd.supervisor.imports import Code
from streamd.supervisor.policy import Ending
from streamd.supervisor.states import State
from streamd.wire import Hello

log = logging.getLogger(__name__)

IMPORT_S = 300.0
CANARY_S = 60.0
SETTLE_S = 0.5  # the last process that was exchanged must do well for so long

CANARY = "canary"


class Reload:
    """One reload of a fleet.

    Args:
        alone: All groups run in one process (`worker`).
        say: Takes a line about each step.
    """

    def __init__(self, fleet: Fleet, *, alone: bool, say: Callable[[str], None]) -> None:
        assert fleet.hello is not None
        self._fleet = fleet
        self._alone = alone
        self._say = say
        self._old = fleet.imports.code
        self._before: Hello = fleet.hello
        self._sizes = {} if alone else {
            group.name: len(fleet.of_group(group.name)) for group in self._before.groups
        }  # fmt: skip
        self._touched: list[str] = []  # groups in which processes were exchanged or started
        self._exchanged: list[Child] = []
        self._well: set[Child] = set()  # ran before they were exchanged

    async def run(self) -> int:
        """Do it; how many processes run the new code.

        Raises:
            StreamdError: The old code runs; the text says why.
        """
        fleet = self._fleet
        self._say("importing the new code beside the old")
        code = fleet.imports.begin_beside()
        try:
            hello = await self._import(code)
            refuse_what_cannot_run_beside(self._before, hello)
            for line in changes(self._before, hello) or ["nothing was added or removed"]:
                self._say(line)
            await self._rehearse(code)
            await fleet.declare(self._before, hello)
        except Exception:
            await fleet.imports.drop(code)
            raise
        try:
            await self._exchange(code, hello)
            await self._settle()
        except Exception as error:
            log.error("the reload is taken back: %s", error)
            raise await self._put_back(code, hello, error) from error
        await self._adopt(code, hello)
        return len(self._exchanged)

    # Before anything is touched.

    async def _import(self, code: Code) -> Hello:
        try:
            async with asyncio.timeout(IMPORT_S):
                return await asyncio.shield(code.imported)
        except TimeoutError:
            raise AppError(
                f"the new code was not imported after {IMPORT_S:g} s; nothing was touched"
            ) from None
        except StreamdError as error:
            failed = AppError(
                f"the new code cannot be imported: {error}; nothing was touched",
                seen=[*error.seen, *getattr(error, "traceback", "").splitlines()],
                remedy=error.remedy,
            )
            raise failed from error

    async def _rehearse(self, code: Code) -> None:
        """Fork the canary: one process that opens what all of them will open."""
        fleet = self._fleet
        self._say("the canary opens the stores with the new code")
        canary = fleet.add(CANARY, "canary")
        canary.code, canary.exit_code, canary.last_exit = code, -1, "did not start"
        fleet.start(canary)
        try:
            async with asyncio.timeout(CANARY_S):
                await canary.wait_state(State.STOPPED)
        except TimeoutError:
            fleet.kill(canary, f"it was not ready after {CANARY_S:g} s", Ending.PERMANENT)
            await canary.wait_state(State.STOPPED)
        fleet.remove(canary)
        if canary.exit_code != 0:
            failing = canary.failing
            raise AppError(
                "the canary of the new code failed: "
                f"{failing.message if failing else f'it {canary.last_exit}'}; "
                "nothing was touched",
                seen=failing.seen if failing else (),
                remedy=(failing and failing.remedy) or f"streamd logs {CANARY}",
            )

    # One process after the other.

    async def _exchange(self, code: Code, hello: Hello) -> None:
        fleet = self._fleet
        for group in policy.start_order([group.name for group in hello.groups]):
            children = fleet.of_group(group)
            size = self._size_of(group, hello)
            if self._alone or len(children) == size:
                for child in children:
                    await self._replace(child, code)
            else:
                self._touched.append(group)
                self._well.update(child for child in children if child.state is State.RUNNING)
                self._say(f"{group}: {len(children)} -> {size} processes")
                await rolling.resize(fleet, group, size, code)
                self._exchanged += fleet.of_group(group)

    async def _replace(self, child: Child, code: Code) -> None:
        if child.group not in self._touched:
            self._touched.append(child.group)
        if child.state is State.RUNNING:
            self._well.add(child)
        self._exchanged.append(child)
        await rolling.replace(self._fleet, child, code)
        # Also those of before: no other is touched while one is missing.
        await rolling.wait_ready(self._fleet, self._exchanged)
        done = sum(each.code is code for each in self._fleet.agents)
        self._say(f"{done} of {len(self._fleet.agents)} processes run the new code")

    def _size_of(self, group: str, hello: Hello) -> int:
        """What was set by `scale` stays, unless the code now says another number."""
        said = {each.name: each.processes for each in hello.groups}[group]
        said_before = {each.name: each.processes for each in self._before.groups}.get(group)
        size = said if said != said_before else self._sizes.get(group, said)
        return min(size, max(1, scaling.most_processes(hello, group)))

    async def _settle(self) -> None:
        deadline = asyncio.get_running_loop().time() + SETTLE_S
        while (left_s := deadline - asyncio.get_running_loop().time()) > 0:
            await rolling.wait_ready(self._fleet, self._exchanged)
            await asyncio.sleep(min(0.1, left_s))
        await rolling.wait_ready(self._fleet, self._exchanged)

    # The end, either way.

    async def _adopt(self, code: Code, hello: Hello) -> None:
        fleet = self._fleet
        kept = {group.name for group in hello.groups}
        if not self._alone:
            gone = [group.name for group in self._before.groups if group.name not in kept]
            for group in policy.stop_order(gone):
                self._say(f"{group} is drained and ends")
                await rolling.dismiss(fleet, group)
        await fleet.imports.adopt(code)
        fleet.greet_web()
        try:
            await fleet.declare(hello)
        except StreamdError as error:
            # It has made all of it already; only what nobody reads any more stays noted.
            log.warning("the log was not told of the reload: %s", error)

    async def _put_back(self, code: Code, hello: Hello, error: Exception) -> StreamdError:
        """Let the old code run again wherever it ran; what to tell."""
        fleet = self._fleet
        if not fleet.restarting:
            return StreamdError("the instance stops: the reload was given up")
        if self._old.child.state in (State.STOPPED, State.FATAL):
            await self._adopt(code, hello)
            return self._told(error, "the old code ended with its zygote: the new code stays")
        self._say(f"the reload failed: {error}")
        for group in reversed(self._touched):
            before = self._sizes.get(group)
            if before is None and not self._alone:
                await rolling.dismiss(fleet, group)
                continue
            try:
                if before is not None and before != len(fleet.of_group(group)):
                    await rolling.resize(fleet, group, before)
                else:
                    await self._put_group_back(group)
            except StreamdError as again:
                log.error("with the old code %s", again)
        try:
            await fleet.declare(self._before)
        except StreamdError as again:
            log.error("the log was not told that the reload was taken back: %s", again)
        await fleet.imports.drop(code)
        return self._told(error, "the old code runs again")

    async def _put_group_back(self, group: str) -> None:
        for child in self._fleet.of_group(group):
            if child.code is None:
                continue
            self._say(f"{child.name} gets the old code back")
            try:
                await rolling.replace(self._fleet, child)
            except StreamdError as again:
                if child in self._well:
                    log.error("with the old code %s", again)

    def _told(self, error: Exception, outcome: str) -> StreamdError:
        seen = error.seen if isinstance(error, StreamdError) else ()
        remedy = error.remedy if isinstance(error, StreamdError) else None
        return StreamdError(f"the reload failed: {error}; {outcome}", seen=seen, remedy=remedy)
