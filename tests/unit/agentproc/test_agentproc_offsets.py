"""How far a partition is settled where several of its events are in work at once."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from streamd.agentproc.offsets import Window


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.randoms())
def test_the_position_passes_what_was_worked_on_together_at_once(
    owners: list[int], random: Random
) -> None:
    """Each owner has taken the events that bear its number, and sends one output for all."""
    window = Window[str](100)
    groups: dict[int, list[int]] = {}
    for place, owner in enumerate(owners):
        window.begin(100 + place, 101 + place)
        groups.setdefault(owner, []).append(100 + place)
    order = list(groups)
    random.shuffle(order)

    released: list[str] = []
    settled: set[int] = set()
    for owner in order:
        events = groups[owner]
        for event in events:
            sent = f"of {owner}" if event == events[-1] else ""
            released += window.settle(event, sent, events[-1])
        settled.update(events)

        below = set(range(100, window.position))
        assert below <= settled
        for other, events in groups.items():
            assert below.isdisjoint(events) or below.issuperset(events)
            assert (f"of {other}" in released) == below.issuperset(events)

    assert window.position == 100 + len(owners)
    assert len(window) == 0


def test_an_output_of_two_events_waits_for_what_lies_between_them() -> None:
    window = Window[str](0)
    for event in range(3):
        window.begin(event, event + 1)

    assert window.settle(0, "", 2) == []
    assert window.settle(2, "of 0 and 2", 2) == []
    assert window.position == 0

    assert window.settle(1, "of 1") == ["", "of 1", "of 0 and 2"]
    assert window.position == 3
