import dataclasses
import datetime
import decimal
import doctest
import enum
import math
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamd import codecs
from streamd.codecs import ATOMS, Codec, codec_for, copy, key_bytes, register, type_name
from streamd.errors import ConfigError, DecodeError, EncodeError


class Color(enum.Enum):
    RED = "red"


class Point(msgspec.Struct):
    x: int
    tags: list[str] = []


@dataclasses.dataclass
class Pair:
    left: float
    right: "Pair | None" = None


TEXT = st.text(st.characters(codec="utf-8"))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | TEXT
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=20,
).filter(lambda value: value is not None)  # fmt: skip


# There and back


@given(PLAIN)
def test_plain_data_comes_back_through_json(value: Any) -> None:
    codec = codec_for("json", None, default="json")

    assert codec.decode(codec.encode(value)) == value


@given(
    st.dictionaries(
        TEXT, st.lists(st.binary() | st.integers(-(2**63), 2**64 - 1) | st.floats())
    )
)
def test_bytes_and_nan_come_back_through_msgpack(value: Any) -> None:
    codec = codec_for("msgpack", None, default="json")

    assert repr(codec.decode(codec.encode(value))) == repr(value)


@pytest.mark.parametrize("serializer", ["json", "raw", "binary", "msgpack", "json|binary"])
@given(text=TEXT)
def test_any_text_comes_back_through_each_serializer(serializer: str, text: str) -> None:
    codec = codec_for(serializer, str, default="json")

    assert codec.decode(codec.encode(text)) == text
    assert codec.decode_many([codec.encode(text), None]) == [text, None]


@pytest.mark.parametrize("serializer", ["raw", "binary", "msgpack"])
@given(data=st.binary())
def test_any_bytes_come_back(serializer: str, data: bytes) -> None:
    codec = codec_for(serializer, bytes, default="raw")

    assert codec.decode(codec.encode(data)) == data


@pytest.mark.parametrize("serializer", ["json", "raw", "binary", "msgpack", "raw|binary"])
@given(
    value=st.integers(-(2**63), 2**64 - 1)
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
)
def test_numbers_come_back_with_their_type(serializer: str, value: float) -> None:
    codec = codec_for(serializer, type(value), default="raw")
    back = codec.decode(codec.encode(value))

    assert (back, type(back)) == (value, type(value))


@pytest.mark.parametrize(
    ("type", "value", "data"),
    [
        (str, "é", b'"\xc3\xa9"'),
        (int, 10**25, b"10000000000000000000000000"),
        (float, 1.5, b"1.5"),
        (bool, True, b"true"),
        (dict[str, int], {"a": 1}, b'{"a":1}'),
        (list[Point], [Point(1)], b'[{"x":1,"tags":[]}]'),
        (Pair, Pair(1.0, Pair(2.0)), b'{"left":1.0,"right":{"left":2.0,"right":null}}'),
        (Color, Color.RED, b'"red"'),
        (decimal.Decimal, decimal.Decimal("1.50"), b'"1.50"'),
        (uuid.UUID, uuid.UUID(int=1), b'"00000000-0000-0000-0000-000000000001"'),
        (
            datetime.datetime,
            datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC),
            b'"2026-01-02T03:04:05Z"',
        ),
        (datetime.datetime, datetime.datetime(2026, 1, 2), b'"2026-01-02T00:00:00"'),
        (int | None, 3, b"3"),
        (set[int], {1}, b"[1]"),
        (Literal["a", "b"], "a", b'"a"'),
    ],
    ids=str,
)
def test_a_value_of_a_type_has_this_json(type: Any, value: Any, data: bytes) -> None:
    codec = codec_for(None, type, default="json")

    assert codec.encode(value) == data
    assert codec.decode(data) == value


def test_other_values_of_python_are_written_as_faust_does() -> None:
    codec = codec_for("json", None, default="json")

    class Money:
        def __json__(self) -> str:
            return "3 EUR"

    assert codec.encode([deque([1]), Counter("aa"), Money(), (1,), Color.RED]) == (
        b'[[1],{"a":2},"3 EUR",[1],"red"]'
    )


# JSON and str


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"hello", "hello"),
        (b'"hello"', "hello"),
        (b' "hello" ', "hello"),
        (b"", ""),
        (b"3", "3"),
        (b"null", "null"),
        (b'{"a":1}', '{"a":1}'),
        (b'"half', '"half'),
        (b'"one" and "two"', '"one" and "two"'),
        (b" space", " space"),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        ("é".encode(), "é"),
        (b'say \\ud800"', 'say \\ud800"'),
    ],
    ids=repr,
)
def test_a_str_is_a_json_string_or_the_text_itself(data: bytes, text: str) -> None:
    codec = codec_for("json", str, default="json")

    assert codec.decode(data) == text
    assert codec.decode_many([b'"a"', data, None]) == ["a", text, None]
    assert codec.decode_many([data]) == [text]


@given(st.binary(max_size=30) | TEXT.map(str.encode) | TEXT.map(msgspec.json.encode))
def test_a_record_reads_the_same_alone_and_in_a_chunk(data: bytes) -> None:
    codec = codec_for("json", str, default="json")

    def outcome(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except DecodeError as error:
            return str(error)

    alone = outcome(lambda: codec.decode(data))

    assert outcome(lambda: codec.decode_many([data])[0]) == alone
    assert outcome(lambda: codec.decode_many([b"plain", b'"json"', data])[2]) == alone


# Strict reading


HOSTILE = [
    b'"\\ud800"',
    b'"\\udc00x"',
    b'"\\ud800\\u0041"',
    b'"\xff"',
    b"\xff",
    b"9" * 5000,
    b"1e999",
    b"NaN",
    b"Infinity",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'"\xed\xa0\x80"',
    b"\x91" * 100_000,
    b"\x81\x80\x01",
    b"\xc7\x0c\xff" + b"\xff" * 12,
    b"",
    b"{}{}",
]
TYPES: dict[str, list[Any]] = {
    "json": [None, str, int, float, bool, Point, Pair, list[int], datetime.datetime, Color],
    "msgpack": [None, str, int, bytes, Point, dict[str, float]],
    "raw": [None, str, int, float, bool],
    "binary": [None, str, int],
    "json|binary": [None, str, Point],
}
CODECS = [
    codec_for(serializer, type, default="json")
    for serializer, types in TYPES.items()
    for type in types
]


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_hostile_bytes_give_a_value_or_a_decode_error(codec: Codec) -> None:
    for data in HOSTILE:
        try:
            codec.decode(data)
        except DecodeError as error:
            assert len(str(error)) < 600
            with pytest.raises(DecodeError):
                codec.decode_many([data])


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=40))
def test_any_bytes_give_a_value_that_can_be_written_or_a_decode_error(
    codec: Codec, data: bytes
) -> None:
    try:
        value = codec.decode(data)
    except DecodeError:
        return
    if value is not None:
        assert isinstance(codec.encode(value), bytes)


@pytest.mark.parametrize("data", HOSTILE[:12], ids=lambda data: repr(data[:12]))
def test_json_without_a_type_refuses_what_it_could_not_write(data: bytes) -> None:
    with pytest.raises(DecodeError):
        codec_for("json", None, default="json").decode(data)


@pytest.mark.parametrize("data", HOSTILE[:4], ids=repr)
def test_a_json_string_with_half_a_character_is_no_text(data: bytes) -> None:
    with pytest.raises(DecodeError):
        codec_for("json", str, default="json").decode(data)


@pytest.mark.parametrize("data", [b" 1", b"1_0", b"+1", b"01", b"-0", b"1.0", b"", b"x"])
def test_one_number_has_one_raw_key(data: bytes) -> None:
    with pytest.raises(DecodeError, match="is not raw of int"):
        codec_for("raw", int, default="raw").decode(data)


def test_the_error_names_the_bytes_the_type_and_the_place() -> None:
    with pytest.raises(DecodeError) as caught:
        codec_for("json", Point, default="json").decode(b'{"x":1,"tags":[2]}')

    assert str(caught.value) == (
        """b'{"x":1,"tags":[2]}' is not json of Point: """
        "Expected `str`, got `int` - at `$.tags[0]`"
    )


def test_one_bad_record_fails_its_chunk_with_its_own_error() -> None:
    with pytest.raises(DecodeError, match="b'bad' is not json"):
        codec_for("json", None, default="json").decode_many([b"1", None, b"bad", b"2"])


def test_a_users_codec_that_fails_gives_a_decode_error() -> None:
    def read(data: bytes) -> Any:
        raise ZeroDivisionError

    with pytest.raises(DecodeError, match="ZeroDivisionError"):
        codec_for(Codec("mine", bytes, read), None, default="json").decode(b"x")


# Writing


@pytest.mark.parametrize(
    ("serializer", "type", "value", "words"),
    [
        ("json", None, b"abc", "JSON, which has no bytes"),
        ("json", str, bytearray(b"abc"), "JSON, which has no bytes"),
        ("json", None, math.nan, "no NaN"),
        ("json", float, math.inf, "no NaN and no infinity"),
        ("json", None, {"a": [None, (math.nan,)]}, "no NaN"),
        ("json", Pair, Pair(1.0, Pair(-math.inf)), "no NaN"),
        ("json", None, object(), "no way to write object"),
        ("json", None, "\ud800", "surrogates not allowed"),
        ("raw", None, 3, "takes bytes and str"),
        ("raw", str, b"abc", "cannot be written as raw of str"),
        ("raw", int, "3", "is no int"),
        ("raw", int, True, "is no int"),
        ("raw", float, math.nan, "is no finite float"),
        ("raw", bool, 1, "is no bool"),
        ("binary", None, 3, "takes bytes and str"),
        ("msgpack", None, object(), "no way to write object"),
    ],
    ids=str,
)
def test_what_cannot_be_written_is_explained(
    serializer: str, type: Any, value: Any, words: str
) -> None:
    codec = codec_for(serializer, type, default="json")

    with pytest.raises(Exception) as caught:
        codec.encode(value)

    error = codec.encode_error(value, caught.value)
    assert isinstance(error, EncodeError)
    assert words in str(error)


def test_none_inside_is_null_and_no_nan() -> None:
    codec = codec_for("json", None, default="json")

    assert codec.encode({"a": None, "b": [1.0, Point(1)], "c": Pair(1.0)}).count(b"null") == 2


def test_a_nested_loop_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    codec = codec_for("json", None, default="json")

    with pytest.raises(RecursionError) as caught:
        codec.encode(loop)

    assert "nested too deeply" in str(codec.encode_error("…", caught.value))


# Which codec


def test_raw_text_is_written_by_python_itself() -> None:
    assert codec_for(None, str, default="raw").encode is str.encode


@pytest.mark.parametrize(
    ("type", "default", "name"),
    [
        (None, "raw", "raw"),
        (str, "raw", "raw"),
        (int, "raw", "raw"),
        (Point, "raw", "json"),
        (uuid.UUID, "raw", "json"),
        (Point, "json", "json"),
        (None, "json|binary", "json|binary"),
    ],
)
def test_the_default_gives_way_to_json_where_it_cannot_write_the_type(
    type: Any, default: str, name: str
) -> None:
    assert codec_for(None, type, default=default).name == name


@pytest.mark.parametrize(
    ("serializer", "type", "words"),
    [
        ("jsn", None, "no codec 'jsn': there are json, raw, binary, msgpack"),
        ("json|zip", None, r"no codec 'zip' in 'json\|zip'"),
        ("pickle", None, "'pickle' is refused: reading a pickle runs any code"),
        ("pickle|binary", None, "'pickle' is refused"),
        ("binary|json", None, "wrong order"),
        ("", None, "no codec ''"),
        ("json", bytes, "JSON has no bytes"),
        ("raw", Point, "not Point"),
        ("json", object, "type object cannot be read"),
        ("json", Point | Pair | Color | str, "cannot be read"),
        (3, None, "3 is no codec"),
    ],
    ids=str,
)
def test_a_codec_that_cannot_be_is_refused(serializer: Any, type: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        codec_for(serializer, type, default="json")


# Users' codecs


class Upper(Codec):
    """Written as one does for Faust."""

    def _dumps(self, value: Any) -> bytes:
        return str(value).upper().encode()

    def _loads(self, data: bytes) -> Any:
        return data.decode().lower()


class Lines:
    """Plain data as lines of name=value; knows no classes."""

    def dumps(self, value: dict[str, Any]) -> bytes:
        return "\n".join(f"{name}={part}" for name, part in value.items()).encode()

    def loads(self, data: bytes) -> dict[str, Any]:
        pairs = (line.split("=") for line in data.decode().splitlines())
        return {name: int(value) if value.isdigit() else value for name, value in pairs}


LINES: Any = Lines()


class Size(msgspec.Struct):
    width: int
    unit: str = "mm"


def test_a_faust_style_codec_is_used_as_it_is_and_in_a_chain() -> None:
    register("upper", Upper())

    assert codec_for("upper", str, default="json").encode("abc") == b"ABC"
    assert codec_for(Upper(), None, default="json").decode(b"ABC") == "abc"
    assert codec_for("upper|binary", str, default="json").encode("abc") == b"QUJD"
    assert codec_for("upper|binary", str, default="json").decode(b"QUJD") == "abc"


def test_a_codec_of_plain_data_reads_and_writes_typed_values() -> None:
    codec = codec_for(LINES, Size, default="json")

    assert codec.encode(Size(3)) == b"width=3\nunit=mm"
    assert codec.decode(b"width=4\nunit=cm") == Size(4, "cm")
    with pytest.raises(DecodeError, match="Expected `int`"):
        codec.decode(b"width=x")


@pytest.mark.parametrize("name", ["json", "raw", "pickle", "a|b", "", "a b"])
def test_a_name_that_is_taken_or_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        register(name, Upper())


def test_an_object_that_is_no_codec_is_refused() -> None:
    with pytest.raises(ConfigError, match="neither encode and decode nor dumps and loads"):
        register("nothing", object())


# Text


@pytest.mark.parametrize(
    ("serializer", "type", "text", "values"),
    [
        ("raw", str, "the", ["the"]),
        ("raw", str, '"the"', ['"the"']),
        ("json", str, "3", ["3"]),
        ("json", int, "3", [3]),
        ("raw", int, "-3", [-3]),
        ("json", float, "3", [3.0]),
        ("json", bool, "true", [True]),
        ("raw", None, "the", [b"the"]),
        ("raw", bytes, "é", ["é".encode()]),
        ("json", None, "3", [3, "3"]),
        ("json", None, "the", ["the"]),
        ("json", None, '{"a": 1}', [{"a": 1}, '{"a": 1}']),
        ("json", Point, '{"x": 1}', [Point(1)]),
        ("json", datetime.date, "2026-01-31", [datetime.date(2026, 1, 31)]),
        ("json", decimal.Decimal, "1.5", [decimal.Decimal("1.5")] * 2),
        ("json", Color, "red", [Color.RED]),
        ("json", int | None, "null", [None]),
        ("msgpack", None, "3", [3, "3"]),
        ("json|binary", None, "3", [3, "3"]),
    ],
    ids=str,
)
def test_a_text_means_these_values(
    serializer: str, type: Any, text: str, values: list[Any]
) -> None:
    codec = codec_for(serializer, type, default="json")

    assert codec.readings(text) == values
    assert codec.from_text(text) == values[0]


@pytest.mark.parametrize(
    ("type", "text"), [(int, "abc"), (int, "1.5"), (str, "\ud800"), (Point, "{}"), (bool, "1")]
)
def test_a_text_that_is_no_value_of_the_type_is_refused(type: Any, text: str) -> None:
    with pytest.raises(DecodeError):
        codec_for("json", type, default="json").from_text(text)


@given(st.integers() | TEXT | st.booleans())
def test_a_typed_value_comes_back_from_its_text(value: Any) -> None:
    codec = codec_for("json", type(value), default="json")

    assert codec.from_text(codec.to_text(value)) == value


def test_a_value_has_a_text_for_people() -> None:
    codec = codec_for("json", None, default="json")

    assert codec.to_text(b"a\xff") == "a\\xff"
    assert codec.to_text({"a": [1, Point(2)]}) == '{"a":[1,{"x":2,"tags":[]}]}'
    with pytest.raises(EncodeError):
        codec.to_text(object())


@pytest.mark.parametrize(
    ("text", "codec", "type", "key"),
    [
        ("the", "raw", "str", b"the"),
        ("the", "raw", "", b"the"),
        ("the", "raw", "bytes", b"the"),
        ("3", "raw", "int", b"3"),
        ("the", "json", "str", b'"the"'),
        ("3", "json", "int", b"3"),
        ("3", "json", "", b"3"),
        ("the", "json", "", b'"the"'),
        ("true", "json", "bool", b"true"),
        ("1", "json", "float", b"1.0"),
        ("the", "binary", "str", b"dGhl"),
        ("the", "json|binary", "str", b"InRoZSI="),
        ("3", "msgpack", "int", b"\x03"),
        ("the", "avro", "str", None),
        ("the", "json|avro", "str", None),
        ("the", "json", "Word", None),
        ("the", "json", "bytes", None),
        ("the", "pickle", "str", None),
    ],
)
def test_the_gateway_makes_the_producers_key(
    text: str, codec: str, type: str, key: bytes | None
) -> None:
    assert key_bytes(text, codec, type) == key


def test_a_key_that_is_no_value_of_its_type_is_refused() -> None:
    with pytest.raises(DecodeError, match="'abc' is no int"):
        key_bytes("abc", "raw", "int")


@given(TEXT)
@example("null")
@example("3")
def test_the_gateway_and_a_producer_of_str_agree(text: str) -> None:
    for codec in ("raw", "json", "binary", "msgpack"):
        assert key_bytes(text, codec, "str") == codec_for(codec, str, default=codec).encode(
            text
        )


@pytest.mark.parametrize(
    ("type", "name"),
    [
        (None, ""),
        (str, "str"),
        (Point, "Point"),
        (list[int], "list[int]"),
        (dict[str, Point | None], "dict[str, Point | None]"),
        (tuple[int, ...], "tuple[int, ...]"),
        (Literal["a", 1], "Literal['a', 1]"),
        (Any, "Any"),
    ],
)
def test_a_type_has_this_name(type: Any, name: str) -> None:
    assert type_name(type) == name


# Copies


def test_what_cannot_change_is_its_own_copy() -> None:
    for value in (None, True, 3, 1.5, "a", b"a", decimal.Decimal(1), uuid.UUID(int=1)):
        assert value.__class__ in ATOMS
        assert copy(value) is value


@given(PLAIN)
def test_a_copy_is_equal(value: Any) -> None:
    assert copy(value) == value


@pytest.mark.parametrize(
    "value",
    [
        [[1]],
        {"a": [1]},
        ([1], 2),
        Point(1, ["a"]),
        [Point(1, ["a"])],
        Pair(1.0, Pair(2.0)),
        Counter("aab"),
        defaultdict(list, {"a": [1]}),
        deque([[1]]),
        {1, 2},
        bytearray(b"a"),
    ],
    ids=repr,
)
def test_a_copy_shares_nothing_that_can_change(value: Any) -> None:
    twin = copy(value)

    assert twin == value and type(twin) is type(value)
    assert not (parts_that_change(twin) & parts_that_change(value))


def parts_that_change(value: Any) -> set[int]:
    if value.__class__ in ATOMS or isinstance(value, type):
        return set()
    inside: list[Any] = []
    if isinstance(value, dict):
        inside = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | deque):
        inside = list(value)
    elif isinstance(value, msgspec.Struct):
        inside = [getattr(value, name) for name in value.__struct_fields__]
    elif dataclasses.is_dataclass(value):
        inside = [getattr(value, field.name) for field in dataclasses.fields(value)]
    own = set() if isinstance(value, tuple) else {id(value)}
    return own.union(*map(parts_that_change, inside))


def test_a_frozen_record_is_copied_through() -> None:
    class Frozen(msgspec.Struct, frozen=True):
        tags: list[str]

    value = Frozen(["a"])
    copy(value).tags.append("b")

    assert value == Frozen(["a"])


def test_the_docstrings_examples_hold() -> None:
    assert doctest.testmod(codecs).failed == 0


def test_what_a_person_typed_as_an_object_is_refused_by_its_field() -> None:
    codec = codec_for("json", Point, default="json")

    with pytest.raises(DecodeError, match=r"is no Point: .*`int`, got `str` - at `\$\.x`"):
        codec.from_text('{"x": "up"}')
    with pytest.raises(DecodeError, match="is no Point: .*got `str`"):
        codec.from_text("nowhere")
