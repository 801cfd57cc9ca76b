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
        self._events: OrderedDict[int, tuple[int, T | None, int]] = OrderedDict()
        # position -> (the position after it, what it sent; None: in work, the last it is with)

    def __len__(self) -> int:
        return len(self._events)

    def __contains__(self, position: int) -> bool:
        return position in self._events

    @property
    def held_back(self) -> int:
        """How many settled events wait for an earlier one."""
        return sum(sent is not None for _, sent, _ in self._events.values())

    def begin(self, position: int, following: int) -> None:
        """An event was handed out; positions are given in order."""
        self._events[position] = (following, None, position)

    def settle(self, position: int, sent: T, last: int | None = None) -> list[T]:
        """An event is settled; what is held back no more, in the events' order.

        Args:
            last: The last event that it was worked on together with, since one output may come
                of all of them: the position passes all or none.
        """
        following, _, _ = self._events[position]
        self._events[position] = (following, sent, position if last is None else last)
        ready = 0
        together = position = -1
        for count, (position, (_, held, last)) in enumerate(self._events.items(), 1):
            if held is None:
                break
            together = max(together, last)
            if position >= together:
                ready = count
        released = []
        for _ in range(ready):
            _, (self.position, held, _) = self._events.popitem(last=False)
            assert held is not None
            released.append(held)
        return released
