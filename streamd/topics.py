"""A topic: a name, the codecs of its keys and values, and the way to send to it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streamd.codecs import Codec, codec_for
from streamd.context import (
    Callback,
    Placed,
    Record,
    RecordMetadata,
    Sent,
    current_scope,
    no_scope,
)
from streamd.errors import AppError, EncodeError
from streamd.partition import fast_partition_for
from streamd.patterns import MARK, is_pattern

# Of a str key: its bytes, its partition, most bytes of a value beside it, what a send returns.
_Remembered = tuple[bytes, int, int, Sent]

HeadersArgument = Mapping[str, Any] | Sequence[tuple[str, Any]] | None

# Placed keys remembered for each topic: a key of a hot set is hashed once.
REMEMBERED_KEYS = 20_000
# As good as no limit, and an int of one digit, which is compared in half the time.
NO_LIMIT_BYTES = (1 << 30) - 1
_ATOMS = frozenset({str, int, bool})  # what `Codec.encode_atom` takes


class Topic:
    """What `app.topic(...)` returns.

    Iterated over by agents; anything may send to it. Sending inside an agent puts the record
    into the checkpoint that settles the event: it is neither lost nor doubled.
    """

    def __init__(
        self,
        app: Any,
        name: str,
        *,
        key_type: type | None,
        value_type: type | None,
        key_serializer: str | Codec | None,
        value_serializer: str | Codec | None,
        partitions: int | None,
        retention_s: float | None,
        owned: bool,
        packed: bool | None = None,
        offset_reset: str | None = None,
        replicas: int | None = None,
        compacting: bool | None = None,
        deleting: bool | None = None,
        config: Mapping[str, Any] | None = None,
        help: str = "",
    ) -> None:
        self.app = app
        self.name = name
        self.key_type = key_type
        self.value_type = value_type
        self._serializers = key_serializer, value_serializer
        self.partitions = partitions  # None: as `topic_partitions` says
        self.retention_s = retention_s
        self.owned = owned
        self.parts: tuple[Topic, ...] = (
            self,
        )  # several: it is read as one, and sent to the first
        self.offset_reset = offset_reset  # None: as `consumer_auto_offset_reset` says
        # On Kafka only:
        self.packed = owned if packed is None else packed
        self.replicas = replicas  # None: as `topic_replication_factor` says
        self.compacting = compacting
        self.deleting = deleting
        self.config = {name: _config_text(value) for name, value in (config or {}).items()}
        self.help = help
        self.use_serializers("raw", "json")
        self._most_bytes = NO_LIMIT_BYTES
        self._remembered: dict[str, _Remembered] = {}
        self._sent: dict[int, Sent] = {}  # partition -> what a send in an agent returns
        self._hash: Callable[[bytes, int], int] | None = None

    def __repr__(self) -> str:
        return f"<Topic {self.name}>"

    def use_serializers(self, key_default: str, value_default: str) -> None:
        """Take these where the declaration named none."""
        key_serializer, value_serializer = self._serializers
        self.key_codec = codec_for(key_serializer, self.key_type, default=key_default)
        self.value_codec = codec_for(value_serializer, self.value_type, default=value_default)
        self._encode = self.value_codec.encode
        self._encode_atom = self.value_codec.encode_atom

    @property
    def most_bytes(self) -> int:
        """Of key and value of a record, where there is a limit."""
        return self._most_bytes

    @most_bytes.setter
    def most_bytes(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._remembered.clear()

    @property
    def has_typed_keys(self) -> bool:
        """False where keys are plain bytes, of which none is wrong."""
        return self.key_codec.name not in ("raw", "binary") or self.key_type is not None

    @property
    def partition_count(self) -> int:
        """How many partitions the topic has."""
        return self.partitions or int(self.app.settings.topic_partitions)

    @property
    def begins_at(self) -> str:
        """Where an agent begins that has never read it: earliest, latest or error."""
        if self.owned:
            # What was sent to an agent before it ran for the first time is its to do.
            return "earliest"
        return self.offset_reset or str(self.app.settings.consumer_auto_offset_reset)

    def get_topic_name(self) -> str:
        """The name that the broker knows."""
        return self.name

    async def send(
        self,
        *,
        key: Any = None,
        value: Any = None,
        partition: int | None = None,
        timestamp: float | None = None,
        headers: HeadersArgument = None,
        key_serializer: str | Codec | None = None,
        value_serializer: str | Codec | None = None,
        callback: Callback | None = None,
        force: bool = False,
    ) -> Sent:
        """Send one record; returns when it is buffered.

        `await (await topic.send(...))` waits until the record is durable and gives its
        RecordMetadata; inside an agent, which its checkpoint makes durable, it returns at
        once. The offset is known in commands and scripts only; elsewhere it is None, since the
        place in the log is chosen with the checkpoint.

        Args:
            key: Chooses the partition, as Kafka's clients do.
            timestamp: Unix seconds; now where it is left out.
            callback: Called with the RecordMetadata once the record is durable.
            force: Taken for Faust's sake; sends are never held back for a commit of theirs.

        Raises:
            EncodeError: The key or value cannot be written as the topic's type.
            StreamdError: There is no running app to send through.
        """
        scope = current_scope.get()
        if (
            key.__class__ is str
            and value is not None
            and partition is None
            and timestamp is None
            and headers is None
            and key_serializer is None
            and value_serializer is None
            and callback is None
            and scope is not None
            and not scope.may_wait
        ):
            # The hot path: one record of many that an agent sends with a str key.
            try:
                data, place, room_bytes, sent = self._remembered[key]
            except KeyError:
                data, place, room_bytes, sent = self._remember(key)
            try:
                if value.__class__ in _ATOMS:
                    encoded = self._encode_atom(value)
                else:
                    encoded = self._encode(value)
            except Exception as error:
                raise self.value_codec.encode_error(value, error) from error
            if len(encoded) > room_bytes:
                raise self._too_large(len(encoded) + len(data))
            lane = scope.lanes[self.name][place]
            lane.values.append(encoded)
            lane.keys.append(data)
            if scope.traces:
                lane.events.append(scope.stream.index)
            return sent
        record = self._record(key, value, partition, timestamp, headers,
                              key_serializer, value_serializer)  # fmt: skip
        if scope is None:
            return await self._send_outside(record, callback)
        buffered = self._buffer(scope, record, callback)
        if scope.may_wait:
            await scope.wait_room()
        return buffered

    def send_soon(
        self,
        *,
        key: Any = None,
        value: Any = None,
        partition: int | None = None,
        timestamp: float | None = None,
        headers: HeadersArgument = None,
        key_serializer: str | Codec | None = None,
        value_serializer: str | Codec | None = None,
        callback: Callback | None = None,
        force: bool = False,
    ) -> Sent:
        """Send one record from code that is not async; never waits.

        Raises:
            StreamdError: There is no running app; outside of one, use `await topic.send()`.
        """
        scope = current_scope.get()
        if scope is None:
            raise no_scope(f"send_soon to {self.name!r}")
        record = self._record(key, value, partition, timestamp, headers,
                              key_serializer, value_serializer)  # fmt: skip
        return self._buffer(scope, record, callback)

    def encode(
        self,
        key: Any,
        value: Any,
        *,
        partition: int | None = None,
        timestamp: float | None = None,
        headers: HeadersArgument = None,
    ) -> Record:
        """A record of this topic, encoded and placed."""
        return self._record(key, value, partition, timestamp, headers, None, None)

    def _hashed(self, data: bytes) -> int:
        if self._hash is None:
            self._refuse_to_send()
            self._hash = fast_partition_for()
        return self._hash(data, self.partition_count)

    def _remember(self, key: str) -> "_Remembered":
        data = _encoded(self.key_codec, key)
        place = self._hashed(data)
        if len(self._remembered) >= REMEMBERED_KEYS:
            self._remembered.clear()
        sent = self._sent.get(place)
        if sent is None:
            sent = self._sent[place] = Placed(RecordMetadata(self.name, place, None, 0.0))
        found = self._remembered[key] = data, place, self._most_bytes - len(data), sent
        return found

    def _buffer(self, scope: Any, record: Record, callback: Callback | None) -> Sent:
        """Put a record where the scope's next checkpoint finds it."""
        size_bytes = record.size_bytes
        if size_bytes > self.most_bytes:
            raise self._too_large(size_bytes)
        lane = scope.lanes[self.name][record.partition]
        lane.values.append(record.value)
        lane.keys.append(record.key)
        if scope.traces:
            lane.events.append(scope.stream.index)
        if record.timestamp is not None:
            lane.timestamps[len(lane.keys) - 1] = record.timestamp
        if record.headers:
            lane.headers[len(lane.keys) - 1] = record.headers
        if callback is not None:
            moment = record.timestamp or 0.0
            scope.when_durable(
                callback, RecordMetadata(self.name, record.partition, None, moment)
            )
        return scope.buffered(self.name, record.partition)  # type: ignore[no-any-return]

    def _record(
        self,
        key: Any,
        value: Any,
        partition: int | None,
        timestamp: float | None,
        headers: HeadersArgument,
        key_serializer: str | Codec | None,
        value_serializer: str | Codec | None,
    ) -> Record:
        self._refuse_to_send()
        key_codec = self.key_codec
        if key_serializer is not None:
            key_codec = codec_for(key_serializer, None, default="raw")
        value_codec = self.value_codec
        if value_serializer is not None:
            value_codec = codec_for(value_serializer, None, default="json")
        data = None if key is None else _encoded(key_codec, key)
        if partition is not None and not 0 <= partition < self.partition_count:
            raise EncodeError(
                f"topic {self.name!r} has the partitions 0 to {self.partition_count - 1}, "
                f"not {partition!r}"
            )
        if partition is None:
            scope = current_scope.get()
            if data is not None:
                partition = self._hashed(data)
            else:
                partition = -1 if scope is None else scope.turn() % self.partition_count
        encoded = None if value is None else _encoded(value_codec, value)
        return Record(partition, data, encoded, timestamp, header_list(headers))

    def _refuse_to_send(self) -> None:
        if is_pattern(self.name):
            raise AppError(
                f"the topics that match {self.name.removeprefix(MARK)!r} are read, not sent to",
                remedy="app.topic(name) for the one that is meant",
            )

    def _too_large(self, size_bytes: int) -> EncodeError:
        return EncodeError(
            f"a record for topic {self.name!r} has {size_bytes} bytes, and the cluster takes "
            f"{self.most_bytes}",
            remedy="send where it is kept, not what it is; or raise max.message.bytes of the "
            "topic, up to 1 MB",
        )

    async def _send_outside(self, record: Record, callback: Callback | None) -> Sent:
        client = self.app.current_client
        if client is None:
            raise no_scope(f"send to {self.name!r}")
        sent: Sent = await client.send(self.name, record)
        if callback is not None:
            outcome = callback(await sent)
            if outcome is not None:
                await outcome
        return sent


def _config_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _encoded(codec: Codec, value: Any) -> bytes:
    try:
        return codec.encode(value)
    except Exception as error:
        raise codec.encode_error(value, error) from error


def header_list(headers: HeadersArgument) -> list[tuple[str, bytes]]:
    """Headers as a list of (name, bytes)."""
    if not headers:
        return []
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    return [(name, _header_bytes(name, value)) for name, value in pairs]


def _header_bytes(name: str, value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise EncodeError(f"header {name!r} has the value {value!r}: expected str or bytes")
