"""Record: typed values, written as a class with annotated fields.

    class Word(streamd.Record):
        word: str
        n: int = 0

A Record is a msgspec Struct, read and written in C. Reading checks the types of all fields,
ignores fields that the class does not have (so a producer may be newer than its reader), and
drops Faust's `__faust` metadata. It does no I/O.
"""

import functools
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Self, dataclass_transform

import msgspec

from streamd.codecs import (
    ATOMS,
    NATIVE_TYPES,
    Codec,
    codec_for,
    copy,
    type_name,
)
from streamd.errors import ValidationError

# The field that holds Faust's metadata in Records with include_metadata=True; hidden in all
# that is shown of a Record.
_METADATA = "_faust"


class _Metadata(msgspec.Struct, frozen=True):
    ns: str


@dataclass_transform(field_specifiers=(msgspec.field,))
class _RecordMeta(msgspec.StructMeta):
    """Makes Record classes: takes Faust's options out, leaves msgspec's."""

    __serializer__: str | Codec | None
    __validation__: bool
    __coerce__: bool
    __namespace__: str
    __include_metadata__: bool

    def __new__(
        mcls,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        /,
        **options: Any,
    ) -> Any:
        if not any(isinstance(base, _RecordMeta) for base in bases):
            return super().__new__(mcls, name, bases, namespace, **options)
        parent: Any = next(base for base in bases if isinstance(base, _RecordMeta))
        serializer = options.pop("serializer", parent.__serializer__)
        validation = options.pop("validation", parent.__validation__)
        coerce = options.pop("coerce", parent.__coerce__)
        metadata = options.pop("include_metadata", parent.__include_metadata__)
        wire_name = options.pop("namespace", None) or f"{namespace['__module__']}.{name}"
        # Of no effect here: dates are always read, and an abstract class is one that
        # nobody makes objects of.
        options.pop("isodates", None)
        options.pop("abstract", None)

        if metadata or parent.__include_metadata__:
            hidden = _with_metadata(parent, wire_name if metadata else None)
            bases = tuple(hidden if base is parent else base for base in bases)
        _free_defaults(namespace)
        # Only these pay for a constructor in Python.
        kind = _CheckedMeta if (validation or coerce) and mcls is _RecordMeta else mcls
        made: Any = msgspec.StructMeta.__new__(kind, name, bases, namespace, **options)
        made.__serializer__ = serializer
        made.__validation__ = validation
        made.__coerce__ = coerce
        made.__namespace__ = wire_name
        made.__include_metadata__ = metadata
        return made


class _CheckedMeta(_RecordMeta):
    """The same for Records whose constructor checks or coerces."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        record = super().__call__(*args, **kwargs)
        # A child may have turned off what its parent asked for.
        return _checked(record) if cls.__validation__ or cls.__coerce__ else record


class Record(msgspec.Struct, metaclass=_RecordMeta, order=True):
    """A typed value with named fields.

    Class options: `serializer` (the topic's default for values of this class),
    `validation` (the constructor checks types), `coerce` (constructor and reading turn "3"
    into 3 where an int is wanted), `include_metadata` and `namespace` (write `__faust`, for
    readers that are Faust), and msgspec's own (`frozen`, `kw_only`, `rename` …).
    `isodates` and `abstract` are taken and change nothing.
    """

    __serializer__: ClassVar[str | Codec | None] = None
    __validation__: ClassVar[bool] = False
    __coerce__: ClassVar[bool] = False
    __namespace__: ClassVar[str] = ""
    __include_metadata__: ClassVar[bool] = False

    if typing.TYPE_CHECKING:

        def __init_subclass__(
            cls,
            *,
            serializer: str | Codec | None = None,
            validation: bool = False,
            coerce: bool = False,
            include_metadata: bool = False,
            isodates: bool = False,
            abstract: bool = False,
            namespace: str | None = None,
            **options: Any,
        ) -> None: ...

    def __hash__(self) -> int:
        return hash((self.__class__, *self._values()))

    def asdict(self) -> dict[str, Any]:
        """Fields and values as they are; Records inside stay Records."""
        return dict(zip(_fields(self.__class__), self._values(), strict=True))

    def to_representation(self) -> dict[str, Any]:
        """The whole as plain data: dicts, lists, str, numbers, bytes, dates."""
        plain: dict[str, Any] = msgspec.to_builtins(self, builtin_types=NATIVE_TYPES)
        return plain

    def dumps(self, *, serializer: str | Codec | None = None) -> bytes:
        """The bytes that a topic with this serializer would get.

        Raises:
            EncodeError: A value inside cannot be written.
            ConfigError: There is no such serializer.
        """
        codec = _codec(self.__class__, serializer)
        try:
            return codec.encode(self)
        except Exception as error:
            raise codec.encode_error(self, error) from error

    @classmethod
    def loads(
        cls,
        data: bytes | str,
        *,
        default_serializer: str | Codec | None = None,
        serializer: str | Codec | None = None,
    ) -> Self:
        """Read what `dumps` wrote.

        Raises:
            DecodeError: The bytes are no such Record.
            ConfigError: There is no such serializer.
        """
        codec = _codec(cls, serializer or cls.__serializer__ or default_serializer)
        record: Self = codec.decode(data.encode() if isinstance(data, str) else data)
        return record

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """A Record of plain data, checked; a Record of this class is given back as it is.

        Raises:
            ValidationError: A field is missing or has another type.
        """
        try:
            return msgspec.convert(data, cls, strict=not cls.__coerce__)
        except msgspec.ValidationError as error:
            raise ValidationError(f"the data is no {cls.__name__}: {error}") from error

    def derive(self, *objects: "Record", **fields: Any) -> Self:
        """A copy with the fields of `objects`, then `fields`, in place of its own.

        Raises:
            TypeError: The class has no such field.
        """
        changes = {name: value for other in objects for name, value in other.asdict().items()}
        changes.update(fields)
        unknown = changes.keys() - set(_fields(self.__class__))
        if unknown:
            raise TypeError(f"{self.__class__.__name__} has no field {_listed(unknown)}")
        derived = msgspec.structs.replace(self, **changes)
        checked = self.__validation__ or self.__coerce__
        return _checked(derived) if checked else derived

    def validate(self) -> list[ValidationError]:
        """What is wrong with the values of the fields, in their order; [] when nothing is."""
        return _examine(self)[1]

    def validate_or_raise(self) -> None:
        """Raise the first of `validate`.

        Raises:
            ValidationError: A field does not have its type.
        """
        for error in self.validate():
            raise error

    def is_valid(self) -> bool:
        """True when `validate` finds nothing."""
        return not self.validate()

    @property
    def validation_errors(self) -> list[ValidationError]:
        """What `validate` finds now."""
        return self.validate()

    def _values(self) -> list[Any]:
        return [getattr(self, name) for name in _fields(self.__class__)]


def describe(model: type[Record]) -> list[tuple[str, str, str | None]]:
    """The fields of a Record class in order: name, type, default as text (None: required).

    >>> class Word(Record):
    ...     word: str
    ...     n: int = 0
    >>> describe(Word)
    [('word', 'str', None), ('n', 'int', '0')]
    """
    hints = _hints(model)
    return [
        (field.name, type_name(hints[field.name]), _default_text(field))
        for field in msgspec.structs.fields(model)
        if field.name != _METADATA
    ]


def _default_text(field: msgspec.structs.FieldInfo) -> str | None:
    if field.default is not msgspec.NODEFAULT:
        return repr(field.default)
    if field.default_factory is not msgspec.NODEFAULT:
        return repr(field.default_factory())
    return None


@functools.lru_cache(maxsize=1024)
def _codec(cls: type[Record], serializer: str | Codec | None) -> Codec:
    return codec_for(serializer, cls, default="json")


@functools.lru_cache(maxsize=1024)
def _fields(cls: type[Record]) -> tuple[str, ...]:
    return tuple(name for name in cls.__struct_fields__ if name != _METADATA)


@functools.lru_cache(maxsize=1024)
def _hints(cls: type[Record]) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _checked(record: Any) -> Any:
    """The same Record, its values made those of its types.

    Raises:
        ValidationError: A value is not, and cannot be made, of its field's type.
    """
    converted, errors = _examine(record)
    if errors:
        raise ValidationError("; ".join(map(str, errors)))
    for name, value in converted.items():
        msgspec.structs.force_setattr(record, name, value)
    return record


def _examine(record: Record) -> tuple[dict[str, Any], list[ValidationError]]:
    """The values that had to be converted, and what could not be."""
    cls = record.__class__
    hints = _hints(cls)
    converted: dict[str, Any] = {}
    errors: list[ValidationError] = []
    for name in _fields(cls):
        value = getattr(record, name)
        try:
            # Records inside are taken apart: convert() trusts them as they are.
            plain = msgspec.to_builtins(value, builtin_types=NATIVE_TYPES)
            right = msgspec.convert(plain, hints[name], strict=not cls.__coerce__)
        except (msgspec.ValidationError, TypeError, RecursionError, UnicodeError) as error:
            errors.append(
                ValidationError(f"{cls.__name__}.{name} is {_shortly(value)}: {error}")
            )
        else:
            if right.__class__ is not value.__class__ or right != value:
                converted[name] = right
    return converted, errors


def _with_metadata(parent: Any, wire_name: str | None) -> Any:
    """A class between a Record and its parent that adds the metadata's field.

    It stands between, so that the field is the last and takes no place among the
    positional arguments. Without a name the field is there, since a parent has it, and is
    not written.
    """
    value = msgspec.UNSET if wire_name is None else _Metadata(wire_name)

    def __post_init__(self: Any) -> None:
        # What another writer's namespace was makes no two Records different.
        msgspec.structs.force_setattr(self, _METADATA, value)

    def __repr__(self: Any) -> str:
        fields = ", ".join(f"{name}={part!r}" for name, part in self.asdict().items())
        return f"{self.__class__.__name__}({fields})"

    namespace = {
        "__module__": parent.__module__,
        "__qualname__": parent.__qualname__,
        "__annotations__": {_METADATA: Any if wire_name else Any | msgspec.UnsetType},
        "__post_init__": __post_init__,
        "__repr__": __repr__,
        _METADATA: msgspec.field(default=value, name="__faust"),
    }
    kind = parent.__class__
    return msgspec.StructMeta.__new__(kind, parent.__name__, (parent,), namespace, kw_only=True)


def _free_defaults(namespace: dict[str, Any]) -> None:
    """Give each object its own copy of a default that can change."""
    for name in namespace.get("__annotations__", {}):
        default = namespace.get(name)
        if default.__class__ in ATOMS or not isinstance(
            default, list | dict | set | bytearray | msgspec.Struct
        ):
            continue
        namespace[name] = msgspec.field(default_factory=functools.partial(copy, default))


def _listed(names: set[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def _shortly(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
