"""Which position of a partition may be stored, where events settle out of order.

With `concurrency` above 1 several events of a partition are in work at once. What may be stored
is the position up to which all are settled; what later events sent is held back until it gets
there. This module does no I/O and knows no clock.
"""

from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class Window(Generic[T]):
    """The events of one partition that are in work, or settled behind one that is.

    >>> window = Window[str](10)
    >>> window.begin(10, 11); window.begin(11, 12)
    >>> window.settle(11, "b"), window.position
    ([], 10)
    >>> window.settle(10, "a"), window.position
    (['a', 'b'], 12)
    """

    def __init__(self, position: int) -> None:
        self.position = position  # everything below is settled
        self._events: OrderedDict[int, tuple[int, T | None]] = OrderedDict()
        # position -> (the position after it, what it sent; None: in work)

    def __len__(self) -> int:
        return len(self._events)

    def __contains__(self, position: int) -> bool:
        return position in self._events

    @property
    def held_back(self) -> int:
        """How many settled events wait for an earlier one."""
        return sum(sent is not None for _, sent in self._events.values())

    def begin(self, position: int, following: int) -> None:
        """An event was handed out; positions are given in order."""
        self._events[position] = (following, None)

    def settle(self, position: int, sent: T) -> list[T]:
        """An event is settled; what is held back no more, in the events' order."""
        following, _ = self._events[position]
        self._events[position] = (following, sent)
        released = []
        while self._events:
            first, (after, held) = next(iter(self._events.items()))
            if held is None:
                break
            del self._events[first]
            released.append(held)
            self.position = after
        return released
