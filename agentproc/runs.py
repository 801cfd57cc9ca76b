"""A run: the events of one batch, decoded for one agent."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from streamd.agentproc.broker import Batch
from streamd.agentproc.trials import Trial
from streamd.events import Event, Message
from streamd.topics import Topic


class Run:
    """The events of one batch, decoded for one agent."""

    __slots__ = (
        "tp", "topic", "positions", "values", "raw_keys", "raw_values", "timestamps",
        "headers", "end", "cursor", "trials", "_stops", "_keys",
    )  # fmt: skip

    def __init__(
        self,
        batch: Batch,
        topic: Topic,
        values: Sequence[Any],
        keys: list[Any] | None,
        cursor: int,
    ) -> None:
        """
        Args:
            keys: Decoded; None: they have no type of their own and are decoded when asked for.
        """
        self.tp = batch.tp
        self.topic = topic
        self.positions = batch.positions
        self.values = values
        self.raw_keys = batch.keys
        self.raw_values = batch.values
        self.timestamps = batch.timestamps
        self.headers = batch.headers
        self.end = batch.end
        self.cursor = cursor  # of the next event to hand out
        self.trials: dict[int, Trial] = {}  # index -> how it is to be handed out
        self._stops: list[int] = []
        self._keys = keys

    def __len__(self) -> int:
        return len(self.values)

    def try_apart(self, index: int, trial: Trial) -> None:
        """Hand out this event alone, or not at all."""
        self.trials[index] = trial
        self._stops = sorted(self.trials)

    def part(self, start: int, end: int) -> "Run":
        """A run of its own of the events from `start` up to `end`."""
        part = Run.__new__(Run)
        part.tp, part.topic = self.tp, self.topic
        part.positions = self.positions[start:end]
        part.values = self.values[start:end]
        part.raw_keys = self.raw_keys[start:end]
        part.raw_values = self.raw_values[start:end]
        part.timestamps = self.timestamps[start:end]
        part.headers = None if self.headers is None else self.headers[start:end]
        part.end = self.position_after(end)
        part.cursor = 0
        part.trials = {i - start: t for i, t in self.trials.items() if start <= i < end}
        part._stops = sorted(part.trials)
        part._keys = None if self._keys is None else self._keys[start:end]
        return part

    def is_due(self, now: float) -> bool:
        """May the next event be handed out now, as far as its own trial goes?"""
        trial = self.trials.get(self.cursor)
        return trial is None or trial.refused is not None or trial.not_before <= now

    def next_stop(self, index: int) -> int:
        """The first event from `index` on that is handed out alone; the run's end without."""
        at = bisect_left(self._stops, index)
        return self._stops[at] if at < len(self._stops) else len(self.values)

    def position_after(self, index: int) -> int:
        """The position to go on from when everything before `index` is settled."""
        return self.positions[index] if index < len(self.values) else self.end

    def keys(self) -> list[Any]:
        """The decoded keys."""
        if self._keys is None:
            self._keys = self.topic.key_codec.decode_many(self.raw_keys)
        return self._keys

    def key(self, index: int) -> Any:
        """One decoded key."""
        return self.keys()[index]

    def event(self, index: int, app: Any) -> Event:
        """One event with everything that is known of it."""
        headers = self.headers[index] if self.headers is not None else ()
        message = Message(
            self.tp.topic,
            self.tp.partition,
            self.positions[index],
            self.timestamps[index],
            self.raw_keys[index],
            self.raw_values[index],
            headers,
        )
        return Event(app, self.keys()[index], self.values[index], dict(headers), message)

    def header(self, index: int, name: str) -> bytes | None:
        """One header of an event."""
        if self.headers is None:
            return None
        return next((value for header, value in self.headers[index] if header == name), None)
