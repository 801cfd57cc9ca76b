"""What a process works on, and the stacks of its asyncio tasks: file, line, function, name.

No local variables are shown: they hold users' data, and a dump goes to the log.
"""

import asyncio
import gc
import linecache
import os
from collections.abc import Iterable, Iterator
from types import AsyncGeneratorType, CodeType, CoroutineType, FrameType
from typing import Any

END_OF_TASKS = "-- end of tasks --"
MAX_FRAMES = 50

_AWAITED = (CoroutineType, AsyncGeneratorType)


def task_stacks(loop: asyncio.AbstractEventLoop, in_work: Iterable[str] | None = None) -> str:
    """Where every unfinished task of `loop` waits, outermost call first, and the end marker.

    Args:
        in_work: What the process works on, a line each, which stands above; None: it is not
            a process that works on events.
    """
    lines = []
    if in_work is not None:
        lines = [f"  {line}" for line in in_work]
        lines.insert(0, "In work:" if lines else "In work: nothing")
    tasks = [task for task in asyncio.all_tasks(loop) if not task.done()]
    for task in sorted(tasks, key=asyncio.Task.get_name):
        lines.append(f"Task {task.get_name()!r} (outermost call first):")
        frames = list(_frames(task))
        lines += [f"  {line}" for line in frames[:MAX_FRAMES]]
        if len(frames) > MAX_FRAMES:
            lines.append(f"  … {len(frames) - MAX_FRAMES} more")
    lines.append(END_OF_TASKS)
    return "\n".join(lines) + "\n"


def write_task_stacks(
    dump: int, loop: asyncio.AbstractEventLoop, in_work: Iterable[str] | None = None
) -> None:
    """Write what is in work and the tasks' stacks to the descriptor `dump`."""
    data = task_stacks(loop, in_work).encode(errors="backslashreplace")
    while data:
        data = data[os.write(dump, data) :]


def _frames(task: "asyncio.Task[Any]") -> Iterator[str]:
    """The chain of awaits of a task; a running task's is the stack that asks for it."""
    waiting: Any = task.get_coro()
    while waiting is not None:
        frame: FrameType | None
        if (frame := getattr(waiting, "cr_frame", None)) is not None:
            yield _line(frame.f_code, frame.f_lineno)
            waiting = waiting.cr_await
        elif (frame := getattr(waiting, "ag_frame", None)) is not None:
            yield _line(frame.f_code, frame.f_lineno)
            waiting = waiting.ag_await
        elif (frame := getattr(waiting, "gi_frame", None)) is not None:
            yield _line(frame.f_code, frame.f_lineno)
            waiting = waiting.gi_yieldfrom
        elif wrapped := [at for at in gc.get_referents(waiting) if isinstance(at, _AWAITED)]:
            # What `async for` and `await generator.asend()` put between has no attributes.
            waiting = wrapped[0]
        else:
            yield f"waits for {type(waiting).__qualname__}"
            return


def _line(code: CodeType, line: int | None) -> str:
    text = f'File "{code.co_filename}", line {line}, in {code.co_qualname}'
    source = linecache.getline(code.co_filename, line or 0).strip()
    return f"{text}: {source}" if source else text
