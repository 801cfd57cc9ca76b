"""Whether a member may answer for its partitions, judged by how its thread turns. No I/O.

A process that was stopped, or whose machine slept, for longer than its session has lost its
partitions, and hears of it only some moments after it goes on. Until then it would answer with
what they held before. One that is cut off from the cluster needs no such judgement: its client
counts the session by itself.
"""


class Membership:
    """See the module; may be asked from any thread."""

    def __init__(self, session_s: float) -> None:
        self._pause_s = session_s / 2
        self._session_s = session_s
        self._turned_at = float("-inf")
        self._unsure_until = float("-inf")

    def turned(self, now: float) -> None:
        """The thread that keeps the membership alive turns."""
        if now - self._turned_at > self._pause_s and self._turned_at > 0:
            # It may be a member no more; by then it has heard of it.
            self._unsure_until = now + self._session_s
        self._turned_at = now

    def is_sure(self, now: float) -> bool:
        """May it answer for what it has?

        >>> member = Membership(10.0)
        >>> member.turned(100.0), member.is_sure(104.0), member.is_sure(106.0)
        (None, True, False)
        >>> member.turned(106.0), member.is_sure(107.0), member.is_sure(116.5)
        (None, False, False)
        """
        return now - self._turned_at <= self._pause_s and now >= self._unsure_until
