"""The table of states: all of it, and what is not in it."""

import pytest

from streamd.errors import StateError
from streamd.supervisor.states import TRANSITIONS, Event, State, after


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_what_is_not_in_the_table_raises_and_says_what_can_be(
    state: State, event: Event
) -> None:
    if event in TRANSITIONS[state]:
        assert after(state, event) is TRANSITIONS[state][event]
        return

    with pytest.raises(
        StateError, match=f"cannot {event.value} what is {state.value}: it can "
    ):
        after(state, event)


def test_every_state_can_be_reached_and_left() -> None:
    reached = {state for events in TRANSITIONS.values() for state in events.values()}

    assert reached == set(State) == set(TRANSITIONS)
    assert all(TRANSITIONS[state] for state in State)


def test_whatever_runs_or_waits_can_be_stopped() -> None:
    for state in set(State) - {State.STOPPED, State.STOPPING}:
        assert after(state, Event.STOP) in (State.STOPPING, State.STOPPED)


def test_only_these_have_a_process() -> None:
    assert {state for state in State if state.has_process} == {
        State.STARTING,
        State.RUNNING,
        State.STOPPING,
    }
