"""An agent: an async function that works on the events of a topic."""

import asyncio
import inspect
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any

from streamd.context import Sent, current_scope, no_scope
from streamd.errors import AppError, ReplyTimeout, StreamdError
from streamd.topics import HeadersArgument, Topic, header_list

# Faust's names: a Faust process and a streamd process can ask each other.
REPLY_TO = "Faust-Ag-ReplyTo"
CORRELATION_ID = "Faust-Ag-CorrelationId"

ON_ERROR = ("retry", "stop", "skip")
RESTART = ("permanent", "transient", "temporary")
AUTO = "auto"

Sink = Any  # a function, an async function, a topic or an agent


class AgentFailed(StreamdError):
    """The agent that was asked raised an error."""


class Agent:
    """What `@app.agent(...)` makes of a function.

    Args:
        channel: The topic to read; None: one of its own, `{app id}-{agent name}`.
        concurrency: Events worked on at the same time in each process; above 1 the order of a
            partition's events is lost.
        deterministic: What it sends follows from the event and its tables alone. False, where
            chance, the time or another service has a say: on Kafka without `exactly_once` what
            it sends again after a crash is then never taken for a replay, so it may come twice.
        processes: Processes that share the partitions; "auto": their number follows how far
            behind they are.
        on_error: What becomes of an event whose try raised. "retry": tried again with back-off,
            then dead-lettered; "stop": the group stops; "skip": it is dropped with a log line.
        retries: Tries after the first one, before an event is dead-lettered.
        timeout: Longest time for one event, in seconds; then it counts as failed.
        restart: When its process is started again after it ended by itself. "permanent":
            always; "transient": unless it ended with exit code 0; "temporary": never.
        max_memory: Private memory, in bytes, above which its process is drained and replaced;
            `max_memory` of the settings where left out.
        nice: How much its process gives way to others, 0 to 19.
    """

    def __init__(
        self,
        app: Any,
        fun: Callable[..., Any],
        name: str,
        channel: Topic,
        *,
        concurrency: int,
        deterministic: bool = True,
        sink: Iterable[Sink],
        group: str | None,
        processes: int | str,
        on_error: str | None,
        retries: int | None,
        timeout: float | None,
        restart: str | None = None,
        max_memory: int | None = None,
        nice: int | None = None,
    ) -> None:
        auto = processes == AUTO
        least = 1 if auto else processes
        if concurrency < 1 or not isinstance(least, int) or least < 1:
            raise AppError(
                f"agent {name!r} has concurrency={concurrency!r} and processes={processes!r}: "
                f"both are 1 or more, or processes={AUTO!r}"
            )
        if on_error is not None and on_error not in ON_ERROR:
            raise AppError(
                f"agent {name!r} has on_error={on_error!r}: expected {', '.join(ON_ERROR)}"
            )
        if restart is not None and restart not in RESTART:
            raise AppError(
                f"agent {name!r} has restart={restart!r}: expected {', '.join(RESTART)}"
            )
        if max_memory is not None and (not isinstance(max_memory, int) or max_memory < 1):
            raise AppError(
                f"agent {name!r} has max_memory={max_memory!r}: expected a number of bytes"
            )
        if nice is not None and (not isinstance(nice, int) or not 0 <= nice <= 19):
            raise AppError(f"agent {name!r} has nice={nice!r}: expected 0 to 19")
        self.app = app
        self.fun = fun
        self.name = name
        self.label = name  # the short name, once the app is complete
        self.channel = channel
        self.concurrency = concurrency
        self.deterministic = deterministic
        self.sinks: list[Sink] = list(sink)
        self.group = ""  # worked out when the app is complete
        self.group_wanted = group
        self.processes = least  # the least, with `auto`
        self.auto = auto
        self.on_error = on_error
        self.retries = retries
        self.timeout_s = timeout
        self.restart = restart
        self.max_memory_bytes = max_memory
        self.nice = nice
        self.yields = inspect.isasyncgenfunction(fun)
        self.__doc__ = fun.__doc__
        self.__name__ = getattr(fun, "__name__", name)
        self.__module__ = fun.__module__
        if self.sinks and not self.yields:
            raise AppError(f"agent {name!r} has a sink but yields nothing to it")
        # The topic's own coroutine function: one call fewer for each record.
        self.send: Callable[..., Awaitable[Sent]] = channel.send
        self.send_soon: Callable[..., Sent] = channel.send_soon

    def __repr__(self) -> str:
        return f"<Agent {self.name}>"

    def __call__(self, stream: Any) -> Any:
        return self.fun(stream)

    @property
    def help(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.fun) or "").partition("\n")[0]

    def get_topic_names(self) -> list[str]:
        """The topics that it reads."""
        return [topic.name for topic in self.channel.parts]

    def add_sink(self, sink: Sink) -> None:
        """Pass what the agent yields to one more function, topic or agent."""
        self.sinks.append(sink)

    async def cast(
        self,
        value: Any = None,
        *,
        key: Any = None,
        partition: int | None = None,
        timestamp: float | None = None,
        headers: HeadersArgument = None,
    ) -> Sent:
        """Send a value to the agent and want no reply."""
        return await self.channel.send(
            key=key, value=value, partition=partition, timestamp=timestamp, headers=headers
        )

    async def ask(
        self,
        value: Any = None,
        *,
        key: Any = None,
        partition: int | None = None,
        timestamp: float | None = None,
        headers: HeadersArgument = None,
        timeout: float | None = None,
    ) -> Any:
        """Send a value to the agent and wait for what it yields for it.

        The request is sent at once, outside the checkpoint of the event that asks, so after a
        crash it may be sent again.

        Args:
            timeout: Seconds to wait; `reply_timeout` of the settings where left out.

        Raises:
            ReplyTimeout: Nothing came in time.
            AgentFailed: The agent gave up on the event.
        """
        return await (
            await self.ask_nowait(
                value, key=key, partition=partition, timestamp=timestamp, headers=headers
            )
        ).wait(self.app.settings.reply_timeout if timeout is None else timeout)

    async def ask_nowait(
        self,
        value: Any = None,
        *,
        key: Any = None,
        partition: int | None = None,
        timestamp: float | None = None,
        headers: HeadersArgument = None,
    ) -> "ReplyPromise":
        """Send a request; the promise is awaited for the reply."""
        sender = current_scope.get() or self.app.current_client
        if sender is None:
            raise no_scope(f"ask of {self.name!r}")
        replies: Replies = await self.app.replies()
        promise = replies.expect(self)
        asked = [*header_list(headers), *replies.request_headers(promise)]
        record = self.channel.encode(
            key, value, partition=partition, timestamp=timestamp, headers=asked
        )
        await sender.send_now(self.channel.name, record)
        return promise

    async def map(
        self, values: Iterable[Any], key: Any = None, timeout: float | None = None
    ) -> AsyncIterator[Any]:
        """Ask with every value; yield the replies as they come."""
        asked = [
            asyncio.ensure_future(self.ask(value, key=key, timeout=timeout)) for value in values
        ]
        try:
            for reply in asyncio.as_completed(asked):
                yield await reply
        finally:
            for ask in asked:
                ask.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def join(
        self, values: Iterable[Any], key: Any = None, timeout: float | None = None
    ) -> list[Any]:
        """Ask with every value; the replies in the order of the values."""
        return list(
            await asyncio.gather(
                *(self.ask(value, key=key, timeout=timeout) for value in values)
            )
        )


class ReplyPromise:
    """A reply that is still to come."""

    def __init__(self, replies: "Replies", agent: Agent, correlation_id: str) -> None:
        self.correlation_id = correlation_id
        self._replies = replies
        self._agent = agent
        self._future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def fulfil(self, value: Any) -> None:
        """The reply came."""
        if not self._future.done():
            self._future.set_result(value)

    def fail(self, error: Exception) -> None:
        """The agent gave up."""
        if not self._future.done():
            self._future.set_exception(error)
            self._future.exception()  # looked at: perhaps nobody awaits the promise

    async def wait(self, timeout_s: float | None = None) -> Any:
        """Wait for the reply; see `Agent.ask`."""
        scope = current_scope.get()
        if scope is not None:
            scope.asking(self._agent.name, +1)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._future
        except TimeoutError:
            raise ReplyTimeout(
                f"agent {self._agent.name!r} did not reply in {timeout_s:g} s",
                remedy="give `ask` a longer timeout, or look at `streamd status`"
                if self._agent.yields
                else "it never replies, for it yields nothing: yield the reply, or use cast",
            ) from None
        finally:
            self._replies.forget(self)
            if scope is not None:
                scope.asking(self._agent.name, -1)

    def __await__(self) -> Any:
        return self.wait(None).__await__()


class Replies:
    """The replies that this process waits for, and the topic they come to."""

    def __init__(self, topic: str, partition: int = 0) -> None:
        self.topic = topic
        self.partition = partition
        self._waiting: dict[str, ReplyPromise] = {}  # correlation id -> promise

    def expect(self, agent: Agent) -> ReplyPromise:
        """A promise with a new correlation id."""
        promise = ReplyPromise(self, agent, uuid.uuid4().hex)
        self._waiting[promise.correlation_id] = promise
        return promise

    def forget(self, promise: ReplyPromise) -> None:
        """Nobody waits for it any more."""
        self._waiting.pop(promise.correlation_id, None)

    def request_headers(self, promise: ReplyPromise) -> list[tuple[str, bytes]]:
        """What tells the agent where to reply to."""
        return [
            (REPLY_TO, self.topic.encode()),
            (CORRELATION_ID, promise.correlation_id.encode()),
        ]

    def expects(self, correlation_id: str) -> bool:
        """True where the reply is awaited in this process."""
        return correlation_id in self._waiting

    def arrived(self, correlation_id: str, value: Any, error: str | None = None) -> None:
        """A reply came, the first counts; one that nobody waits for is dropped."""
        if promise := self._waiting.pop(correlation_id, None):
            if error is None:
                promise.fulfil(value)
            else:
                promise.fail(AgentFailed(error))


def labels(names: Sequence[str]) -> dict[str, str]:
    """The short name of each agent: its function's where that is unique, else the whole."""
    short = [name.rpartition(".")[2] for name in names]
    return {
        name: last if short.count(last) == 1 else name
        for name, last in zip(names, short, strict=True)
    }
