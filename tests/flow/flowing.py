"""Runs an app's groups in one process on the memory broker, as its agent processes would.

    async with running(build) as flow:
        await flow.send("posts", "a b", key="k")
        await flow.settled()
        assert flow.table("counts") == {"a": 1, "b": 1}

`build` makes the app anew: every slot of every group gets one of its own, since in production
each is a process of its own and shares no table object. With `alone=True` all groups share one
app, as in `streamd worker`.
"""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from streamd.agentproc.beats import Beats
from streamd.agentproc.broker import TP, Checkpoint, Headers, Output
from streamd.agentproc.broker.memory import MemoryBroker
from streamd.agentproc.engine import Engine
from streamd.agentproc.replying import receive
from streamd.agentproc.routing import place_of
from streamd.agentproc.steps import task_factory
from streamd.agents import Agent, Replies
from streamd.app import App
from streamd.topics import HeadersArgument, Topic, header_list
from streamd.wire import GroupPlan, Suspect

T = TypeVar("T")

Build = Callable[[], App]

WITHIN_S = 20.0


def app_of(**settings: Any) -> App:
    """An app for a flow test: few partitions, short pauses."""
    quick = {"topic_partitions": 4, "retry_backoff": 0.005, "checkpoint_interval": 0.01}
    app = App("flow", broker="memory://", **{**quick, **settings})
    app.module = app.package = sys._getframe(1).f_globals["__name__"]
    return app


def flow_test(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine as an agent process runs: its task factory on the loop."""

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(task_factory)  # type: ignore[arg-type]
        async with asyncio.timeout(60):
            await test()

    asyncio.run(main(), debug=bool(os.environ.get("FLOW_DEBUG")))


async def eventually(condition: Callable[[], Any], within_s: float = WITHIN_S) -> None:
    """Wait until `condition()` is true; it is looked at again and again."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not true within {within_s} s"
        await asyncio.sleep(0.002)


class Running:
    """One engine, in what would be a process of its own."""

    def __init__(self, flow: "Flow", app: App, plan: GroupPlan, **options: Any) -> None:
        self.app = app
        self.name = f"{plan.group}#{plan.slot}"
        self.engine = Engine(app, plan, flow.broker, flow.beats, **options)
        self.run = asyncio.create_task(self.engine.run(), name=f"engine {self.name}")

    async def kill(self) -> None:
        """End it as a crash would: nothing more is settled or made durable."""
        self.run.cancel()
        await self.engine.abort()
        await asyncio.wait([self.run])


class Flow:
    """The running groups of an app and the broker below them."""

    def __init__(self, build: Build, broker: MemoryBroker, alone: bool) -> None:
        self._build = build
        self._alone = alone
        self.app = self._new_app()  # the groups' own in `alone`, else for declarations only
        self.broker = broker
        self.beats = Beats(os.memfd_create("beats"))
        self.running: dict[str, Running] = {}  # "group#slot" -> what runs
        self._reply_tasks: set[asyncio.Task[None]] = set()

    def _new_app(self) -> App:
        app = self._build()
        app.finalize()
        return app

    async def start(self, group: str, slot: int = 0, slots: int = 1, **options: Any) -> Running:
        """Start one slot of a group, in an app of its own; it reads when this returns."""
        app = self.app if self._alone else self._new_app()
        name = f"{group}#{slot}"
        app.open_replies = partial(self._open_replies, app, "all" if self._alone else name)
        running = Running(
            self, app, GroupPlan(group, slot, slots), alone=self._alone, **options
        )
        self.running[name] = running
        for table in app.tables.values():
            if table.group != group and not self._alone:
                table.look_elsewhere(BrokerTables(self.broker), place_of(app, table))
        ready = asyncio.create_task(running.engine.ready.wait())
        await asyncio.wait([ready, running.run], return_when=asyncio.FIRST_COMPLETED)
        if running.run.done():
            ready.cancel()
            await running.run
        return running

    async def _open_replies(self, app: App, process: str) -> Replies:
        return await receive(app, self.broker, process, self._reply_tasks)

    def engine(self, group: str, slot: int = 0) -> Engine:
        """The engine of a slot."""
        return self.running[f"{group}#{slot}"].engine

    async def kill(self, group: str, slot: int = 0) -> None:
        """Kill one slot; `start` begins its successor."""
        await self.running.pop(f"{group}#{slot}").kill()

    async def stop(self, group: str, slot: int = 0) -> None:
        """Stop one slot warm."""
        running = self.running.pop(f"{group}#{slot}")
        running.engine.stop()
        await running.run

    async def send(
        self,
        target: str | Topic | Agent,
        value: Any = None,
        *,
        key: Any = None,
        partition: int | None = None,
        timestamp: float | None = None,
        headers: HeadersArgument = None,
    ) -> None:
        """Append one event, from outside."""
        topic = self.topic(target)
        record = topic.encode(
            key, value, partition=partition, timestamp=timestamp, headers=headers
        )
        await self.append(
            topic.name,
            [(record.key, record.value)],
            max(record.partition, 0),
            header_list(headers) or None,
            timestamp,
        )

    async def append(
        self,
        topic: str,
        records: Iterable[tuple[bytes | None, bytes | None]],
        partition: int = 0,
        headers: Headers | None = None,
        timestamp: float | None = None,
    ) -> None:
        """Append events as bytes."""
        rows = list(records)
        self.broker.make_topic(topic, self._partitions(topic))
        output = Output(
            TP(topic, partition),
            [key for key, _ in rows],
            [value for _, value in rows],
            [time.time() if timestamp is None else timestamp] * len(rows),
            [headers] * len(rows) if headers else None,
        )
        self.broker.write(Checkpoint(outputs=[output]), None)

    def topic(self, target: str | Topic | Agent) -> Topic:
        """The topic of an agent (by label), or of a name."""
        if isinstance(target, Topic):
            return target
        if isinstance(target, Agent):
            return target.channel
        for agent in self.app.agents.values():
            if target in (agent.label, agent.name):
                return agent.channel
        return self.app.topics[target]

    def _partitions(self, name: str) -> int:
        topics = [*self.app.topics.values(), *(a.channel for a in self.app.agents.values())]
        return next((topic.partition_count for topic in topics if topic.name == name), 0)

    async def settled(self, within_s: float = WITHIN_S) -> None:
        """Wait until every group has made all events durable."""
        await eventually(self.is_settled, within_s)
        for running in self.running.values():
            await running.engine.pending.durable(urgent=False)

    def is_settled(self) -> bool:
        """True where no event is left; raises what an engine ended with."""
        for running in self.running.values():
            if running.run.done() and not running.run.cancelled():
                running.run.result()
        return not any(
            any(running.engine.session.behind().values())
            for running in self.running.values()
            if running.engine.ready.is_set()
        )

    def table(self, name: str) -> dict[Any, Any]:
        """What a table holds, committed, as a dict; one value a key or the test is wrong."""
        rows = [row for part in self.parts(name).values() for row in part.items()]
        assert len(dict(rows)) == len(rows), f"keys of {name} are in several partitions"
        return dict(rows)

    def parts(self, name: str) -> dict[int, dict[Any, Any]]:
        """The same, partition by partition."""
        table = self.app.tables[name]
        return {
            partition: {
                table.decode_key(key): table.value_codec.decode(value)
                for key, value in self.broker.rows(name, partition)
                if not key.startswith(b"\0")
            }
            for partition in range(table.partitions or 1)
        }

    def values(self, target: str | Topic | Agent) -> list[Any]:
        """The decoded values that a topic holds, partition by partition."""
        topic = self.topic(target)
        return [
            None if value is None else topic.value_codec.decode(value)
            for _, _, value in self.broker.events(topic.name)
        ]

    def letters(self) -> list[tuple[bytes | None, bytes | None, dict[str, bytes]]]:
        """The dead letters: key, value, headers."""
        name = self.app.dead_letters
        self.broker.make_topic(name)
        log = self.broker.log_of(TP(name, 0))
        return [
            (key, value, dict(headers))
            for key, value, headers in zip(log.keys, log.values, log.headers, strict=True)
        ]

    async def perform(
        self, group: str, code: Callable[[App], Awaitable[T]], whole: bool = True
    ) -> T:
        """Run `code(app)` as a view (or, not `whole`, a task) of slot 0 of a group."""
        running = self.running[f"{group}#0"]

        async def errand() -> T:
            return await code(running.app)

        result: T = await running.engine.perform("a test", errand(), whole=whole)
        return result

    async def close(self) -> None:
        """Stop what runs, warm."""
        for name in list(self.running):
            running = self.running.pop(name)
            if running.run.done():
                if not running.run.cancelled() and running.run.exception() is None:
                    running.run.result()
                continue
            running.engine.stop()
            done, _ = await asyncio.wait([running.run], timeout=WITHIN_S)
            if not done:
                await running.kill()
                raise AssertionError(f"{name} did not stop: {running.engine.gate.busy_with()}")
        for task in self._reply_tasks:
            task.cancel()
        if self._reply_tasks:
            await asyncio.wait(self._reply_tasks)


class BrokerTables:
    """What a process of another group may see of a table: its committed rows."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker

    def get(self, table: str, key: bytes, partition: int) -> bytes | None:
        return dict(self._broker.rows(table, partition)).get(key)

    async def get_soon(self, table: str, key: bytes, partition: int) -> bytes | None:
        await asyncio.sleep(0)
        return self.get(table, key, partition)


@asynccontextmanager
async def running(
    build: Build,
    *,
    slots: Mapping[str, int] | None = None,
    alone: bool = False,
    broker: MemoryBroker | None = None,
    groups: Iterable[str] | None = None,
    parked: tuple[Suspect, ...] = (),
    careful: bool = False,
) -> AsyncIterator[Flow]:
    """Run every group of an app (and `app`); the flow is stopped warm at the end."""
    flow = Flow(build, broker or MemoryBroker(4), alone)
    hello = flow.app.hello("test", alone)
    await flow.broker.declare(hello.topics, hello.tables, hello.groups)
    try:
        for group in hello.groups:
            count = (slots or {}).get(group.name, 1)
            if groups is None or group.name in groups:
                for slot in range(count):
                    await flow.start(group.name, slot, count, parked=parked, careful=careful)
        yield flow
    finally:
        await flow.close()
