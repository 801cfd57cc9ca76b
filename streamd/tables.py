"""Tables: a dict that is sharded by partition, changelogged by checkpoint, and exact.

A table has three faces, and a Table object takes the one that is right where it lives:
`Table` before anything runs (reading and writing raise), `Held` in a process of its own group
(reads and writes are those of a dict), `Foreign` in every other process (reads ask the owner,
writes raise). In one process that runs several groups, `Checked` looks at who asks.

A held table is itself the dict of what the current partition's events wrote: plain `dict`
speed for a hit. What it does not hold, `__missing__` finds in the partition: written since the
last checkpoint (`pending`), being made durable (`flight`), committed (`base`).
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from streamd.codecs import Codec, type_name
from streamd.context import current_scope
from streamd.errors import DecodeError, EncodeError, TableError


class _Sentinel:
    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


ABSENT: Any = _Sentinel("ABSENT")
DELETED: Any = _Sentinel("DELETED")

# Stored beside the rows of a scattered table, in the transaction that first scatters it.
SCATTERED_MARK = b"\0scattered"


class Stored:
    """A value kept as the bytes it was stored as, since user code could change it in place."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data


class Part:
    """One partition of a table in the process that owns it."""

    __slots__ = ("pending", "flight", "base")

    def __init__(self, base: dict[Any, Any]) -> None:
        self.pending: dict[Any, Any] = {}  # key -> value or DELETED; since the last checkpoint
        self.flight: dict[Any, Any] | None = None  # the same; in the checkpoint under way
        self.base = base  # key -> value, or Stored where the value could be changed in place

    def find(self, key: Any) -> Any:
        """The newest value: live, Stored, DELETED or ABSENT."""
        value = self.pending.get(key, ABSENT)
        if value is ABSENT and self.flight is not None:
            value = self.flight.get(key, ABSENT)
        return self.base.get(key, ABSENT) if value is ABSENT else value

    def put(self, written: dict[Any, Any]) -> None:
        """Take over what was written; `written` is the caller's no more."""
        if self.pending:
            self.pending.update(written)
        else:
            self.pending = written

    def keys(self) -> set[Any]:
        """Every key that has a value now."""
        keys = set(self.base)
        for layer in (self.flight or {}, self.pending):
            for key, value in layer.items():
                if value is DELETED:
                    keys.discard(key)
                else:
                    keys.add(key)
        return keys


class Remote(Protocol):
    """How a process reads a table of another process."""

    def get(self, table: str, key: bytes, partition: int) -> bytes | None:
        """The committed value, or None; blocks up to a deadline."""

    async def get_soon(self, table: str, key: bytes, partition: int) -> bytes | None:
        """The same without blocking the loop."""


class Table(dict[Any, Any]):
    """What `app.Table(...)` returns; see the module.

    Args:
        default: Called for the value of a key that has none; without it, KeyError.
        partitions: As many as its group's topics have, unless given.
        key_type, value_type, key_serializer, value_serializer: as for a topic; JSON.
        help: One line for `streamd tables`.
    """

    __slots__ = (
        "app", "name", "default", "partitions", "help", "key_type", "value_type",
        "key_codec", "value_codec", "group", "remote", "scattered", "_part", "_parts", "_place",
        "_plain", "_plain_keys", "_handed", "most_bytes",
    )  # fmt: skip

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(
        self,
        app: Any,
        name: str,
        *,
        default: Callable[[], Any] | None,
        partitions: int | None,
        help: str,
        key_type: type | None,
        value_type: type | None,
        key_codec: Codec,
        value_codec: Codec,
    ) -> None:
        super().__init__()
        self.app = app
        self.name = name
        self.default = default
        self.partitions = partitions
        self.most_bytes = sys.maxsize  # of key and value of a row, where there is a limit
        self.help = help
        self.key_type = key_type
        self.value_type = value_type
        self.key_codec = key_codec
        self.value_codec = value_codec
        self.group = ""  # worked out when the app is complete
        self.remote: Remote | None = None  # set where the table is foreign
        self.scattered = False  # a key was written in a partition that it does not hash to
        self._plain = _plain_types(value_codec)  # classes whose values are kept as they are
        self._plain_keys = _plain_types(key_codec)
        self._parts: dict[int, Part] = {}  # partition -> what this process holds of it
        self._part: Any = None  # whose events write now: a Part, a Spread, or nobody's
        self._place: Callable[[Any], int] = lambda key: 0  # key -> partition it hashes to
        # key -> copies that were handed out and their bytes then; only with `debug`
        self._handed: dict[Any, list[tuple[Any, bytes | None]]] = {}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    # Reading and writing before the app runs.

    def _unbound(self) -> NoReturn:
        raise TableError(
            f"table {self.name!r} was used outside of a running app",
            remedy="use it in an agent, task, timer or page",
        )

    def __missing__(self, key: Any) -> Any:
        self._unbound()

    def __setitem__(self, key: Any, value: Any) -> None:
        self._unbound()

    def __delitem__(self, key: Any) -> None:
        self._unbound()

    def __contains__(self, key: Any) -> bool:
        self._unbound()

    def __iter__(self) -> Iterator[Any]:
        self._unbound()

    def __len__(self) -> int:
        self._unbound()

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def get(self, key: Any, default: Any = None) -> Any:
        """The value of `key`, else `default` (never the table's own default)."""
        self._unbound()

    def keys(self) -> Any:
        """The keys that this process holds, all partitions."""
        return list(self)

    def values(self) -> Any:
        """The values that this process holds, all partitions."""
        return [value for _, value in self.items()]

    def items(self) -> Any:
        """The (key, value) pairs that this process holds, all partitions."""
        return [(key, self[key]) for key in self]

    def pop(self, key: Any, *default: Any) -> Any:
        """Remove `key` and return its value."""
        value = self.get(key, ABSENT)
        if value is ABSENT:
            if default:
                return default[0]
            raise KeyError(key)
        del self[key]
        return value

    def popitem(self) -> Any:
        """Remove and return any (key, value) pair."""
        for key in self:
            return key, self.pop(key)
        raise KeyError(f"table {self.name!r} is empty")

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """The value of `key`; set to `default` first where it has none."""
        value = self.get(key, ABSENT)
        if value is ABSENT:
            self[key] = value = default
        return value

    def update(self, *others: Any, **named: Any) -> None:
        """Set every pair of a mapping or an iterable of pairs."""
        for other in others:
            pairs: Iterable[Any] = other.items() if isinstance(other, Mapping) else other
            for key, value in pairs:
                self[key] = value
        for name, value in named.items():
            self[name] = value

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def __or__(self, other: Any) -> Any:
        return self.copy() | dict(other)

    def __ror__(self, other: Any) -> Any:
        return dict(other) | self.copy()

    def __reversed__(self) -> Iterator[Any]:
        return iter(list(self)[::-1])

    def clear(self) -> None:
        """Remove every key that this process holds."""
        for key in list(self):
            del self[key]

    def copy(self) -> dict[Any, Any]:
        """A plain dict of what this process holds."""
        return dict(self.items())

    async def lookup(self, key: Any) -> Any:
        """The committed value of `key`, wherever it is held; the default where it has none.

        Raises:
            KeyError: The key has no value and the table no default.
            TimedOut: Its owner did not answer.
        """
        partition = self._place(key)
        if part := self._parts.get(partition):
            return self._live(part.base.get(key, ABSENT), key)
        if self.remote is None:
            self._unbound()
        data = await self.remote.get_soon(self.name, self.key_codec.encode(key), partition)
        return self._live(ABSENT if data is None else Stored(data), key)

    # What the engine calls.

    def hold(self, parts: dict[int, Part], place: Callable[[Any], int], checked: bool) -> None:
        """This process owns these partitions from now on."""
        self._parts, self._part, self._place = parts, None, place
        if checked:
            self.__class__ = Checked
        else:
            self.__class__ = Held if self._has_plain_values() else HeldValues

    def gain(self, partition: int, part: Part) -> None:
        """This process owns one more partition."""
        self._parts[partition] = part

    def lose(self, partition: int) -> None:
        """A partition is another process's from now on."""
        self._parts.pop(partition, None)
        self._part = None

    def _has_plain_values(self) -> bool:
        """True where the declaration says that values are numbers, texts and the like."""
        if self.value_type is not None:
            return self.value_type in self._plain
        return self.default is not None and self.default in self._plain

    def look_elsewhere(self, remote: Remote, place: Callable[[Any], int]) -> None:
        """This process does not run the table's group: reads go to the owner."""
        self.remote, self._place = remote, place
        self.__class__ = Foreign

    def enter(self, partition: int | None) -> None:
        """From now on user code's writes belong to `partition`; None: each to its hash's."""
        self.flush()
        self._part = Spread(self) if partition is None else self._parts.get(partition)

    def flush(self) -> bool:
        """Move what was written into its partition; True where anything was.

        Raises:
            TableError: A key was written whose partition is elsewhere; nothing of it is kept.
        """
        if not dict.__len__(self):
            return False
        written = dict(dict.items(self))
        dict.clear(self)
        if self._part is None:
            raise TableError(
                f"table {self.name!r} was written by no event: {len(written)} keys are dropped",
                remedy="write it in an agent, timer, task or page, not in a thread or callback",
            )
        self._part.put(written)
        return True

    def snapshot(self) -> list[tuple[int, list[tuple[bytes, bytes | None]]]]:
        """Start a checkpoint: (partition, changed rows), from now on in flight.

        Raises:
            EncodeError: A key or value cannot be stored; call `drop` then.
        """
        self.flush()
        changes = []
        for partition, part in self._parts.items():
            if part.pending:
                rows = self._rows(part.pending)
                part.flight, part.pending = part.pending, {}
                changes.append((partition, rows))
        if not self.scattered:
            for partition, rows in changes:
                if self._is_scattered(self._parts[partition], partition):
                    self.scattered = True
                    rows.append((SCATTERED_MARK, b"1"))
                    break
        return changes

    def _rows(self, written: dict[Any, Any]) -> list[tuple[bytes, bytes | None]]:
        """What was written as rows; values that are not plain are kept as their bytes."""
        encode_key, encode = self.key_codec.encode, self.value_codec.encode
        key_of_str, value_of_int = self.key_codec.encode_atom, self.value_codec.encode_atom
        plain_keys, plain = self._plain_keys, self._plain
        rows: list[tuple[bytes, bytes | None]] = []
        key = value = None
        try:
            for key, value in written.items():
                kind = key.__class__
                if kind not in plain_keys:
                    data = self._key_bytes(key)
                elif kind is str:
                    data = key_of_str(key)
                else:
                    data = encode_key(key)
                kind = value.__class__
                if kind in plain:
                    rows.append((data, value_of_int(value) if kind is int else encode(value)))
                elif value is DELETED:
                    rows.append((data, None))
                else:
                    # The same bytes are read from now on: who has the value may change it.
                    stored = written[key] = self._stored(value)
                    rows.append((data, stored.data))
        except EncodeError:
            raise
        except Exception as error:
            raise self.value_codec.encode_error(value, error) from error
        most = self.most_bytes
        for data, coded in rows if most < sys.maxsize else ():
            if coded is not None and len(data) + len(coded) > most:
                raise EncodeError(
                    f"a row of table {self.name!r} has {len(data) + len(coded)} bytes, and the "
                    f"cluster takes {most}: the value of key {self.decode_key(data)!r:.80}",
                    remedy="spread it over several keys, or raise max.message.bytes of the "
                    "table's changelog, up to 1 MB",
                )
        return rows

    def check(self) -> None:
        """See whether what was written since the last checkpoint can be stored.

        Raises:
            EncodeError: It cannot.
        """
        for written in (dict(dict.items(self)), *(p.pending for p in self._parts.values())):
            self._rows(written)

    def _key_bytes(self, key: Any) -> bytes:
        """A key as bytes that give the key again."""
        try:
            data = self.key_codec.encode(key)
        except Exception as error:
            raise self.key_codec.encode_error(key, error) from error
        if self.decode_key(data) != key:
            raise EncodeError(
                f"key {key!r} of table {self.name!r} would come back as "
                f"{self.decode_key(data)!r} after a restart",
                remedy=f"give the table key_type={type_name(key.__class__)}",
            )
        return data

    def _stored(self, value: Any) -> Stored:
        """A value as bytes that give a value again."""
        if value.__class__ is Stored:
            return value
        try:
            data = self.value_codec.encode(value)
        except Exception as error:
            raise self.value_codec.encode_error(value, error) from error
        if self.value_type is not None and value.__class__ is not self.value_type:
            try:
                self.value_codec.decode(data)
            except DecodeError as error:
                raise EncodeError(
                    f"table {self.name!r} takes {type_name(self.value_type)}, not {value!r}"
                ) from error
        return Stored(data)

    def _is_scattered(self, part: Part, partition: int) -> bool:
        """True where a key came into the partition that hashes to another one."""
        base, place = part.base, self._place
        assert part.flight is not None
        return any(place(key) != partition for key in part.flight if key not in base)

    def landed(self) -> None:
        """The checkpoint is durable: what was in flight is committed."""
        for part in self._parts.values():
            if part.flight is None:
                continue
            base = part.base
            for key, value in part.flight.items():
                if value is DELETED:
                    base.pop(key, None)
                else:
                    base[key] = value
            part.flight = None

    def drop(self) -> None:
        """Take back what no checkpoint holds."""
        dict.clear(self)
        for part in self._parts.values():
            part.pending, part.flight = {}, None

    def load(self, rows: Sequence[tuple[bytes, bytes]]) -> dict[Any, Any]:
        """Stored rows as the base of a partition."""
        if any(key == SCATTERED_MARK for key, _ in rows):
            self.scattered = True
            rows = [row for row in rows if row[0] != SCATTERED_MARK]
        keys = map(_hashable, self.key_codec.decode_many([key for key, _ in rows]))
        values = self.value_codec.decode_many([value for _, value in rows])
        plain = self._plain
        return {
            key: value if value.__class__ in plain else Stored(data)
            for key, value, (_, data) in zip(keys, values, rows, strict=True)
        }

    def committed(self, key: Any, partition: int | None = None) -> bytes | None:
        """The committed value as bytes, or None. Safe to call from any thread.

        Args:
            partition: Where to look; None: in every partition that this process holds.
        """
        parts = list(self._parts.values()) if partition is None else [self._parts[partition]]
        for part in parts:
            value = part.base.get(key, ABSENT)
            if value is not ABSENT:
                return (
                    value.data if isinstance(value, Stored) else self.value_codec.encode(value)
                )
        return None

    def held_keys(self) -> int:
        """How many committed keys this process holds."""
        return sum(len(part.base) for part in self._parts.values())

    def held_partitions(self) -> list[int]:
        """The partitions that this process holds."""
        return list(self._parts)

    def place(self, key: Any) -> int:
        """The partition that `key` hashes to."""
        return self._place(key)

    def decode_key(self, data: bytes) -> Any:
        """A key from the bytes it is stored as."""
        return _hashable(self.key_codec.decode(data))

    def committed_items(self) -> Iterator[tuple[Any, bytes]]:
        """Every committed (key, value bytes) held here; safe to call from any thread."""
        for part in list(self._parts.values()):
            for key, value in part.base.copy().items():
                yield (
                    key,
                    value.data if isinstance(value, Stored) else self.value_codec.encode(value),
                )

    def _live(self, value: Any, key: Any) -> Any:
        """What user code gets for a value as it is kept."""
        if value.__class__ in self._plain:
            return value
        if value.__class__ is Stored:
            return self.value_codec.decode(value.data)
        if value is ABSENT or value is DELETED:
            if self.default is None:
                raise KeyError(key)
            return self.default()
        # Written since the last checkpoint: a copy, so that changing it without assigning
        # it does the same before a checkpoint as after one: nothing.
        return self.value_codec.decode(self._stored(value).data)


class Spread:
    """The partition of code that has none (a page, a timer): each key goes to its hash's."""

    __slots__ = ("_table", "flight", "base")

    def __init__(self, table: Table) -> None:
        self._table = table
        self.flight = None
        self.base: dict[Any, Any] = {}

    @property
    def pending(self) -> "Spread":
        return self

    def get(self, key: Any, default: Any) -> Any:
        """The same, as a dict's `get`, so that a Spread can stand for `pending`."""
        value = self.find(key)
        return default if value is ABSENT else value

    def find(self, key: Any) -> Any:
        """The newest value of `key` in its own partition, as `Part.find`."""
        return self._part_of(key).find(key)

    def put(self, written: dict[Any, Any]) -> None:
        """Move each key to its partition; none where one of them is elsewhere."""
        parts = [(self._part_of(key), key, value) for key, value in written.items()]
        for part, key, value in parts:
            part.pending[key] = value

    def _part_of(self, key: Any) -> Part:
        if self._table.scattered and (having := self._having(key)) is not None:
            return having
        partition = self._table.place(key)
        try:
            return self._table._parts[partition]
        except KeyError:
            raise TableError(
                f"key {key!r} of table {self._table.name!r} is in partition {partition}, "
                "which another process holds",
                remedy="give the page `@app.table_route`, or send the change to an agent",
            ) from None

    def _having(self, key: Any) -> Part | None:
        """The one partition that has the key of a scattered table; None: no one has it."""
        having = [
            part
            for part in self._table._parts.values()
            if part.find(key) is not ABSENT and part.find(key) is not DELETED
        ]
        if len(having) > 1:
            raise ScatteredError(self._table.name, key)
        return having[0] if having else None


class ScatteredError(TableError):
    """A key of a table has a value in several partitions."""

    def __init__(self, table: str, key: Any) -> None:
        super().__init__(
            f"key {key!r} of table {table!r} has a value in several partitions",
            remedy="key the events by the table's key: send them to an agent with key=",
        )


class Held(Table):
    """A table in a process of its group. `self` is the dict of what was written."""

    __slots__ = ()

    __setitem__ = dict.__setitem__

    def __missing__(self, key: Any) -> Any:
        part = self._part
        if part is None:
            return self._live(self._find_anywhere(key), key)
        value = part.pending.get(key, ABSENT)
        if value is ABSENT:
            if part.flight is not None:
                value = part.flight.get(key, ABSENT)
            if value is ABSENT:
                value = part.base.get(key, ABSENT)
        if value.__class__ in self._plain:
            return value
        return self._live(value, key)

    def _find_anywhere(self, key: Any) -> Any:
        part = self._parts.get(self._place(key))
        return ABSENT if part is None else part.find(key)

    def _current(self, key: Any) -> Any:
        value = dict.get(self, key, ABSENT)
        if value is not ABSENT:
            return value
        return self._find_anywhere(key) if self._part is None else self._part.find(key)

    def __delitem__(self, key: Any) -> None:
        if key not in self:
            raise KeyError(key)
        dict.__setitem__(self, key, DELETED)
        self.flush()

    def __contains__(self, key: Any) -> bool:
        value = self._current(key)
        return value is not ABSENT and value is not DELETED

    def get(self, key: Any, default: Any = None) -> Any:
        value = self._current(key)
        if value is ABSENT or value is DELETED:
            return default
        return value if value.__class__ in self._plain else self._live(value, key)

    def __iter__(self) -> Iterator[Any]:
        self.flush()
        seen: set[Any] = set()
        for part in list(self._parts.values()):
            for key in part.keys() - seen:
                seen.add(key)
                yield key

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def items(self) -> Any:
        self.flush()
        return [
            (key, self._live(part.find(key), key))
            for part in list(self._parts.values())
            for key in part.keys()
        ]


class HeldValues(Held):
    """A held table whose values could be changed in place: only their bytes are kept.

    So a change that is not assigned does the same at any time, nothing; and what cannot be
    stored is an error where it is assigned.
    """

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        value = dict.__getitem__(self, key)
        return self.value_codec.decode(value.data) if value.__class__ is Stored else value

    def __setitem__(self, key: Any, value: Any) -> None:
        if value.__class__ not in self._plain:
            value = self._stored(value)
        dict.__setitem__(self, key, value)


class Foreign(Table):
    """A table of another group: reads ask its owner for the committed value."""

    __slots__ = ()

    def _refuse(self) -> NoReturn:
        scope = current_scope.get()
        here = scope.engine_name() if scope is not None else "another group"
        raise TableError(
            f"table {self.name!r} belongs to group {self.group!r} and is written only there; "
            f"this code runs in {here!r}",
            remedy=f"send the change to an agent of {self.group!r}, "
            f"or put both in one group with group={self.group!r}",
        )

    def _ask(self, key: Any) -> Any:
        assert self.remote is not None
        data = self.remote.get(self.name, self.key_codec.encode(key), self._place(key))
        return ABSENT if data is None else Stored(data)

    def __getitem__(self, key: Any) -> Any:
        return self._live(self._ask(key), key)

    def __missing__(self, key: Any) -> Any:
        return self._live(self._ask(key), key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._refuse()

    def __delitem__(self, key: Any) -> None:
        self._refuse()

    def __contains__(self, key: Any) -> bool:
        return self._ask(key) is not ABSENT

    def get(self, key: Any, default: Any = None) -> Any:
        value = self._ask(key)
        return default if value is ABSENT else self._live(value, key)

    def __iter__(self) -> Iterator[Any]:
        raise TableError(
            f"the keys of table {self.name!r} of group {self.group!r} cannot be listed here",
            remedy=f"list them in code of that group, or `streamd table {self.name}`",
        )

    def __len__(self) -> int:
        iter(self)
        return 0


class Checked(HeldValues):
    """A held table in a process that runs several groups: only its own group writes it."""

    __slots__ = ()

    def _at_home(self) -> bool:
        scope = current_scope.get()
        return scope is not None and scope.engine_name() == self.group

    def _committed_here(self, key: Any) -> Any:
        part = self._parts.get(self._place(key))
        return ABSENT if part is None else part.base.get(key, ABSENT)

    def _refuse(self) -> NoReturn:
        Foreign._refuse(self)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> Any:
        if self._at_home():
            return HeldValues.__getitem__(self, key)
        return self._live(self._committed_here(key), key)

    def __setitem__(self, key: Any, value: Any) -> None:
        if not self._at_home():
            self._refuse()
        HeldValues.__setitem__(self, key, value)

    def __delitem__(self, key: Any) -> None:
        if not self._at_home():
            self._refuse()
        Held.__delitem__(self, key)

    def _current(self, key: Any) -> Any:
        return Held._current(self, key) if self._at_home() else self._committed_here(key)

    def __iter__(self) -> Iterator[Any]:
        if self._at_home():
            return Held.__iter__(self)
        return iter({key: None for part in self._parts.values() for key in part.base})

    def items(self) -> Any:
        return Held.items(self) if self._at_home() else [(key, self[key]) for key in self]


def _plain_types(codec: Codec) -> frozenset[type]:
    """The classes whose values cannot change, and come back from their bytes as they were."""
    plain = set()
    for value in (None, True, 1, 1.5, "text", b"bytes"):
        try:
            again = codec.decode(codec.encode(value))
        except Exception:
            continue  # not of the codec's type
        if again == value and again.__class__ is value.__class__:
            plain.add(value.__class__)
    return frozenset(plain)


def _hashable(key: Any) -> Any:
    """A decoded key that a dict takes: JSON has no tuples."""
    return tuple(map(_hashable, key)) if key.__class__ is list else key
