"""The verbs of the control socket, which the command line and the stats page use.

A client is a process of the same user or of root; what it sends is bounded, and how long it
stays does not matter: a client too many takes the place of the one that was silent longest.
"""

import asyncio
import math
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import msgspec

from streamd.errors import StreamdError, UsageError
from streamd.instance import identify
from streamd.link import Answer, Link, serve
from streamd.supervisor import policy
from streamd.supervisor.changes import AUTO
from streamd.supervisor.figures import private_bytes, resident_bytes
from streamd.supervisor.logs import Line, as_data, level_number
from streamd.wire import Command, Document, Message

if TYPE_CHECKING:
    from streamd.supervisor.master import Master

MAX_FRAME_BYTES = 1024 * 1024
MAX_CLIENTS = 32


class Control:
    """Serves the control socket and carries out its commands."""

    def __init__(self, master: "Master") -> None:
        self._master = master
        self._server: asyncio.Server | None = None
        self._clients: dict[Link, float] = {}  # client -> when it was heard last

    async def serve(self) -> None:
        """Listen; returns at once.

        Raises:
            NotPermitted: The path of the socket is too long.
        """
        self._server = await serve(
            self._master.folder.control_path,
            "control",
            self._on_message,
            max_frame_bytes=MAX_FRAME_BYTES,
            allowed_uids=frozenset({0, os.geteuid()}),
            on_connect=self._on_connect,
        )

    def close(self) -> None:
        """Take no more clients; those that wait read the end of file when the master ends."""
        if self._server is not None:
            self._server.close()

    def _on_connect(self, link: Link) -> bool:
        self._clients = {
            client: at for client, at in self._clients.items() if not client.closed.is_set()
        }
        if len(self._clients) >= MAX_CLIENTS:
            silent = min(self._clients, key=self._clients.__getitem__)
            del self._clients[silent]
            silent.close()
        self._clients[link] = time.monotonic()
        return True

    async def _on_message(self, link: Link, message: Message) -> Answer:
        self._clients[link] = time.monotonic()
        if not isinstance(message, Command):
            raise UsageError(
                f"the control socket takes commands, not a {type(message).__name__}"
            )
        return self.carry_out(link, message)

    def carry_out(self, link: Link, command: Command) -> Answer:
        """Begin a command; its answers come as an iterator.

        Raises:
            UsageError: There is no such verb.
        """
        verb = getattr(self, f"do_{command.verb}", None)
        if verb is None:
            known = [name.removeprefix("do_") for name in dir(self) if name.startswith("do_")]
            raise UsageError(f"no command {command.verb!r}: there is {', '.join(known)}")
        answers: AsyncIterator[Message] = verb(command.args)
        return answers

    # The verbs. Each yields its documents.

    async def do_status(self, args: dict[str, Any]) -> AsyncIterator[Message]:
        yield Document(self._master.snapshot())

    async def do_ps(self, args: dict[str, Any]) -> AsyncIterator[Message]:
        strays = self._master.fleet.reaper.strays
        rows = self._master.snapshots.processes()
        for row in rows:
            row["strays"] = [
                {
                    "pid": pid,
                    "name": strays[pid].name,
                    "origin": strays[pid].origin,
                    "rss_bytes": resident_bytes(pid),
                    "private_bytes": private_bytes(pid),
                }
                for pid in row["strays"]
            ]
        yield Document(rows)

    async def do_hello(self, args: dict[str, Any]) -> AsyncIterator[Message]:
        hello = self._master.fleet.hello
        if hello is None:
            raise StreamdError("the app is still being imported")
        yield Document(msgspec.to_builtins(hello))

    async def do_owners(self, args: dict[str, Any]) -> AsyncIterator[Message]:
        frame = self._master.fleet.owners.frame()
        owners = [msgspec.structs.asdict(owner) for owner in frame.owners]
        yield Document({"generation": frame.generation, "owners": owners})

    async def do_tree(self, args: dict[str, Any]) -> AsyncIterator[Message]:
        fleet = self._master.fleet
        pids = {"guardian": os.getppid(), "master": os.getpid()}
        pids |= {child.name: child.run.pid for child in fleet.children.values() if child.run}
        pids |= {f"stray {stray.name}": stray.pid for stray in fleet.reaper.strays.values()}
        rows = []
        for name, pid in pids.items():
            try:
                rows.append({"process": name, **msgspec.to_builtins(identify(pid))})
            except ProcessLookupError:
                continue
        yield Document(rows)

    async def do_events(self, args: dict[str, Any]) -> AsyncIterator[Message]:
        since, after = _number(args, "since"), _number(args, "after")
        events = self._master.registry.events
        yield Document(
            [event for event in events if event["t"] >= since and event["n"] > after]
        )

    async def do_logs(self, args: dict[str, Any]) -> AsyncIterator[Message]:
        names, logs = _names(args), self._master.logs
        lowest = level_number(str(args.get("level") or "DEBUG"))
        lines, since = int(_number(args, "lines")), _number(args, "since")
        # Also those that are gone: their last lines are what one looks for.
        wanted = set(self._chosen(names, "master", *logs.processes())) | set(names)

        def is_wanted(line: Line) -> bool:
            process = line.process
            is_named = not names or process in wanted or process.partition("#")[0] in wanted
            return is_named and level_number(line.level) >= lowest

        # Followed before it is read: no line falls between.
        with logs.followed(is_wanted) as follower:
            for line in logs.select(is_wanted, lines=lines, since=since):
                yield Document(as_data(line))
            while args.get("follow"):
                for line in await follower.get():
                    yield Document(as_data(line))

    async def do_stacks(self, args: dict[str, Any]) -> AsyncIterator[Message]:
        names = _names(args)
        chosen = self._chosen(names, "master") if names else None
        blocks = await self._master.collect_stacks(chosen)
        yield Document("\n".join(blocks.values()))

    async def do_stop(self, args: dict[str, Any]) -> AsyncIterator[Message]:
        mode = args.get("mode", "warm")
        if mode not in ("warm", "cold"):
            raise UsageError(f"stop is warm or cold, not {mode!r}")
        already = self._master.phase == "stopping"
        self._master.enqueue(signal.SIGTERM if mode == "warm" else signal.SIGQUIT)
        yield Document({"stopping": mode, "already": already})
        while args.get("wait"):
            # The end of the connection is the end of the instance.
            await asyncio.sleep(0.5)
            yield Document({"left": self._master.left()})

    async def do_restart(self, args: dict[str, Any]) -> AsyncIterator[Message]:
        names = self._chosen(_names(args))
        change = self._master.changes.restart(names)
        async for line in change.follow():
            yield Document({"doing": line})
        yield Document(change.result)

    async def do_reload(self, args: dict[str, Any]) -> AsyncIterator[Message]:
        change = self._master.changes.reload()
        async for line in change.follow():
            yield Document({"doing": line})
        yield Document({"reloaded": change.result})

    async def do_scale(self, args: dict[str, Any]) -> AsyncIterator[Message]:
        group, processes = args.get("group"), args.get("processes")
        if not isinstance(group, str) or not (type(processes) is int or processes == AUTO):
            raise UsageError(f"scale takes a group and a number or {AUTO!r}, not {args!r}")
        change = self._master.changes.scale(group, processes)
        async for line in change.follow():
            yield Document({"doing": line})
        yield Document({"group": group, "processes": change.result})

    def _chosen(self, names: list[str], *more: str) -> list[str]:
        """The processes that these names mean; all agents and the web process without a name.

        Raises:
            UsageError: A name means no process.
        """
        children = self._master.fleet.children
        if not names:
            return [child.name for child in children.values() if child.kind in ("agent", "web")]
        known = list(dict.fromkeys([*children, *more]))
        chosen, unknown = policy.expand(names, known)
        if unknown:
            raise UsageError(
                f"there is no process {unknown[0]!r}", seen=[f"there is {', '.join(known)}"]
            )
        return chosen


def _number(args: dict[str, Any], name: str) -> float:
    """A number of the arguments; 0 where it is left out.

    Raises:
        UsageError: It is none.
    """
    value = args.get(name) or 0.0
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{name} is a number, not {value!r}")
    return float(value)


def _names(args: dict[str, Any]) -> list[str]:
    """The names of the arguments.

    Raises:
        UsageError: They are no list of texts.
    """
    names = args.get("names") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"names is a list of names, not {names!r}")
    return names
