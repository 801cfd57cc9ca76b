"""A stream: what an agent iterates over.

`async for value in stream` is the hot path: the events of one stride are handed out by index,
without a suspension. When the stride is used up the source settles it and gives the next.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from streamd.events import Event

T = TypeVar("T")


class Source(Protocol):
    """Where a stream's events come from; one for each running instance of an agent."""

    async def advance(self) -> None:
        """Settle what was handed out, then wait for events and give the stream a stride.

        Raises:
            StopAsyncIteration: The agent is to end.
        """

    async def advance_unsettled(self, timeout_s: float | None) -> bool:
        """Give the stream one more stride without settling; False after `timeout_s`."""

    def settle(self) -> None:
        """Settle what was handed out."""

    def hand_out(self) -> None:
        """What `advance_unsettled` gave counts as being worked on from now on."""

    def event(self, index: int) -> Event:
        """The event at an index of the current stride's values."""

    def keys(self) -> Sequence[Any]:
        """The decoded keys beside the current stride's values."""


class Stream(Generic[T]):
    """The events of an agent's topic, in order within each partition."""

    __slots__ = ("values", "index", "end", "source", "task_owner", "concurrency_index")

    def __init__(self, source: Source, concurrency_index: int | None = None) -> None:
        self.values: Sequence[T] = ()
        self.index = 0  # of the next event in `values`
        self.end = 0  # where the stride ends in `values`
        self.source = source
        self.task_owner: asyncio.Task[Any] | None = None
        self.concurrency_index = concurrency_index

    def __aiter__(self) -> "Stream[T]":
        return self

    async def __anext__(self) -> T:
        index = self.index
        if index < self.end:
            self.index = index + 1
            return self.values[index]
        await self.source.advance()
        index = self.index
        self.index = index + 1
        return self.values[index]

    @property
    def current_event(self) -> Event | None:
        """The event being worked on."""
        return self.source.event(self.index - 1) if self.index else None

    def events(self) -> AsyncIterator[Event]:
        """The same events as Event objects, with key, headers and message."""
        return _Events(self)

    def items(self) -> AsyncIterator[tuple[Any, T]]:
        """The same events as (key, value)."""
        return _Items(self)

    async def enumerate(self, start: int = 0) -> AsyncIterator[tuple[int, T]]:
        """The same events with a running number."""
        number = start
        async for value in self:
            yield number, value
            number += 1

    async def take(self, max_: int, within: float | None = None) -> AsyncIterator[list[T]]:
        """Lists of up to `max_` values.

        A list is given when it is full, or `within` seconds after its first value came;
        without `within` only when it is full. A list is settled as a whole, when the next one
        is asked for; what is in an unfinished list counts as not read yet. A value whose list
        failed is given again in a list of its own.
        """
        async for batch, _ in self._batches(max_, within):
            yield batch

    async def take_events(
        self, max_: int, within: float | None = None
    ) -> AsyncIterator[list[Event]]:
        """The same as lists of Event objects."""
        async for _, events in self._batches(max_, within, with_events=True):
            yield events

    async def _batches(
        self, max_: int, within: float | None, with_events: bool = False
    ) -> AsyncIterator[tuple[list[T], list[Event]]]:
        if max_ < 1:
            raise ValueError(f"stream.take({max_!r}): expected 1 or more")
        clock = asyncio.get_running_loop().time
        while True:
            batch: list[T] = []
            events: list[Event] = []
            deadline: float | None = None
            self.source.settle()
            while len(batch) < max_:
                if self.index == self.end:
                    left = None if deadline is None else max(0.0, deadline - clock())
                    try:
                        if not await self.source.advance_unsettled(left):
                            break
                    except StopAsyncIteration:
                        return
                if deadline is None and within is not None:
                    deadline = clock() + within
                taken = min(self.end, self.index + max_ - len(batch))
                batch.extend(self.values[self.index : taken])
                if with_events:
                    events.extend(map(self.source.event, range(self.index, taken)))
                self.index = taken
            self.source.hand_out()
            yield batch, events


class _Events:
    """`Stream.events()`."""

    def __init__(self, stream: Stream[Any]) -> None:
        self._stream = stream

    def __aiter__(self) -> "_Events":
        return self

    async def __anext__(self) -> Event:
        stream = self._stream
        if stream.index == stream.end:
            await stream.source.advance()
        stream.index += 1
        return stream.source.event(stream.index - 1)


class _Items:
    """`Stream.items()`."""

    def __init__(self, stream: Stream[Any]) -> None:
        self._stream = stream

    def __aiter__(self) -> "_Items":
        return self

    async def __anext__(self) -> tuple[Any, Any]:
        stream = self._stream
        if stream.index == stream.end:
            await stream.source.advance()
        index = stream.index
        stream.index = index + 1
        return stream.source.keys()[index], stream.values[index]
