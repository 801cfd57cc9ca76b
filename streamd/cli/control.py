"""`stop`, `restart`, `reload` and `scale`: what the master is asked to do."""

import asyncio
import time
from typing import Any

import click

from streamd.cli import output, talk, target
from streamd.cli.options import DURATION, given
from streamd.cli.root import Command
from streamd.errors import NotRunning, StreamdError, TimedOut, UsageError
from streamd.instance import Folder


def complete_names(
    context: click.Context, param: click.Parameter, incomplete: str
) -> list[str]:
    """Names of processes that run and begin so; none where that takes longer than 200 ms."""
    try:
        folder = target.folder_of(given(context))
        snapshot = talk.wait(talk.ask(folder, "status", timeout_s=0.2))
        names = [process["name"] for process in snapshot["processes"]]
    except Exception:
        # A completion has nowhere to show an error: it offers nothing.
        return []
    return [name for name in names if name.startswith(incomplete)]


def stop(cold: bool, timeout: float | None) -> int:
    """Stop: finish what runs, checkpoint, exit.

    Returns when no process is left. The setting `grace` bounds how long events may take to
    finish. Stopping what does not run is no error.
    """
    options = given()
    try:
        folder = target.folder_of(options)
        started = time.monotonic()
        mode = "cold" if cold else "warm"
        answer = talk.wait(talk.ask(folder, "stop", mode=mode, wait=False))
    except NotRunning as error:
        output.note(f"{str(error)[:1].upper()}{str(error)[1:]}. Nothing done.")
        if options.json:
            name = target.named_instance(options) or target.named_app(options)
            output.say_json({"schema": "streamd.stop/1", "name": name, "state": "stopped"})
        return 0
    name = folder.path.name
    if answer["already"]:
        output.note(f"{name} is stopping already{', and now cold' if cold else ''}.")
    _wait_stopped(folder, None if timeout is None else started + timeout)
    if options.json:
        output.say_json({"schema": "streamd.stop/1", "name": name, "state": "stopped"})
    else:
        output.say(f"Stopped {name} in {output.duration(time.monotonic() - started)}.")
    return 0


def _wait_stopped(folder: Folder, deadline: float | None) -> None:
    """Wait until nothing is left, and show each second what drains."""
    shown = ""
    while not target.wait_unlocked(folder, 1.0):
        draining = talk.wait(_draining(folder))
        if draining and draining != shown:
            output.note(f"  {draining}")
            shown = draining
        if deadline is not None and time.monotonic() > deadline:
            raise TimedOut(
                f"{folder.path.name} has not stopped in time; it goes on stopping",
                seen=[draining] if draining else [],
                remedy=f"streamd kill --tree --name {folder.path.name}",
            )


async def _draining(folder: Folder) -> str:
    """What the processes that stop still work on, "" when nobody tells."""
    try:
        snapshot = await talk.ask(folder, "status", timeout_s=0.5)
    except StreamdError:
        return ""
    left = [
        f"{process['name']}: {'; '.join(process.get('draining') or ['stopping'])}"
        for process in snapshot["processes"]
        if process.get("draining") or process["state"].lower() == "stopping"
    ]
    return "waiting for " + ", ".join(left) if left else ""


stop_command = Command(
    "stop",
    callback=stop,
    help=stop.__doc__,
    params=[
        click.Option(
            ["--cold"], is_flag=True, help="Cancel what runs; it is done again later."
        ),
        click.Option(
            ["-t", "--timeout"],
            type=DURATION,
            help="How long to wait; then exit 124. [default: without limit]",
        ),
    ],
)


def restart(names: tuple[str, ...], timeout: float) -> None:
    """Restart processes, one at a time.

    All of the app's when no name is given.
    """
    restarted = _follow(target.folder_of(given()), timeout, "restart", names=list(names))
    if given().json:
        output.say_json({"schema": "streamd.restart/1", "restarted": restarted})
    else:
        output.say(f"Restarted {', '.join(restarted)}.")


restart_command = Command(
    "restart",
    callback=restart,
    help=restart.__doc__,
    params=[
        click.Argument(
            ["names"],
            nargs=-1,
            metavar="[NAME]...",
            help="Processes or groups; all when left out.",
            shell_complete=complete_names,
        ),
        click.Option(
            ["-t", "--timeout"],
            type=DURATION,
            default="60s",
            show_default=True,
            help="How long to wait for all of them.",
        ),
    ],
)


def reload(timeout: float) -> None:
    """Run new code: import it beside the old, then exchange process by process.

    Nothing is touched where it cannot be imported, cannot run beside the old, or its canary
    fails; the old code is put back where a process fails later. Exits 78 when the new code is
    refused.
    """
    folder = target.folder_of(given())
    started = time.monotonic()
    answer = _follow(folder, timeout, "reload")
    if given().json:
        output.say_json({"schema": "streamd.reload/1", **answer})
        return
    took = output.duration(time.monotonic() - started)
    output.say(f"Reloaded {folder.path.name} in {took}: {answer['reloaded']}.")


def _follow(folder: Folder, timeout_s: float, verb: str, **args: Any) -> Any:
    """Show the steps of a change that the master makes; its last word."""

    async def follow() -> Any:
        last = None
        async for told in talk.follow(folder, verb, **args):
            if isinstance(told, dict) and "doing" in told:
                output.note(f"  {told['doing']}")
            else:
                last = told
        return last

    async def limited() -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await follow()
        except TimeoutError:
            raise TimedOut(
                f"{verb} of {folder.path.name} is not done after {timeout_s:g} s; it goes on",
                remedy=f"streamd status --name {folder.path.name}",
            ) from None

    return talk.wait(limited())


_timeout_option = click.Option(
    ["-t", "--timeout"],
    type=DURATION,
    default="10m",
    show_default=True,
    help="How long to wait; then it goes on, and the exit code is 124.",
)

reload_command = Command(
    "reload", callback=reload, help=reload.__doc__, params=[_timeout_option]
)


def scale(sizes: tuple[str, ...], timeout: float) -> None:
    """Set how many processes a group has.

    While this instance runs, also over restarts of its processes; the next start goes by
    `processes=N` on the agent again. GROUP=auto lets the number follow how far the group is
    behind. All processes of the group are drained first, for their partitions are shared out
    anew.
    """
    wanted = dict(map(_group_size, sizes))
    folder = target.folder_of(given())
    for group, processes in wanted.items():
        answer = _follow(folder, timeout, "scale", group=group, processes=processes)
        if given().json:
            output.say_json({"schema": "streamd.scale/1", **answer})
        else:
            number = output.plural(answer["processes"], "process")
            output.say(f"{group} has {number}{', by its lag' * (processes == 'auto')}.")


def _group_size(text: str) -> tuple[str, int | str]:
    group, _, number = text.partition("=")
    if group and number == "auto":
        return group, number
    if not group or not number.isdecimal() or int(number) < 1:
        raise UsageError(
            f"{text!r} is no size of a group, expected GROUP=N with N of 1 or more, or auto",
            remedy="streamd scale count_words=4",
        )
    return group, int(number)


def complete_groups(
    context: click.Context, param: click.Parameter, incomplete: str
) -> list[str]:
    """The groups that run, as the first half of GROUP=N."""
    names = {name.partition("#")[0] for name in complete_names(context, param, incomplete)}
    return sorted(f"{name}=" for name in names)


scale_command = Command(
    "scale",
    callback=scale,
    help=scale.__doc__,
    params=[
        click.Argument(
            ["sizes"],
            nargs=-1,
            required=True,
            metavar="GROUP=N...",
            help="Group and size.",
            shell_complete=complete_groups,
        ),
        _timeout_option,
    ],
)


def answer_rows(answer: Any, key: str) -> list[dict[str, Any]]:
    """The list in an answer that is one, or holds one under `key`."""
    rows = answer.get(key, []) if isinstance(answer, dict) else answer
    assert isinstance(rows, list)
    return rows
