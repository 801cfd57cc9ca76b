"""Records that seem to be missing are asked for once more, and only those."""

from streamd.agentproc.kafka.packs import position_of
from streamd.agentproc.kafka.reading import MOST_LOOKS, Reading


def reading(offset: int) -> Reading:
    return Reading(0, position_of(offset, 3), {})


def test_records_without_a_hole_are_taken_as_they_come() -> None:
    assert not reading(5).misses([5, 6, 7])
    assert not reading(5).misses([5])


def test_a_hole_is_looked_at_again_and_taken_where_it_is_in_the_log() -> None:
    looks = reading(5)

    assert [looks.misses([5, 6, 8, 9]), looks.misses([5, 6, 8, 9, 10])] == [True, False]
    assert looks.misses([5, 6, 8, 9, 11])


def test_what_comes_instead_of_the_records_that_were_asked_for_is_not_taken() -> None:
    looks = reading(5)

    assert looks.misses([7, 8])
    assert looks.misses([10, 11])
    assert not looks.misses([7, 8])


def test_a_partition_full_of_holes_is_not_looked_at_for_ever() -> None:
    looks = reading(0)

    answers = [looks.misses(list(range(0, end, 2))) for end in range(3, 40, 2)]

    assert answers.count(True) == MOST_LOOKS
    assert not any(answers[MOST_LOOKS:])


def test_an_end_that_lies_further_on_is_looked_at_again_as_a_record_is() -> None:
    looks = reading(5)

    assert not looks.misses([5])
    assert [looks.misses([9]), looks.misses([9])] == [True, False]
