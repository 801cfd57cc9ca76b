"""The steps by which running processes are exchanged: one slot, or all slots of a group.

On the embedded log a slot has the partitions p with p % slots == slot, so another number of
slots is another place for nearly every partition: all of them are drained before the first of
the new ones starts. On Kafka the members of a group share its partitions out themselves: those
that stay are not touched. Each step leaves a running process in every slot, or raises.
"""

import asyncio
from collections.abc import Sequence

from streamd.errors import StreamdError
from streamd.supervisor.child import Child
from streamd.supervisor.fleet import Fleet
from streamd.supervisor.imports import Code
from streamd.supervisor.states import State

READY_S = 60.0

SETTLED = (State.RUNNING, State.FATAL, State.BACKOFF, State.STOPPED)


class Stopping(StreamdError):
    """The instance stops: nothing is started any more."""


async def replace(fleet: Fleet, child: Child, code: Code | None = None) -> None:
    """Drain a process, and fork another in its place; returns when that runs.

    Args:
        code: What to fork from; None: what the fleet runs.

    Raises:
        StreamdError: It did not come to run; the policy goes on trying.
    """
    async with fleet.exchanging:
        await fleet.end(child, grace_s(fleet))
        begin(fleet, [child], code)
    await wait_ready(fleet, [child])


async def resize(fleet: Fleet, group: str, processes: int, code: Code | None = None) -> None:
    """Let a group have so many processes, of this code; returns when those that are new run.

    Raises:
        StreamdError: One did not come to run; the policy goes on trying.
    """
    async with fleet.exchanging:
        before = fleet.of_group(group)
        stay = processes if fleet.members_share and code is None else 0
        ending = before[stay:]
        for child in before[processes:]:
            fleet.leave(child)
        # One may be started by the policy while another still drains.
        while any(child.state is not State.STOPPED for child in ending):
            await asyncio.gather(*(fleet.end(child, grace_s(fleet)) for child in ending))
        for child in before[processes:]:
            fleet.remove(child)
        for slot in range(len(before), processes):
            fleet.add(f"{group}#{slot}", "agent", group)
        new = [child for child in fleet.of_group(group) if child not in before[:stay]]
        begin(fleet, new, code)
    # Those that stay are the policy's as before: a crash of theirs is no fault of this.
    await wait_ready(fleet, new)


async def dismiss(fleet: Fleet, group: str) -> None:
    """Drain all processes of a group, and have it no more."""
    async with fleet.exchanging:
        children = fleet.of_group(group)
        await asyncio.gather(*(fleet.end(child, grace_s(fleet)) for child in children))
        for child in children:
            fleet.remove(child)


def begin(fleet: Fleet, children: Sequence[Child], code: Code | None = None) -> None:
    """Start children that have no process.

    Raises:
        Stopping: Nothing is started any more.
    """
    if not fleet.restarting:
        raise Stopping
    for child in children:
        child.code = code
        fleet.start_anew(child)


async def wait_ready(fleet: Fleet, children: Sequence[Child], limit_s: float = READY_S) -> None:
    """Wait until all of them run; what a strategy ends and starts anew meanwhile, too.

    Raises:
        StreamdError: One ended, or was not ready in time.
    """
    deadline = asyncio.get_running_loop().time() + limit_s
    for child in children:
        try:
            async with asyncio.timeout_at(deadline):
                await fleet.ends.wait_together_over()
                await child.wait_state(*SETTLED)
        except TimeoutError:
            raise StreamdError(
                f"{child} was not ready after {limit_s:g} s",
                remedy=f"streamd stacks {child.name}",
            ) from None
        if trouble := trouble_of(child):
            raise trouble


def trouble_of(child: Child) -> StreamdError | None:
    """Why a process that was started anew does not do well; None: it does."""
    if child.state in (State.RUNNING, State.STARTING) and not child.budget.crashes:
        return None  # one that somebody else has killed is on its way back
    if child.failing is not None:
        return StreamdError(
            f"{child.name}: {child.failing.message}",
            seen=child.failing.seen,
            remedy=child.failing.remedy,
        )
    return StreamdError(
        f"{child.name} is {child.state.value}: it {child.last_exit}",
        remedy=f"streamd logs {child.name}",
    )


def grace_s(fleet: Fleet) -> float:
    """How long a process may drain."""
    assert fleet.settings is not None
    return fleet.settings.grace_s
