"""Where user code runs: the scope that its sends, table writes and asks belong to.

A scope is set for the whole task of an agent, a timer's tick or a page's view, and inherited
by the tasks that such code starts. `Topic.send` and the tables find the engine through it;
code that runs in no scope (a command, a script) sends through the app's client.
"""

from collections.abc import Awaitable, Callable, Generator
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

from streamd.errors import StreamdError


class RecordMetadata(NamedTuple):
    """Where a record was placed; `offset` is None while it is not durable."""

    topic: str
    partition: int
    offset: int | None
    timestamp: float


class Lane:
    """Records for one partition, as columns, in the order in which they were sent."""

    __slots__ = ("keys", "values", "timestamps", "headers", "events", "sources")

    def __init__(self) -> None:
        self.keys: list[bytes | None] = []
        self.values: list[bytes | None] = []
        self.timestamps: dict[int, float] = {}  # index -> unix seconds, where one was given
        self.headers: dict[int, list[tuple[str, bytes]]] = {}  # index -> headers
        self.events: list[int] = []  # where the scope `traces`: 1 + the index of each's event
        self.sources: Any = None  # what became of `events` when they were settled


Lanes = dict[str, dict[int, Lane]]  # topic -> partition -> records


class Sending(Protocol):
    """What `send` needs of the place where it runs."""

    lanes: Lanes
    """Records sent and not yet handed to a checkpoint."""

    may_wait: bool
    """False in an agent: the sends of one event never wait."""

    traces: bool
    """True where each record's lane is to know for which event it is; see `Lane.events`."""

    async def wait_room(self) -> None:
        """Wait until less is buffered; called after a send where `may_wait`."""

    async def wait_durable(self) -> None:
        """Wait until everything sent so far is durable."""

    async def send_now(self, topic: str, record: "Record") -> RecordMetadata:
        """Append one record at once, outside any checkpoint."""

    def engine_name(self) -> str:
        """The group that runs here, for messages."""


class Record(NamedTuple):
    """One encoded record on its way to a partition."""

    partition: int
    key: bytes | None
    value: bytes | None
    timestamp: float | None
    headers: list[tuple[str, bytes]]

    @property
    def size_bytes(self) -> int:
        """Of all that it carries."""
        carried = len(self.key or b"") + len(self.value or b"")
        return carried + sum(len(name) + len(value) for name, value in self.headers)


current_scope: ContextVar[Any] = ContextVar("streamd_scope", default=None)


class Buffered:
    """The result of `await topic.send()`: awaiting it waits until the record is durable.

    Inside an agent it returns at once and its offset is None, since the record is made
    durable by the checkpoint that also settles the event.
    """

    __slots__ = ("_scope", "_metadata")

    def __init__(self, scope: Any, metadata: RecordMetadata) -> None:
        self._scope = scope
        self._metadata = metadata

    def __await__(self) -> Generator[Any, None, RecordMetadata]:
        if self._scope.may_wait:
            yield from self._scope.wait_durable().__await__()
        return self._metadata


class Placed:
    """The result of a send that is durable already."""

    __slots__ = ("_metadata",)

    def __init__(self, metadata: RecordMetadata) -> None:
        self._metadata = metadata

    def __await__(self) -> Generator[Any, None, RecordMetadata]:
        yield from ()
        return self._metadata


Sent = Awaitable[RecordMetadata]


def no_scope(what: str) -> StreamdError:
    """The error for user code that needs a running app and has none."""
    return StreamdError(
        f"{what} outside of a running app",
        remedy="call it in an agent, task, timer, page or command, "
        "or inside `async with app.client():`",
    )


Callback = Callable[[RecordMetadata], Awaitable[None] | None]
