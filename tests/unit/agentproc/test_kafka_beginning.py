"""Which positions a group on Kafka takes up that its marker does not have."""

from streamd.agentproc.broker import TP
from streamd.agentproc.kafka.beginning import first_positions, forgetting
from streamd.agentproc.kafka.markers import NOBODY, Incarnation, Marker
from streamd.agentproc.kafka.packs import position_of

EXTENTS = {TP("t", 0): (2, 9)}
LATEST = {"t": "latest"}
NEW = Marker(NOBODY, 0, {}, {}, {})


def test_what_the_marker_has_stays_and_a_new_agent_begins_as_it_is_told() -> None:
    at = position_of(4, 3)
    marker = Marker(Incarnation(3, 1), 7, {}, {"old": {"t": at}}, {})

    taken = first_positions(marker, 0, {"old": ["t"], "new": ["t"]}, LATEST, EXTENTS, {})

    assert taken == {"old": {"t": at}, "new": {"t": position_of(9)}}
    assert marker.positions == {"old": {"t": at}}


def test_after_a_reset_all_is_done_again_wherever_it_began() -> None:
    void = Marker(Incarnation(3, 1), 0, {}, {}, {}, resets=1)

    taken = first_positions(void, 0, {"a": ["t"]}, LATEST, EXTENTS, {})

    assert taken == {"a": {"t": position_of(2)}}


def test_offsets_that_are_handed_over_win_unless_the_topic_ends_before() -> None:
    for offset, begins in ((5, 5), (9, 9), (10, 2)):
        taken = first_positions(NEW, 0, {"a": ["t"]}, {}, EXTENTS, {TP("t", 0): offset})
        assert taken == {"a": {"t": position_of(begins)}}


def test_what_a_pattern_means_later_is_read_from_its_beginning() -> None:
    met = Marker(Incarnation(3, 1), 7, {}, {"a": {"later": position_of(5)}}, {})
    agents = {"a": ["t"], "new": ["t"]}

    taken = first_positions(met, 0, agents, LATEST, EXTENTS, {}, {"t"})

    # Another member may know already of a topic that this one does not read yet.
    kept = {"later": position_of(5)}
    assert taken == {"a": {"t": position_of(2), **kept}, "new": {"t": position_of(9)}}


def test_of_a_topic_that_was_made_anew_nothing_is_kept() -> None:
    highs = [("s", "g", "x", 0, 1, 0)]
    marker = Marker(
        Incarnation(3, 1), 7, {}, {"a": {"t": position_of(4), "u": 8}},
        {"t": highs, "u": highs}, topics={"t": "one", "u": "two"},
    )  # fmt: skip

    left = forgetting(marker, {"t"})

    assert left.positions == {"a": {"t": 0, "u": 8}}
    assert left.highs == {"u": highs}
    assert forgetting(marker, set(), {"t"}).positions == {"a": {"u": 8}}
    assert forgetting(marker, set()) is marker
