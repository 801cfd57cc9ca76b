"""Records from outside, put into partitions (pure, but for the count of keyless ones)."""

import itertools
from collections.abc import Callable, Sequence

from streamd.agentproc.broker import TP, Output
from streamd.errors import UsageError
from streamd.partition import partition_for
from streamd.wire import OutRecord


class Placing:
    """Chooses partitions; keyless records take them in turn."""

    def __init__(self, partitions_of: Callable[[str], int]) -> None:
        self._partitions_of = partitions_of
        self._turn = itertools.count()

    def outputs(
        self, records: Sequence[OutRecord], now: float
    ) -> tuple[list[Output], list[tuple[int, int]]]:
        """One output a partition, and for each record which output it is in, and where there.

        Raises:
            UsageError: A record names a partition that its topic does not have.
        """
        outputs: dict[TP, Output] = {}
        index: dict[TP, int] = {}
        places: list[tuple[int, int]] = []
        for record in records:
            tp = TP(record.topic, self._partition(record))
            output = outputs.get(tp)
            if output is None:
                output = outputs[tp] = Output(tp, [], [], [], [])
                index[tp] = len(index)
            places.append((index[tp], len(output.values)))
            output.keys.append(record.key)
            output.values.append(record.value)
            output.timestamps.append(record.timestamp or now)
            assert output.headers is not None
            output.headers.append(record.headers)
        return list(outputs.values()), places

    def _partition(self, record: OutRecord) -> int:
        count = self._partitions_of(record.topic)
        if record.partition >= count or record.partition < -1:
            raise UsageError(
                f"topic {record.topic!r} has the partitions 0 to {count - 1}, "
                f"not {record.partition}"
            )
        if record.partition >= 0:
            return record.partition
        if record.key is None:
            return next(self._turn) % count
        return partition_for(record.key, count)


def placed(
    outputs: Sequence[Output], firsts: Sequence[int], places: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Partition and offset of each record, once the outputs have their first offsets (pure)."""
    return [(outputs[which].tp.partition, firsts[which] + at) for which, at in places]
