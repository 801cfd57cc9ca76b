"""Values to bytes and back: what a topic's `serializer` and `type` mean.

`codec_for("json", Word, default="json")` gives a `Codec`, made once for a topic. Serializers:

    json      any type msgspec knows; without a type: plain data. With `str`: a JSON string,
              or else the UTF-8 text itself, since that is what plain producers write
    raw       bytes; str as UTF-8; int, float and bool as text
    binary    base64 of what raw writes
    msgpack   as json, and bytes too
    a|b       a first, then b over its bytes: "json|binary"
    others    what `register` was given

Reading is strict: whatever the bytes are, `decode` gives a value of the type or raises
`DecodeError`. None is no value and never comes here: its bytes are None. It does no I/O.
"""

import binascii
import copy as copying
import dataclasses
import datetime
import decimal
import functools
import math
import re
import types
import typing
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from streamd.errors import ConfigError, DecodeError, EncodeError

PLAIN_TYPES: Mapping[str, type | None] = types.MappingProxyType(
    {"": None, "str": str, "int": int, "float": float, "bool": bool, "bytes": bytes}
)

_SHOWN_BYTES = 80
_SHOWN_CHARS = 80

# What a JSON string looks like, valid or not in its surrogates.
_JSON_STRING = re.compile(
    rb'[ \t\r\n]*"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"[ \t\r\n]*'
)


class Codec:
    """Writes and reads the values of one type in one form.

    `encode` may be a C function, for its speed, and then raises what that raises:
    `encode_error` explains it. A subclass may define `_dumps` and `_loads` as in Faust.

    Attributes:
        name: The serializer's name: "json", "json|binary".
        type: What `decode` gives; None: plain data, or bytes where the name is "raw".
        encode: A value, never None, to bytes.
        encode_atom: The same for a str, int or bool, in whose classes nothing is to be checked.
    """

    name: str
    type: Any
    encode: Callable[[Any], bytes]
    encode_atom: Callable[[Any], bytes]

    def __init__(
        self,
        name: str = "",
        encode: Callable[[Any], bytes] | None = None,
        decode: Callable[[bytes], Any] | None = None,
        *,
        type: Any = None,
    ) -> None:
        self.name = name or self.__class__.__name__.lower()
        self.type = type
        self.encode = self.encode_atom = encode or self._dumps
        self._decode = decode or self._loads
        # Tried first for a chunk; where it gives a value, `_decode` gives the same.
        self._decode_fast = self._decode
        # From text a value is read as JSON, whatever the codec's own form is.
        self._from_json: Callable[[str], Any] | None = None

    def __repr__(self) -> str:
        return f"<Codec {self.name} of {type_name(self.type) or 'plain data'}>"

    def _dumps(self, value: Any) -> bytes:
        raise EncodeError(f"the codec {self.name!r} has no encode")

    def _loads(self, data: bytes) -> Any:
        raise DecodeError(f"the codec {self.name!r} has no decode")

    def decode(self, data: bytes) -> Any:
        """The value of these bytes.

        Raises:
            DecodeError: The bytes are no value of the type.
        """
        try:
            return self._decode(data)
        except MemoryError:
            raise
        except Exception as error:
            raise self._decode_error(data, error) from error

    def decode_many(self, chunk: list[bytes | None]) -> list[Any]:
        """The values of a chunk, None for None; much faster than one by one.

        Raises:
            DecodeError: One of them is no value of the type; `decode` tells which.
        """
        for decode in (self._decode_fast, self._decode):
            try:
                return [None if data is None else decode(data) for data in chunk]
            except MemoryError:
                raise
            except Exception as error:
                refused = error
        for data in chunk:
            if data is not None:
                self.decode(data)
        raise DecodeError(f"the codec {self.name!r} failed once") from refused

    def encode_error(self, value: Any, error: Exception) -> EncodeError:
        """What `encode` raised for this value, in words."""
        if isinstance(error, EncodeError):
            return error
        return EncodeError(
            f"{_shown(value)} cannot be written as {self._words()}: {_reason(error)}",
            remedy="send a value of the topic's type, or give the topic another serializer",
        )

    def readings(self, text: str) -> list[Any]:
        """The values that this text may mean, the likeliest first.

        A str is the text as it is. Otherwise it is JSON of the type, or the text of one
        ("2026-01-31" for a date). Without a type `3` may be the number or the word.

        Raises:
            DecodeError: The text is no value of the type.
        """
        if self.type is str:
            return [_checked_text(text)]
        if self.type is bytes or (self.type is None and self._from_json is None):
            return [_checked_text(text).encode()]
        decode = self._from_json or _json_reader(self.type)
        found: list[Any] = []
        refused: list[Exception] = []
        for candidate in (text, _to_json(_checked_text(text)).decode()):
            try:
                found.append(decode(candidate))
            except (ValueError, RecursionError) as error:
                refused.append(error)
        if not found:
            # Who wrote an object or a list meant JSON; anything else is the text of a value.
            reason = refused[0] if text.lstrip().startswith(("{", "[")) else refused[-1]
            raise DecodeError(
                f"{text[:_SHOWN_CHARS]!r} is no {type_name(self.type)}: {_reason(reason)}"
            )
        return found

    def from_text(self, text: str) -> Any:
        """The value that a person typed or a URL holds: the first of `readings`.

        Raises:
            DecodeError: The text is no value of the type.
        """
        return self.readings(text)[0]

    def to_text(self, value: Any) -> str:
        """A value for people: str as it is, bytes as UTF-8, anything else as JSON.

        Raises:
            EncodeError: The value has no JSON.
        """
        if isinstance(value, str):
            return value
        if isinstance(value, bytes):
            return value.decode(errors="backslashreplace")
        try:
            return _to_json(value).decode()
        except (TypeError, ValueError, RecursionError) as error:
            raise self.encode_error(value, error) from error

    def _words(self) -> str:
        return f"{self.name} of {type_name(self.type)}" if self.type else self.name

    def _decode_error(self, data: bytes, error: Exception) -> DecodeError:
        if isinstance(error, DecodeError):
            return error
        return DecodeError(f"{_shown(data)} is not {self._words()}: {_reason(error)}")


def register(name: str, codec: Any) -> None:
    """Give a serializer a name. A second `register` of the name replaces the first.

    Args:
        name: Letters, digits, `_`, `-` and `.`; not one of the built-in names.
        codec: A `Codec`, or any object with `encode` and `decode`, or `dumps` and `loads`.

    Raises:
        ConfigError: The name is taken or cannot be one, or the object is no codec.
    """
    if name in _BUILT_IN or name in _REFUSED:
        raise ConfigError(f"the codec name {name!r} belongs to streamd: choose another")
    if not re.fullmatch(r"[\w.-]+", name):
        raise ConfigError(
            f"{name!r} cannot name a codec: letters, digits, '_', '-' and '.' can"
        )
    _registered[name] = _adopt(name, codec)


def codec_for(serializer: str | Codec | None, type: Any, *, default: str) -> Codec:
    """The codec of a topic's keys or values.

    Args:
        serializer: A name, a chain of names, a codec, or None: the type's own (a Record's
            `serializer=`), else `default`, else, where that cannot write the type, json.
        type: What is read and written; None: plain data.
        default: "raw" for keys, "json" for values.

    Raises:
        ConfigError: There is no such serializer, or it cannot write this type.
    """
    if serializer is None:
        serializer = getattr(type, "__serializer__", None)
    if serializer is None:
        serializer = default
        if serializer in {"raw", "binary"} and type not in _RAW:
            serializer = "json"
    if not isinstance(serializer, str):
        return _typed(_adopt("", serializer), type)
    first, *further = (_named(name, serializer) for name in serializer.split("|"))
    codec = first(type)
    for stage in further:
        codec = _chained(codec, stage, serializer)
    return codec


@functools.lru_cache(maxsize=256)
def _built_in(name: str, type_text: str) -> Codec | None:
    parts = name.split("|")
    if type_text not in PLAIN_TYPES or any(part not in _BUILT_IN for part in parts):
        return None
    try:
        return codec_for(name, PLAIN_TYPES[type_text], default=name)
    except ConfigError:
        return None


def key_bytes(text: str, codec: str, type_name: str) -> bytes | None:
    """The bytes of a key in a URL, where codec and type are built in; None otherwise.

    >>> key_bytes("the", "raw", "str"), key_bytes("the", "json", "str")
    (b'the', b'"the"')
    >>> key_bytes("the", "avro", "str") is None
    True

    Raises:
        DecodeError: The text is no value of the type ("abc" for an int).
    """
    found = _built_in(codec, type_name)
    return None if found is None else found.encode(found.from_text(text))


def type_name(type: Any) -> str:
    """A type as the frames and people name it: "" for None, "str", "Word", "list[int]".

    >>> type_name(dict[str, int | None])
    'dict[str, int | None]'
    """
    if type is None:
        return ""
    origin, parts = typing.get_origin(type), typing.get_args(type)
    if type is types.NoneType:
        return "None"
    if type is Ellipsis:
        return "..."
    if origin is typing.Annotated:
        return type_name(parts[0])
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, parts))}]"
    if origin in {types.UnionType, typing.Union}:
        return " | ".join(map(type_name, parts))
    if parts:
        return f"{type_name(origin)}[{', '.join(map(type_name, parts))}]"
    return str(getattr(type, "__name__", type))


# json

_BINARY = frozenset({bytes, bytearray, memoryview})


def _json(type: Any) -> Codec:
    if type in _BINARY:
        raise ConfigError(
            f"JSON has no {type.__name__}",
            remedy='use serializer="raw", or "binary" for base64',
        )
    decode = _json_reader(type)
    codec = Codec(
        "json", _json_writer(type), _text_reader(decode) if type is str else decode, type=type
    )
    codec.encode_atom = _to_json
    codec._decode_fast = codec._from_json = decode
    return codec


def _json_writer(type: Any) -> Callable[[Any], bytes]:
    to_json = _to_json
    binary = _BINARY

    def encode(value: Any) -> bytes:
        # msgspec would write base64, which comes back as a str.
        if value.__class__ in binary:
            raise EncodeError(
                f"{_shown(value)} cannot be written as JSON, which has no bytes",
                remedy='send a str, or give the topic serializer="raw"',
            )
        return to_json(value)

    def encode_checked(value: Any) -> bytes:
        data = encode(value)
        # msgspec writes null for what JSON has no number for; it would come back as None.
        if b"null" in data and _has_no_number(value):
            raise EncodeError(
                f"{_shown(value)} cannot be written as JSON, which has no NaN and no infinity",
                remedy="send None, or give the topic serializer='msgpack'",
            )
        return data

    return encode_checked if _may_hold_float(type) else encode


def _text_reader(decode: Callable[[Any], Any]) -> Callable[[bytes], str]:
    def decode_text(data: bytes) -> str:
        # No JSON string begins otherwise: the exception is spared where text is plain.
        if not data or data[0] in b'"\n\r\t ':
            try:
                text: str = decode(data)
                return text
            except (msgspec.DecodeError, UnicodeDecodeError):
                if _JSON_STRING.fullmatch(data):
                    raise
        return data.decode()

    return decode_text


def _json_reader(type: Any) -> Callable[[Any], Any]:
    decode: Callable[[Any], Any] = _decoder(msgspec.json.Decoder, type).decode
    return decode


def _decoder(kind: Any, type: Any) -> Any:
    if type is None:
        return kind()
    try:
        if isinstance(msgspec.inspect.type_info(type), msgspec.inspect.CustomType):
            raise TypeError("it is not a Record, a dataclass or a type of Python's own")
        return kind(type, strict=not _coerces(type), dec_hook=_read_custom)
    except (TypeError, NameError) as error:
        raise ConfigError(
            f"values of type {type_name(type)} cannot be read: {_reason(error)}",
            remedy="use a streamd.Record, a dataclass, or register a codec for it",
        ) from error


def _coerces(type: Any) -> bool:
    """True for a Record that wants "3" read as 3 where its field is an int."""
    return bool(getattr(type, "__coerce__", False))


def _read_custom(expected: Any, data: Any) -> Any:
    raise ValueError(f"there is no way to read {type_name(expected)}")


def _write_custom(value: Any) -> Any:
    if isinstance(value, deque):
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    represent = getattr(value, "__json__", None)
    if represent is None:
        raise TypeError(f"there is no way to write {type_name(value.__class__)}")
    return represent()


_to_json: Callable[[Any], bytes] = msgspec.json.Encoder(enc_hook=_write_custom).encode


def _may_hold_float(type: Any) -> bool:
    """True unless it is certain that no value of the type holds a float."""
    seen: set[Any] = set()

    def may(info: Any) -> bool:
        if isinstance(info, msgspec.inspect.FloatType | msgspec.inspect.AnyType):
            return True
        if isinstance(info, msgspec.inspect.CustomType | msgspec.inspect.RawType):
            return True
        identity = getattr(info, "cls", None)
        if identity is not None:
            if identity in seen:
                return False
            seen.add(identity)
        parts: list[Any] = []
        for name in ("fields", "types", "item_types"):
            parts += [getattr(part, "type", part) for part in getattr(info, name, ())]
        for name in ("item_type", "key_type", "value_type"):
            parts += [part for part in [getattr(info, name, None)] if part is not None]
        return any(may(part) for part in parts)

    return type is None or may(msgspec.inspect.type_info(type))


def _has_no_number(value: Any) -> bool:
    """True where a NaN or an infinity is anywhere in the value."""
    if isinstance(value, float):
        return not math.isfinite(value)
    if value.__class__ in ATOMS:
        return False
    if isinstance(value, Mapping):
        return any(_has_no_number(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple | set | frozenset | deque):
        return any(map(_has_no_number, value))
    if isinstance(value, msgspec.Struct):
        return any(_has_no_number(getattr(value, name)) for name in value.__struct_fields__)
    if dataclasses.is_dataclass(value):
        return any(
            _has_no_number(getattr(value, field.name)) for field in dataclasses.fields(value)
        )
    return False


# raw and binary


def _raw(type: Any) -> Codec:
    if type not in _RAW:
        raise ConfigError(
            f"the raw codec writes bytes, str, int, float and bool, not {type_name(type)}",
            remedy='use serializer="json"',
        )
    encode, decode = _RAW[type]
    return Codec("raw", encode, decode, type=type)


def _binary(type: Any) -> Codec:
    return _chained(_raw(type), _base64, "binary")


def _raw_write_bytes(value: Any) -> bytes:
    if value.__class__ is bytes:
        written: bytes = value
        return written
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise EncodeError(
        f"{_shown(value)} cannot be written as raw, which takes bytes and str",
        remedy="give the topic the value's type, or serializer='json'",
    )


def _raw_read_bytes(data: bytes) -> bytes:
    return data


def _raw_write_int(value: Any) -> bytes:
    if not isinstance(value, int) or isinstance(value, bool):
        raise EncodeError(f"{_shown(value)} is no int")
    return b"%d" % value


def _raw_read_int(data: bytes) -> int:
    number = int(data)
    # int() also takes spaces, underscores, a plus: one number has one key.
    if b"%d" % number != data:
        raise ValueError("digits are expected, without spaces, signs of plus or leading zeros")
    return number


def _raw_write_float(value: Any) -> bytes:
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not math.isfinite(value)
    ):
        raise EncodeError(f"{_shown(value)} is no finite float")
    return repr(float(value)).encode()


def _raw_read_float(data: bytes) -> float:
    number = float(data)
    if not math.isfinite(number) or b"_" in data:
        raise ValueError("a finite number is expected")
    return number


def _raw_write_bool(value: Any) -> bytes:
    if value.__class__ is not bool:
        raise EncodeError(f"{_shown(value)} is no bool")
    return b"true" if value else b"false"


def _raw_read_bool(data: bytes) -> bool:
    if data not in (b"true", b"false"):
        raise ValueError("true or false is expected")
    return data == b"true"


_RAW: Mapping[Any, tuple[Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    None: (_raw_write_bytes, _raw_read_bytes),
    bytes: (_raw_write_bytes, _raw_read_bytes),
    # The C functions themselves: a Python function around them would double their cost.
    str: (str.encode, bytes.decode),
    int: (_raw_write_int, _raw_read_int),
    float: (_raw_write_float, _raw_read_float),
    bool: (_raw_write_bool, _raw_read_bool),
}


def _to_base64(value: Any) -> bytes:
    return binascii.b2a_base64(_raw_write_bytes(value), newline=False)


def _from_base64(data: bytes) -> bytes:
    return binascii.a2b_base64(data, strict_mode=True)


_base64 = Codec("binary", _to_base64, _from_base64)


# msgpack


def _msgpack(type: Any) -> Codec:
    encode = msgspec.msgpack.Encoder(enc_hook=_write_custom).encode
    codec = Codec("msgpack", encode, _decoder(msgspec.msgpack.Decoder, type).decode, type=type)
    codec._from_json = _json_reader(type)
    return codec


# names, chains, users' codecs

_BUILT_IN: Mapping[str, Callable[[Any], Codec]] = {
    "json": _json,
    "raw": _raw,
    "binary": _binary,
    "msgpack": _msgpack,
}
_REFUSED = frozenset({"pickle", "pickle_restricted", "pickle_fickling"})
_registered: dict[str, Codec] = {}


def _named(name: str, whole: str) -> Callable[[Any], Codec]:
    name = name.strip()
    if name in _REFUSED:
        raise ConfigError(
            f"the codec {name!r} is refused: reading a pickle runs any code that its writer"
            " put in, so whoever can write to the topic owns this machine",
            remedy='use serializer="json" or "msgpack"',
        )
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    if name in _registered:
        codec = _registered[name]
        return lambda type: _typed(codec, type)
    known = ", ".join([*_BUILT_IN, *sorted(_registered)])
    where = f" in {whole!r}" if whole != name else ""
    raise ConfigError(
        f"there is no codec {name!r}{where}: there are {known}",
        remedy="register yours with streamd.codecs.register(name, codec) before the topic",
    )


def _chained(first: Codec, stage: Codec | Callable[[Any], Codec], name: str) -> Codec:
    if stage is _json or stage is _msgpack:
        raise ConfigError(
            f"the chain {name!r} is in the wrong order: json and msgpack can only be first"
        )
    if stage is _binary:
        stage = _base64
    second = stage if isinstance(stage, Codec) else stage(None)
    encode, over = first.encode, second.encode
    decode, under = first._decode, second._decode
    chain = Codec(
        name,
        lambda value: over(encode(value)),
        lambda data: decode(under(data)),
        type=first.type,
    )
    chain._from_json = first._from_json
    return chain


def _adopt(name: str, codec: Any) -> Codec:
    if isinstance(codec, Codec):
        return codec
    for write, read in (("encode", "decode"), ("dumps", "loads")):
        if callable(getattr(codec, write, None)) and callable(getattr(codec, read, None)):
            name = name or type_name(codec if isinstance(codec, type) else type(codec))
            return Codec(name, getattr(codec, write), getattr(codec, read))
    raise ConfigError(
        f"{codec!r} is no codec: it has neither encode and decode nor dumps and loads"
    )


def _typed(codec: Codec, type: Any) -> Codec:
    """A user's codec, which knows plain data only, for the values of a type."""
    if type is None or codec.type is not None or type in _RAW:
        return codec
    reader = _json_reader(type)
    encode, decode = codec.encode, codec._decode

    def encode_plain(value: Any) -> bytes:
        return encode(
            msgspec.to_builtins(value, builtin_types=NATIVE_TYPES, enc_hook=_write_custom)
        )

    def decode_typed(data: bytes) -> Any:
        return msgspec.convert(
            decode(data),
            type,
            strict=not _coerces(type),
            builtin_types=NATIVE_TYPES,
            dec_hook=_read_custom,
        )

    typed = Codec(codec.name, encode_plain, decode_typed, type=type)
    typed._from_json = reader
    return typed


NATIVE_TYPES = (
    bytes,
    bytearray,
    datetime.datetime,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    decimal.Decimal,
    uuid.UUID,
)
"""Classes that plain data may hold beside JSON's own."""

# copies

ATOMS = frozenset(
    {
        types.NoneType,
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        decimal.Decimal,
        uuid.UUID,
        datetime.datetime,
        datetime.date,
        datetime.time,
        datetime.timedelta,
        datetime.timezone,
    }
)
"""Classes whose values cannot change, so that they are their own copy."""


def copy(value: Any) -> Any:
    """A copy that shares nothing that can change: plain data and Records made cheap."""
    atoms = ATOMS
    kind = value.__class__
    if kind in atoms:
        return value
    if kind is dict:
        return {
            (key if key.__class__ in atoms else copy(key)): (
                part if part.__class__ in atoms else copy(part)
            )
            for key, part in value.items()
        }
    if kind is list:
        return [part if part.__class__ in atoms else copy(part) for part in value]
    if kind is tuple or kind is set or kind is frozenset:
        return kind([part if part.__class__ in atoms else copy(part) for part in value])
    if isinstance(value, msgspec.Struct):
        twin = copying.copy(value)
        for name in value.__struct_fields__:
            part = getattr(value, name)
            if part.__class__ not in atoms:
                msgspec.structs.force_setattr(twin, name, copy(part))
        return twin
    return copying.deepcopy(value)


# texts


def _checked_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DecodeError(f"{text[:_SHOWN_CHARS]!r} is no text: {_reason(error)}") from error
    return text


def _shown(value: Any) -> str:
    if isinstance(value, bytes | bytearray):
        tail = f"… ({len(value)} bytes)" if len(value) > _SHOWN_BYTES else ""
        return f"{bytes(value[:_SHOWN_BYTES])!r}{tail}"
    try:
        text = repr(value)
    except Exception as error:
        return (
            f"a {type_name(value.__class__)} whose repr fails with {error.__class__.__name__}"
        )
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    # Python's own errors quote what they were given, whole.
    text = str(error) or error.__class__.__name__
    return text if len(text) <= 2 * _SHOWN_CHARS else f"{text[: 2 * _SHOWN_CHARS]}…"
