"""The states of a process that should run, as a table; supervisord's seven.

Everything that may happen to a state stands in `TRANSITIONS`: code asks the table and never
sets a state by itself. What is not in the table is a bug, and changes nothing.
"""

from enum import Enum

from streamd.errors import StateError


class State(Enum):
    """How a process is; the value is what people see."""

    STOPPED = "STOPPED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    BACKOFF = "BACKOFF"  # it died; the next try has a time
    STOPPING = "STOPPING"
    EXITED = "EXITED"  # it died; what to do is decided at once
    FATAL = "FATAL"  # given up until a person asks for it

    @property
    def has_process(self) -> bool:
        """True in the states in which a process exists, or is being made."""
        return self in _LIVE


class Event(Enum):
    """What happens to a process; verbs, as in error texts."""

    START = "start"
    READY = "ready"
    EXIT = "exit"
    RESTART = "restart"  # at once
    DELAY = "delay"  # restart later
    RETRY = "retry"  # later is now
    GIVE_UP = "give up"
    STOP = "stop"


_LIVE = frozenset({State.STARTING, State.RUNNING, State.STOPPING})

TRANSITIONS: dict[State, dict[Event, State]] = {
    State.STOPPED: {Event.START: State.STARTING},
    State.STARTING: {
        Event.READY: State.RUNNING,
        Event.EXIT: State.EXITED,
        Event.STOP: State.STOPPING,
    },
    State.RUNNING: {Event.EXIT: State.EXITED, Event.STOP: State.STOPPING},
    State.EXITED: {
        Event.RESTART: State.STARTING,
        Event.DELAY: State.BACKOFF,
        Event.GIVE_UP: State.FATAL,
        Event.STOP: State.STOPPED,
    },
    State.BACKOFF: {
        Event.RETRY: State.STARTING,
        Event.START: State.STARTING,
        Event.STOP: State.STOPPED,
    },
    State.FATAL: {Event.START: State.STARTING, Event.STOP: State.STOPPED},
    State.STOPPING: {Event.EXIT: State.STOPPED},
}


def after(state: State, event: Event) -> State:
    """The state that follows.

    Raises:
        StateError: The table has no such transition.

    >>> after(State.STARTING, Event.READY).value
    'RUNNING'
    """
    follows = TRANSITIONS[state].get(event)
    if follows is None:
        raise StateError(
            f"cannot {event.value} what is {state.value}: "
            f"it can {', '.join(can.value for can in TRANSITIONS[state])}"
        )
    return follows
