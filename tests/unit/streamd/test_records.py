import datetime
import decimal
import doctest
import enum
import json
import pickle
import uuid
from typing import Any, ClassVar, Union

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd import codecs, records
from streamd.codecs import codec_for
from streamd.errors import ConfigError, DecodeError, EncodeError, StreamdError, ValidationError
from streamd.records import Record, describe


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Word(Record):
    """A word and how often it was seen."""

    word: str
    n: int = 0


class Post(Record, serializer="json"):
    words: list[Word]
    by: dict[str, Word] = {}
    best: Word | None = None
    color: Color = Color.RED
    at: datetime.datetime | None = None
    price: decimal.Decimal = decimal.Decimal(0)
    id: uuid.UUID | None = None
    note: Union[int, str] = 0  # noqa: UP007


FULL = Post(
    [Word("a", 1)],
    {"b": Word("b")},
    Word("c"),
    Color.BLUE,
    datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    decimal.Decimal("1.50"),
    uuid.UUID(int=7),
    "x",
)


class Node(Record):
    value: int
    next: "Node | None" = None


# Made in Python


def test_a_record_is_made_by_position_and_by_name() -> None:
    assert Word("a", 3) == Word(word="a", n=3) == Word("a", n=3)
    assert (Word("a").word, Word("a").n) == ("a", 0)
    assert repr(Word("a", 3)) == "Word(word='a', n=3)"


@pytest.mark.parametrize(
    ("args", "fields", "words"),
    [
        ((), {}, "Missing required argument 'word'"),
        (("a",), {"x": 1}, "Unexpected keyword argument 'x'"),
        (("a", 1, 2), {}, "Extra positional"),
        (("a",), {"word": "b"}, "'word'"),
    ],
)
def test_wrong_arguments_are_named(
    args: tuple[Any, ...], fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(TypeError, match=words):
        Word(*args, **fields)


def test_the_constructor_does_not_check_types_unless_asked() -> None:
    wrong: Any = 3

    assert Word(wrong).asdict() == {"word": 3, "n": 0}


def test_defaults_that_can_change_are_not_shared() -> None:
    class Bag(Record):
        empty: list[int] = []
        full: list[list[int]] = [[1]]
        inner: Word = Word("a")

    one, two = Bag(), Bag()
    one.empty.append(1)
    one.full[0].append(2)
    one.inner.n = 9

    assert two == Bag() == Bag([], [[1]], Word("a"))
    assert Bag.loads(b"{}") == Bag()


def test_records_are_equal_ordered_and_hashed_by_class_and_fields() -> None:
    class Other(Record):
        word: str
        n: int = 0

    assert Word("a") == Word("a") and Word("a") != Word("b")
    assert Word("a") != Other("a")  # type: ignore[comparison-overlap]
    assert Word("a", 9) < Word("b", 1)
    assert len({Word("a"), Word("a"), Word("b"), Other("a")}) == 3
    with pytest.raises(TypeError):
        hash(FULL)


def test_a_subclass_adds_its_fields_after_its_parents() -> None:
    class Ranked(Word):
        rank: int = 1
        registry: ClassVar[int] = 5

    assert Ranked("a", 2, 3).asdict() == {"word": "a", "n": 2, "rank": 3}
    assert Ranked.loads(b'{"rank":4,"word":"b"}') == Ranked("b", 0, 4)


def test_a_record_can_be_changed_pickled_and_matched() -> None:
    word = Word("a")
    word.n += 2

    match pickle.loads(pickle.dumps(word)):
        case Word(text, count):
            assert (text, count) == ("a", 2)
        case other:
            pytest.fail(f"{other!r}")


def test_derive_changes_a_copy() -> None:
    word = Word("a", 1)

    assert word.derive(n=2) == Word("a", 2)
    assert word.derive(Word("z", 7), n=8) == Word("z", 8)
    assert word == Word("a", 1)
    with pytest.raises(TypeError, match="Word has no field 'm', 'x'"):
        word.derive(x=1, m=2)


def test_options_of_faust_are_inherited() -> None:
    class Base(
        Record, abstract=True, serializer="msgpack", isodates=True, namespace="old.Base"
    ):
        a: int = 0

    class Child(Base):
        b: int = 0

    assert Child(1).dumps() == msgspec.msgpack.encode({"a": 1, "b": 0})
    assert codec_for(None, Child, default="json").name == "msgpack"


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="polymorphic"):

        class Wrong(Record, polymorphic=True):
            a: int


# Bytes


def test_a_record_of_all_types_comes_back() -> None:
    assert Post.loads(FULL.dumps()) == FULL
    assert Post.loads(FULL.dumps(serializer="msgpack"), serializer="msgpack") == FULL
    assert Post.loads(FULL.dumps(serializer="json|binary"), serializer="json|binary") == FULL
    assert Post.from_data(FULL.to_representation()) == FULL


def test_a_record_is_written_as_faust_writes_it() -> None:
    assert json.loads(FULL.dumps()) == {
        "words": [{"word": "a", "n": 1}],
        "by": {"b": {"word": "b", "n": 0}},
        "best": {"word": "c", "n": 0},
        "color": "blue",
        "at": "2026-01-02T00:00:00Z",
        "price": "1.50",
        "id": "00000000-0000-0000-0000-000000000007",
        "note": "x",
    }


def test_msgspecs_own_decoder_reads_it() -> None:
    assert msgspec.json.Decoder(Word).decode(b'{"word":"a"}') == Word("a")


@given(st.text(st.characters(codec="utf-8")), st.integers(-(2**63), 2**63 - 1))
def test_any_values_come_back(word: str, n: int) -> None:
    record = Word(word, n)

    assert Word.loads(record.dumps()) == Word.from_data(record.to_representation()) == record


def test_a_record_may_hold_its_own_kind() -> None:
    node = Node(1, Node(2))

    assert Node.loads(node.dumps()) == node
    assert node.validate() == []


def test_fields_that_the_class_does_not_have_are_ignored() -> None:
    assert Word.loads(b'{"word":"a","new":[1],"n":2}') == Word("a", 2)
    assert Word.loads('{"word":"é"}') == Word("é")


def test_fausts_metadata_is_dropped() -> None:
    data = b'{"word":"a","n":1,"__faust":{"ns":"proj.Word"}}'

    assert Word.loads(data) == Word("a", 1)
    assert Word.loads(data).dumps() == b'{"word":"a","n":1}'


@pytest.mark.parametrize(
    "data",
    [b"{}", b'{"word":3}', b'{"word":"a","n":"1"}', b'{"word":"a","n":1.5}', b"[]", b"", b"x"],
)
def test_reading_checks_types(data: bytes) -> None:
    with pytest.raises(DecodeError, match="is not json of Word"):
        Word.loads(data)


def test_writing_what_json_has_not_is_explained() -> None:
    wrong: Any = object()

    with pytest.raises(EncodeError, match="no way to write object"):
        Word(wrong).dumps()


def test_a_union_of_two_records_is_refused_when_its_topic_is_made() -> None:
    class Both(Record):
        either: Word | Node

    with pytest.raises(ConfigError, match="values of type Both cannot be read"):
        codec_for("json", Both, default="json")


# Faust's metadata


class Marked(Record, include_metadata=True, namespace="proj.Marked"):
    word: str
    inner: Word | None = None


def test_metadata_is_written_where_asked_and_never_shown() -> None:
    marked = Marked("a", Word("b"))

    assert marked.dumps() == (
        b'{"word":"a","inner":{"word":"b","n":0},"__faust":{"ns":"proj.Marked"}}'
    )
    assert marked.to_representation()["__faust"] == {"ns": "proj.Marked"}
    assert marked.asdict() == {"word": "a", "inner": Word("b")}
    assert repr(marked) == "Marked(word='a', inner=Word(word='b', n=0))"
    assert describe(Marked)[-1][0] == "inner"


def test_another_namespace_makes_no_other_record() -> None:
    read = Marked.loads(b'{"word":"a","__faust":{"ns":"older.Name","more":1}}')

    assert read == Marked("a") and hash(read) == hash(Marked("a"))
    assert b"proj.Marked" in read.dumps()
    assert codecs.copy(read) == read


def test_metadata_is_inherited_with_the_childs_own_name() -> None:
    class Child(Marked):
        n: int = 0

    class Bare(Marked, include_metadata=False):
        n: int = 0

    assert Child("a", None, 3).dumps() == (
        b'{"word":"a","inner":null,"n":3,"__faust":{"ns":"test_records.Child"}}'
    )
    assert Bare("a", None, 3).dumps() == b'{"word":"a","inner":null,"n":3}'


# Checks


class Checked(Record, validation=True):
    word: str
    n: int = 0
    inner: Word | None = None
    tags: list[str] = []
    at: datetime.datetime | None = None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"word": 3}, "Checked.word is 3: Expected `str`, got `int`"),
        ({"word": "a", "n": "3"}, "Checked.n is '3': Expected `int`, got `str`"),
        ({"word": "a", "n": True}, "Checked.n is True"),
        ({"word": "a", "tags": [1]}, r"Checked.tags is \[1\]: .* at `\$\[0\]`"),
        ({"word": "a", "inner": Word("a", None)}, r"Checked.inner is Word.*at `\$.n`"),  # type: ignore[arg-type]
        ({"word": 1, "n": "b"}, "Checked.word is 1.*; Checked.n is 'b'"),
    ],
    ids=str,
)
def test_a_checking_constructor_refuses_wrong_types(fields: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words) as caught:
        Checked(**fields)

    assert isinstance(caught.value, DecodeError) and isinstance(caught.value, StreamdError)


def test_a_checking_constructor_keeps_what_is_right() -> None:
    inner, tags = Word("b"), ["x"]
    checked = Checked("a", 1, inner, tags)

    assert checked.inner is inner and checked.tags is tags
    with pytest.raises(ValidationError):
        checked.derive(n="x")


def test_plain_data_inside_becomes_what_the_field_says() -> None:
    fields: Any = {"word": "a", "inner": {"word": "b"}, "at": "2026-01-02T00:00:00Z"}

    checked = Checked(**fields)

    assert checked.inner == Word("b")
    assert checked.at == datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)


def test_a_child_of_a_checking_record_may_do_without() -> None:
    class Loose(Checked, validation=False):
        pass

    wrong: Any = 3

    assert Loose(wrong).asdict()["word"] == 3


def test_a_coercing_record_turns_text_into_numbers() -> None:
    class Loose(Record, coerce=True):
        n: int
        on: datetime.date | None = None

    fields: Any = {"n": "3", "on": "2026-01-02"}
    wrong: Any = "x"

    assert Loose(**fields) == Loose(3, datetime.date(2026, 1, 2))
    assert Loose.loads(b'{"n":"4"}') == Loose(4)
    assert codec_for(None, Loose, default="json").decode(b'{"n":"4"}') == Loose(4)
    with pytest.raises(ValidationError, match="Loose.n is 'x'"):
        Loose(wrong)


def test_validate_tells_all_that_is_wrong() -> None:
    wrong: Any = None
    word = Word(wrong, wrong)

    assert [str(error) for error in word.validate()] == [
        "Word.word is None: Expected `str`, got `null`",
        "Word.n is None: Expected `int`, got `null`",
    ]
    assert not word.is_valid() and len(word.validation_errors) == 2
    with pytest.raises(ValidationError, match="Word.word"):
        word.validate_or_raise()
    assert FULL.is_valid() and FULL.validate() == []


def test_data_that_does_not_fit_is_refused_with_the_place() -> None:
    with pytest.raises(ValidationError, match=r"no Post: .*`\$.words\[0\].n`"):
        Post.from_data({"words": [{"word": "a", "n": "x"}]})


# For people


def test_a_model_is_described() -> None:
    assert describe(Post) == [
        ("words", "list[Word]", None),
        ("by", "dict[str, Word]", "{}"),
        ("best", "Word | None", "None"),
        ("color", "Color", "<Color.RED: 'red'>"),
        ("at", "datetime | None", "None"),
        ("price", "Decimal", "Decimal('0')"),
        ("id", "UUID | None", "None"),
        ("note", "int | str", "0"),
    ]


def test_the_docstrings_examples_hold() -> None:
    assert doctest.testmod(records).failed == 0
