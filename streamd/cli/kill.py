"""`kill`: end an instance now, with or without a living master, by identity, never by name."""

import os
import signal
import time
from typing import Any

import click

from streamd.cli import output, target
from streamd.cli.options import given
from streamd.cli.root import Command
from streamd.errors import StreamdError, UsageError
from streamd.instance import Folder, boot_id, folders
from streamd.supervisor import tree

# A guardian ends a tree in milliseconds; what it cannot end in this time, the sweep tries.
GUARDIAN_S = 3.0


class SignalName(click.ParamType[signal.Signals]):
    """`KILL`, `SIGTERM` or a number."""

    name = "signal"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> signal.Signals:
        if isinstance(value, signal.Signals):
            return value
        text = str(value).upper()
        try:
            if text.isdecimal():
                return signal.Signals(int(text))
            return signal.Signals[text if text.startswith("SIG") else f"SIG{text}"]
        except (KeyError, ValueError):
            self.fail(f"{value!r} is no signal, expected KILL, TERM, QUIT …", param, ctx)


def kill(
    tree_wanted: bool, signal_wanted: signal.Signals, all: bool, dry_run: bool, yes: bool
) -> int:
    """End everything now; what was not committed is done again.

    Without --tree the master gets the signal, and its guardian ends the rest. With it, every
    process of the tree is found and ended here, also those that left it, also when master
    and guardian are dead.
    """
    chosen = _chosen(all)
    if not chosen:
        output.note("Nothing runs. Nothing done.")
        if given().json:
            output.say_json({"schema": "streamd.kill/1", "killed": [], "survivors": []})
        return 0
    if all and not dry_run and not yes:
        names = ", ".join(folder.path.name for folder in chosen)
        output.confirm(f"This ends {output.plural(len(chosen), 'instance')}: {names}. Go on?")
    codes = []
    for folder in chosen:
        if dry_run:
            codes.append(_show_tree(folder))
        elif signal_wanted != signal.SIGKILL:
            codes.append(_send(folder, signal_wanted, whole_tree=tree_wanted))
        else:
            codes.append(_kill(folder, whole_tree=tree_wanted))
    return max(codes)


def _chosen(all: bool) -> list[Folder]:
    # A tree whose lock is free may still have left something behind.
    held = [
        folder
        for folder in folders()
        if not tree.is_free(folder.lock_path)
        or has_leftovers(folder, target.read_holder(folder))
    ]
    options = given()
    if all:
        return held
    if target.named_instance(options) or target.named_app(options):
        folder = target.folder_of(options)
        return [folder] if folder.path in {other.path for other in held} else []
    if len(held) > 1:
        raise UsageError(
            f"{len(held)} instances run; which one is meant?",
            seen=[target.describe(folder) for folder in held],
            remedy=f"streamd kill --name {held[0].path.name}, or --all",
        )
    return held


def tree_of(folder: Folder) -> tuple[str, Any]:
    """What the tree that holds the lock is known by: its marker and its record."""
    holder, record = target.read_holder(folder), folder.read_record()
    if holder is None:
        return (record.tree if record else ""), record
    # A record of an earlier tree says nothing about this one.
    return holder.tree, record if record and record.tree == holder.tree else None


def has_leftovers(folder: Folder, last: target.Holder | None) -> bool:
    """True if a process of the last tree lives, though none holds the lock: what a user's code
    spawned and the kernel's end of guardian and master, at once, did not reach."""
    if last is None or last.guardian.boot_id != boot_id():
        return False
    return bool(tree.find_tree(*tree_of(folder), folder.lock_path))


def end_tree(folder: Folder) -> tree.Report:
    """Kill every process of the instance that is left. Blocks until it is done."""
    return tree.kill_tree(*tree_of(folder), folder.lock_path)


def _show_tree(folder: Folder) -> int:
    found = tree.kill_tree(*tree_of(folder), folder.lock_path, dry_run=True).killed
    if given().json:
        output.say_json(_document(folder, found, []))
        return 0
    output.say(f"would kill, of {folder.path.name}:")
    for process in found:
        output.say(f"  {process}")
    output.say(f"{output.plural(len(found), 'process')}. What was not committed is done again.")
    return 0


def _kill(folder: Folder, *, whole_tree: bool) -> int:
    started = time.monotonic()
    killed: list[tree.Found] = []
    record = folder.read_record()
    if record is not None and record.unit:
        output.note(f"systemd starts it again: systemctl stop {record.unit} does not.")
    if not whole_tree:
        killed = tree.find_tree(*tree_of(folder), folder.lock_path)
        if record is not None and record.master.is_alive():
            os.kill(record.master.pid, signal.SIGKILL)
            target.wait_unlocked(folder, GUARDIAN_S)
    report = end_tree(folder)
    known = {process.pid for process in killed}
    killed += [process for process in report.killed if process.pid not in known]
    if given().json:
        output.say_json(_document(folder, killed, report.survivors))
    took_s = time.monotonic() - started
    if report.is_complete:
        if not given().json:
            output.say(
                f"killed {output.plural(len(killed), 'process')} in {took_s:.2f} s; none left."
            )
        return 0
    raise StreamdError(
        f"{output.plural(len(report.survivors), 'process')} of {folder.path.name} cannot be "
        "killed"
        if report.survivors
        else f"something still holds {folder.lock_path}",
        seen=[str(process) for process in report.survivors],
        remedy="sudo streamd kill --tree, or wait for the kernel to let them go",
    )


def _send(folder: Folder, number: signal.Signals, *, whole_tree: bool) -> int:
    marker, record = tree_of(folder)
    if whole_tree:
        processes = tree.find_tree(marker, record, folder.lock_path)
        for process in processes:
            os.kill(process.pid, number)
        pids = [process.pid for process in processes]
        _say_sent(folder, number, pids, output.plural(len(pids), "process"))
        return 0
    if record is None or not record.master.is_alive():
        raise target.not_running(folder)
    os.kill(record.master.pid, number)
    pid = record.master.pid
    _say_sent(folder, number, [pid], f"the master (pid {pid})")
    return 0


def _say_sent(folder: Folder, number: signal.Signals, pids: list[int], to: str) -> None:
    if given().json:
        name = folder.path.name
        output.say_json(
            {"schema": "streamd.kill/1", "name": name, "signal": number.name, "sent_to": pids}
        )
    else:
        output.say(f"sent {number.name} to {to}.")


def _document(
    folder: Folder, killed: list[tree.Found], survivors: list[tree.Found]
) -> dict[str, Any]:
    def rows(found: list[tree.Found]) -> list[dict[str, Any]]:
        return [{"pid": each.pid, "command": each.command, "how": each.how} for each in found]

    return {
        "schema": "streamd.kill/1",
        "name": folder.path.name,
        "killed": rows(killed),
        "survivors": rows(survivors),
    }


kill_command = Command(
    "kill",
    callback=kill,
    help=kill.__doc__,
    params=[
        click.Option(
            ["--tree", "tree_wanted"],
            is_flag=True,
            help="The whole tree at once, with processes that left it.",
        ),
        click.Option(
            ["-s", "--signal", "signal_wanted"],
            type=SignalName(),
            default=signal.SIGKILL,
            metavar="SIG",
            help="Signal to send. [default: KILL]",
        ),
        click.Option(["--all"], is_flag=True, help="Every instance of this user."),
        click.Option(["--dry-run"], is_flag=True, help="Only list what would be killed."),
        click.Option(["-y", "--yes"], is_flag=True, help="Do not ask."),
    ],
)
