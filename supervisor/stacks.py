"""The stacks of every process, as text: what USR1 and the verb `stacks` show.

An agent process writes its threads' stacks to its dump file from the signal handler itself,
in C, so also while it is stuck; its tasks' stacks follow when its loop turns. Other processes
print theirs to their log pipe. No stack shows a local variable.
"""

import asyncio
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from streamd.instance import process_state
from streamd.log import is_user_frame
from streamd.secrets import mask
from streamd.supervisor.child import Child, Run, handles
from streamd.supervisor.pages import BeatPage

POLL_S = 0.005
QUIET_S = 0.05

_LAST_WORDS = b"Fatal Python error: "
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+|\?\?\?) in (?P<function>.*)$')
_LIBRARY = str(Path(asyncio.__file__).parents[1])


async def collect(children: Sequence[Child], timeout_s: float) -> dict[str, str]:
    """Ask all these processes at once and wait for the slowest, at most `timeout_s`.

    Returns:
        Process name → its block, header first. A process that did not answer is named too.
    """
    asked: dict[str, tuple[Child, Run, bool]] = {}
    for child in children:
        run = child.run
        if run is None:
            continue
        # What is stopped does not answer: nobody waits for it.
        answers = handles(run.pid, signal.SIGUSR1) and not _is_stopped(run.pid)
        if answers:
            if run.dump is not None:
                run.dump.clear()
            else:
                run.logs.captured = []
            run.signal(signal.SIGUSR1)
        asked[child.name] = (child, run, answers)
    await _wait_whole([run for _, run, answers in asked.values() if answers], timeout_s)
    blocks = {}
    for name, (child, run, answers) in asked.items():
        if child.run is run:
            blocks[name] = mask(f"{header(child, run)}\n{_text_of(run, answers)}")
        else:
            # What it had is given back.
            blocks[name] = f"== {name} (pid {run.pid})\n(it ended meanwhile)\n"
        run.logs.captured = None
    return blocks


async def _wait_whole(runs: Sequence[Run], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    quiet_until = time.monotonic() + QUIET_S
    seen_lines = 0
    while time.monotonic() < deadline:
        lines = sum(len(run.logs.captured or ()) for run in runs)
        if lines != seen_lines:
            seen_lines, quiet_until = lines, time.monotonic() + QUIET_S
        dumps_whole = all(run.dump is None or run.dump.is_whole() for run in runs)
        pipes_whole = all(run.dump is not None or run.logs.captured for run in runs)
        if dumps_whole and pipes_whole and time.monotonic() >= quiet_until:
            return
        await asyncio.sleep(POLL_S)


def _text_of(run: Run, answers: bool) -> str:
    if not answers and _is_stopped(run.pid):
        return "(stopped by a signal: it cannot answer)\n"
    if not answers:
        return "(takes no USR1: it has not come so far, or is not Python)\n"
    if run.dump is None:
        lines = run.logs.captured or ["(no answer in time)"]
        return "\n".join(lines) + "\n"
    text = run.dump.read().decode(errors="replace")
    if not text:
        return "(no answer in time: it is stopped, or the kernel holds it)\n"
    if not run.dump.is_whole():
        if run.page is not None and (at := work_of(run.page, time.monotonic())):
            text += f"In work, as it wrote last: {at}\n"
        text += "(tasks: not in time, its loop does not turn)\n"
    return text


def _is_stopped(pid: int) -> bool:
    try:
        return process_state(pid) == "T"
    except ProcessLookupError:
        return False


def header(child: Child, run: Run) -> str:
    """The line above a process's stacks."""
    try:
        state = process_state(run.pid)
        wchan = Path(f"/proc/{run.pid}/wchan").read_text() or "-"
    except (OSError, ProcessLookupError):
        state, wchan = "?", "-"
    text = f"== {child.name} (pid {run.pid}): {child.state.value}, state {state}, wchan {wchan}"
    if run.page is not None:
        beat_s = time.monotonic() - run.page.beat if run.page.beat else 0.0
        text += f", loop turned {beat_s:.2f} s ago, {run.page.in_work} events in work"
    return text


def work_of(page: BeatPage, now: float) -> str:
    """The event that a process handed out last and has not settled, "" if it has none.

    A fast agent gets many events at once, of which the first is named.
    """
    place = page.place
    if page.in_work == 0 or place is None:
        return ""
    agent, topic, partition, position = place
    for_s = now - page.oldest_since
    return f"{agent}: {topic}[{partition}]@{position} or soon after, for {for_s:.1f} s"


def own_stacks() -> str:
    """The master's threads and tasks."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        parts.append(f"Thread {names.get(ident, ident)} (most recent call last):\n")
        parts += traceback.format_stack(frame)
    for task in sorted(asyncio.all_tasks(), key=asyncio.Task.get_name):
        parts.append(f"Task {task.get_name()!r}:\n")
        for frame in _awaited(task):
            parts += traceback.format_stack(frame, limit=1)
    return "".join(parts)


def _awaited(task: "asyncio.Task[Any]") -> Iterator[FrameType]:
    """The frames of a task that waits, outermost first."""
    waiting: Any = task.get_coro()
    while (frame := getattr(waiting, "cr_frame", None)) is not None:
        yield frame
        waiting = waiting.cr_await


def last_stack(dump: bytes) -> str:
    """What faulthandler wrote when a fatal signal ended the process; "" if none did."""
    at = dump.rfind(_LAST_WORDS)
    text = dump[at:].decode(errors="replace") if at >= 0 else ""
    # The list of extension modules is long, and says nothing about what went wrong.
    return text.partition("\nExtension modules: ")[0].rstrip()


def guilty(dump: str) -> str | None:
    """Where a hanging process is, as "function (file:line)", from its dump.

    The innermost frame of the user's code in the main thread, or the innermost of all if none
    is the user's.
    """
    threads: list[list[tuple[str, str, str]]] = []
    for line in dump.splitlines():
        if line.endswith("(most recent call first):"):
            threads.append([])
        elif threads and (match := _FRAME.match(line)):
            threads[-1].append((match["file"], match["line"], match["function"]))
        elif line.startswith("Task "):
            break
    # faulthandler shows the newest thread first: the main one is the last.
    frames = threads[-1] if threads else []
    if not frames:
        return None
    users = [frame for frame in frames if _is_users(frame[0])]
    file, number, function = (users or frames)[0]
    return f"{function} ({file}:{number})"


def _is_users(file: str) -> bool:
    return (
        is_user_frame(file) and not file.startswith(_LIBRARY) and "/site-packages/" not in file
    )
