"""Is a group's changelog still ours alone? What only its owner writes has the end it made.

A process that was stopped past its session and goes on does not know that it owns nothing any
more. Its rows count for nobody, but a row of its own hides the one that counts from a
compaction. So an owner compares, and whoever takes over after it repairs.
"""

from streamd.agentproc.broker import TP


class Ends:
    """Where each changelog of the partitions of a process ends, by what it wrote."""

    def __init__(self) -> None:
        self._ends: dict[TP, int] = {}  # offset

    def begin(self, partition: int, ends: dict[str, int]) -> None:
        """A partition was taken over: changelog -> its end."""
        self._ends |= {TP(topic, partition): end for topic, end in ends.items()}

    def forget(self, partitions: set[int]) -> None:
        """They are another process's."""
        self._ends = {
            tp: end for tp, end in self._ends.items() if tp.partition not in partitions
        }

    def wrote(self, topic: str, partition: int, count: int) -> None:
        """So many rows of ours are there now."""
        self._ends[TP(topic, partition)] += count

    @property
    def ends(self) -> dict[TP, int]:
        """Each changelog's end, by what was written; transactions' marks come on top."""
        return self._ends

    def all(self) -> list[TP]:
        """What is watched."""
        return list(self._ends)

    def alone(self, ends: dict[TP, int]) -> set[TP]:
        """Where nobody else has written, by the ends that the cluster tells."""
        return {tp for tp, end in ends.items() if end == self._ends.get(tp)}

    def foreign(self, ends: dict[TP, int]) -> list[TP]:
        """Where somebody else has written, by the ends that the cluster tells."""
        return [tp for tp, end in ends.items() if end > self._ends.get(tp, end)]
