"""An event: one record as an agent sees it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from streamd.context import Sent
from streamd.topics import HeadersArgument


class Message(NamedTuple):
    """Where an event came from."""

    topic: str
    partition: int
    offset: int
    timestamp: float  # unix seconds
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()  # all of them, in order


class Event:
    """A decoded record: `.key`, `.value`, `.headers`, and its `.message`."""

    __slots__ = ("app", "key", "value", "headers", "message")

    def __init__(
        self, app: Any, key: Any, value: Any, headers: dict[str, bytes], message: Message
    ) -> None:
        self.app = app
        self.key = key
        self.value = value
        self.headers = headers
        self.message = message

    def __repr__(self) -> str:
        place = f"{self.message.topic}[{self.message.partition}]@{self.message.offset}"
        return f"<Event {place} key={self.key!r} value={self.value!r}>"

    async def send(self, channel: Any, **record: Any) -> Sent:
        """Send this event's key and value to another topic or agent; keywords replace them."""
        return await channel.send(  # type: ignore[no-any-return]
            **{"key": self.key, "value": self.value, "headers": self.headers, **record}
        )

    async def forward(
        self, channel: Any, *, headers: HeadersArgument = None, **record: Any
    ) -> Sent:
        """The same, with the bytes as they came where key and value are not replaced."""
        came = self.message.headers
        as_they_are = came if dict(came) == self.headers else self.headers
        plain: dict[str, Any] = {"headers": headers or as_they_are}
        if "key" not in record:
            plain |= {"key": self.message.key, "key_serializer": "raw"}
        if "value" not in record:
            plain |= {"value": self.message.value, "value_serializer": "raw"}
        return await channel.send(**{**plain, **record})  # type: ignore[no-any-return]
