"""What a coordinator's log says of transactions, and where it says it."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.agentproc.kafka.decisions import (
    PREPARE_ABORT,
    PREPARE_COMMIT,
    decided,
    decode,
    key_of,
    place_of,
)

ONGOING = 1
# As a broker of 4.3 wrote it: committed, rows of partitions 2 and 3, markers of 2.
REAL = (
    b"\0\1" + struct.pack("!qhib", 5, 0, 6000, PREPARE_COMMIT)
    + b"\3\x0cchanges-one\3\0\0\0\2\0\0\0\3\0\x0cmarkers-one\2\0\0\0\2\0"
    + bytes(16) + b"\0"
)  # fmt: skip

places = st.dictionaries(
    st.text(min_size=1, max_size=200), st.lists(st.integers(0, 9), min_size=1), max_size=4
)


def state(status: int, topics: dict[str, list[int]], version: int = 0) -> bytes:
    data = struct.pack("!hqhibi", version, 5, 0, 6000, status, len(topics))
    for topic, numbers in topics.items():
        name = topic.encode()
        data += struct.pack("!h", len(name)) + name
        data += struct.pack(f"!i{len(numbers)}i", len(numbers), *numbers)
    return data + bytes(16)


def test_a_decision_is_read_as_brokers_write_it() -> None:
    step = decode(REAL)
    assert step is not None and step.commits
    assert step.partitions == [("changes-one", 2), ("changes-one", 3), ("markers-one", 2)]


@given(places, st.booleans())
def test_a_decision_of_the_older_form_is_read(topics: dict[str, list[int]], ok: bool) -> None:
    step = decode(state(PREPARE_COMMIT if ok else PREPARE_ABORT, topics))
    assert step is not None and step.commits == ok
    assert step.partitions == [
        (t, number) for t, numbers in topics.items() for number in numbers
    ]


def test_the_last_decision_counts_of_each_partition() -> None:
    values = [
        state(PREPARE_COMMIT, {"a": [0, 1]}),
        None,
        state(ONGOING, {"a": [0]}),
        state(PREPARE_ABORT, {"a": [1], "b": [7]}),
        state(ONGOING, {"b": [7]}),
    ]
    assert decided(values) == {("a", 0): True, ("a", 1): False, ("b", 7): False}


@given(st.binary(max_size=60))
def test_what_is_no_state_is_refused_or_tells_nothing(data: bytes) -> None:
    try:
        step = decode(data)
    except ValueError:
        return
    assert step is None or data[:2] in (b"\0\0", b"\0\1")


def test_a_form_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="version 2"):
        decode(state(PREPARE_COMMIT, {"a": [0]}, version=2))
    with pytest.raises(ValueError, match="cannot be read"):
        decode(REAL[:30])


def test_the_place_and_key_of_an_id_are_those_of_brokers() -> None:
    # "polygenelubricants" is known for its hash code, the least there is.
    assert place_of("polygenelubricants", 50) == 0
    assert place_of("a", 50) == 97 % 50
    assert place_of("\U0001f600", 50) == abs(31 * 0xD83D + 0xDE00) % 50
    assert key_of("ab") == b"\0\0\0\2ab"
