"""Talking to an instance's master over its control socket.

Apart from `target`, so that a start, which talks to nobody, does without asyncio.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from streamd.cli import target
from streamd.errors import TimedOut
from streamd.instance import Folder
from streamd.link import Link, LinkLost, connect
from streamd.wire import Command, Document

T = TypeVar("T")


async def reach(folder: Folder) -> Link:
    """A link to the instance's master.

    Raises:
        NotRunning: It does not run.
        StreamdError: It runs but does not answer.
    """
    try:
        return await connect(folder.control_path, folder.path.name)
    except LinkLost as error:
        raise target.not_running(folder) from error


async def ask(folder: Folder, verb: str, timeout_s: float | None = 10.0, **args: Any) -> Any:
    """What the master answers to one command.

    Raises:
        NotRunning: It does not run.
        TimedOut: No answer in time.
        StreamdError: It refused.
    """
    link = await reach(folder)
    try:
        answer = await link.request(Command(verb, args), timeout_s)
    except TimedOut as error:
        who = target.living(folder)
        raise TimedOut(
            f"the master of {folder.path.name} (pid {who.pid if who else '-'}) did not answer "
            f"in {timeout_s:g} s: it is stopped, or stuck",
            remedy=f"streamd kill --tree --name {folder.path.name} ends it; nothing is lost",
        ) from error
    finally:
        link.close()
    return answer.data if isinstance(answer, Document) else None


async def follow(folder: Folder, verb: str, **args: Any) -> AsyncIterator[Any]:
    """What the master answers to a command that it answers with a stream."""
    link = await reach(folder)
    try:
        async for answer in link.stream(Command(verb, args)):
            if isinstance(answer, Document):
                yield answer.data
    finally:
        link.close()


def wait(awaitable: Awaitable[T]) -> T:
    """Run to the end from a command that is no coroutine."""

    async def run() -> T:
        return await awaitable

    return asyncio.run(run())
