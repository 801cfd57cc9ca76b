"""What was sent and is not durable yet: lanes in, outputs out."""

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence

from streamd.agentproc.broker import TP, Output, Segment
from streamd.context import Lane, Lanes


def new_lanes() -> Lanes:
    """Empty lanes; a lane is made when it is first sent to."""
    return defaultdict(lambda: defaultdict(Lane))


def trace(lanes: Lanes, agent: str, tp: TP, positions: Sequence[int], start: int) -> None:
    """Say of each record for which event it was sent: `Lane.events` becomes `Lane.sources`.

    What a task of the agent sent while no event was in work was sent for none.

    Args:
        positions: Of the run whose events were worked on, by index.
        start: The index of the first of them.
    """
    for by_partition in lanes.values():
        for lane in by_partition.values():
            if len(lane.events) == len(lane.keys) and lane.events and lane.events[0] > start:
                of_each = [positions[index - 1] for index in lane.events]
                lane.sources = Segment(len(of_each), agent, tp, of_each)


def outputs_of(sent: Iterable[Lanes], now: float | None = None) -> list[Output]:
    """Merge lanes, in their order, into one output for each partition.

    Args:
        now: The timestamp of records that were given none; unix seconds.
    """
    moment = time.time() if now is None else now
    merged: dict[TP, Output] = {}
    for lanes in sent:
        for topic, by_partition in lanes.items():
            for partition, lane in by_partition.items():
                tp = TP(topic, partition)
                if tp in merged:
                    _extend(merged[tp], lane, moment)
                elif lane.keys:
                    merged[tp] = _output(tp, lane, moment)
    return list(merged.values())


def _output(tp: TP, lane: Lane, now: float) -> Output:
    output = Output(tp, lane.keys, lane.values, _timestamps(lane, now))
    if lane.sources is not None:
        output.sources = [lane.sources]
    if lane.headers:
        output.headers = [lane.headers.get(index, []) for index in range(len(lane.keys))]
    return output


def _extend(output: Output, lane: Lane, now: float) -> None:
    if lane.sources is not None or output.sources is not None:
        known = output.sources or [Segment(len(output.keys))]
        output.sources = [*known, lane.sources or Segment(len(lane.keys))]
    if lane.headers or output.headers is not None:
        before = output.headers or [[] for _ in output.keys]
        output.headers = before + [lane.headers.get(i, []) for i in range(len(lane.keys))]
    output.keys += lane.keys
    output.values += lane.values
    output.timestamps += _timestamps(lane, now)


def _timestamps(lane: Lane, now: float) -> list[float]:
    stamps = [now] * len(lane.keys)
    for index, stamp in lane.timestamps.items():
        stamps[index] = stamp
    return stamps
