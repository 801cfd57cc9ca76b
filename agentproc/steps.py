"""Makes the tables follow the code that runs: a hook before each step of a scope's tasks.

A step is what a task does between two suspensions. Before each step of a task that belongs
to a scope, the scope says whose partition the tables' writes go to. Tasks that user code
starts inherit the scope through their context, so theirs follow it too, and end with it. Tasks
of no scope, and the steps of groups without tables, are left alone.
"""

import asyncio
from collections.abc import Callable, Coroutine, Generator, MutableSet
from contextvars import Context
from typing import Any, Protocol

from streamd.context import current_scope


class Scoped(Protocol):
    """What a scope does at each step of its tasks."""

    has_tables: bool
    tasks: MutableSet[asyncio.Task[Any]]

    def enter(self) -> None:
        """A step begins."""

    def leave(self) -> None:
        """The step is over."""


class Stepped(Coroutine[Any, Any, Any]):
    """A coroutine whose every step is announced to its scope."""

    __slots__ = ("_coro", "_scope")

    def __init__(self, coro: Coroutine[Any, Any, Any], scope: Scoped) -> None:
        self._coro = coro
        self._scope = scope

    def send(self, value: Any) -> Any:
        self._scope.enter()
        return self._left(self._coro.send, value)

    def throw(self, *error: Any) -> Any:
        self._scope.enter()
        return self._left(self._coro.throw, *error)

    def _left(self, step: Callable[..., Any], *given: Any) -> Any:
        try:
            waits_for = step(*given)
        except BaseException:
            self._scope.leave()
            raise
        try:
            self._scope.leave()
        except Exception as error:
            # The code learns of it where it waits, and may clean up.
            return self.throw(error)
        return waits_for

    def close(self) -> None:
        self._coro.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return (yield from self._coro.__await__())

    def __getattr__(self, name: str) -> Any:
        # cr_frame, cr_await, __qualname__: what shows a task's stack.
        return getattr(self._coro, name)


def task_factory(
    loop: asyncio.AbstractEventLoop,
    coro: Coroutine[Any, Any, Any],
    *,
    context: Context | None = None,
    **options: Any,
) -> asyncio.Task[Any]:
    """Make a task; for `loop.set_task_factory`."""
    scope = current_scope.get() if context is None else context.get(current_scope)
    if scope is not None and scope.has_tables:
        coro = Stepped(coro, scope)
    task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, context=context, **options)
    if scope is not None:
        scope.tasks.add(task)
    return task
