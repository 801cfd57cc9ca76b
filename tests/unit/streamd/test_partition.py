import doctest
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd import partition
from streamd.partition import fast_partition_for, murmur2, partition_for

# From Kafka's own UtilsTest.testMurmur2.
KAFKA_VECTORS = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}


@pytest.mark.parametrize(("key", "hashed"), KAFKA_VECTORS.items(), ids=lambda part: str(part))
def test_murmur2_gives_the_values_of_kafkas_own_tests(key: bytes, hashed: int) -> None:
    assert murmur2(key) == hashed


def test_a_negative_hash_loses_its_sign_bit_and_not_its_sign() -> None:
    assert partition_for(b"21", 2**31 - 1) == -973932308 & 0x7FFFFFFF


@given(key=st.binary(max_size=70), count=st.integers(1, 2**31 - 1))
def test_python_and_c_choose_the_same_partition(key: bytes, count: int) -> None:
    assert partition_for(key, count) == fast_partition_for()(key, count)


@given(key=st.binary(max_size=20), count=st.integers(1, 64))
def test_a_partition_is_one_of_the_topics(key: bytes, count: int) -> None:
    assert 0 <= partition_for(key, count) < count


@pytest.mark.parametrize("count", [0, -1])
def test_a_topic_without_partitions_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="1 partition or more"):
        partition_for(b"key", count)


def test_the_module_does_not_import_kafka_until_asked() -> None:
    code = (
        "import sys, streamd.partition as p; p.partition_for(b'a', 3);"
        "print('confluent_kafka' in sys.modules); p.fast_partition_for();"
        "print('confluent_kafka' in sys.modules)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == ["False", "True"]


def test_the_docstrings_examples_hold() -> None:
    assert doctest.testmod(partition).failed == 0
