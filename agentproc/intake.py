"""What a group reads, from its broker to its agents' feeds: chunk by chunk, within bounds."""

import asyncio
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from streamd.agentproc.broker import TP, Batch, Session
from streamd.agentproc.delivery import Feed
from streamd.agentproc.runs import Run
from streamd.agentproc.trials import Trial, Trials
from streamd.codecs import Codec
from streamd.errors import DecodeError
from streamd.patterns import is_pattern, means
from streamd.topics import Topic

CHUNK_EVENTS = 4000
WAITING_EVENTS = 8000  # read on only below this
MOST_WAITING_EVENTS = 32_000  # below this, for an agent that has none


class Intake:
    """Reads what the agents of one group are to get next."""

    def __init__(self, feeds: Sequence[Feed], session: Session, trials: Trials) -> None:
        self._feeds = feeds
        self._session = session
        self._trials = trials
        self._topics: dict[str, Topic] = {}
        self._readers: dict[str, list[Feed]] = defaultdict(list)  # topic -> feeds
        self._patterns: list[tuple[Feed, Topic]] = []
        self._met: set[str] = set()  # topics of which it is known whom patterns give them to
        self._room = asyncio.Event()
        for feed in feeds:
            for topic in feed.agent.channel.parts:
                self._topics[topic.name] = topic
                if is_pattern(topic.name):
                    self._patterns.append((feed, topic))
            for name in feed.agent.get_topic_names():
                self._readers[name].append(feed)

    @property
    def waiting(self) -> int:
        """Events that were read and not handed out."""
        return sum(feed.waiting for feed in self._feeds)

    async def run(self, positions: Mapping[tuple[str, TP], int]) -> None:
        """Read until cancelled; no more than `WAITING_EVENTS` and a chunk wait at a time.

        Args:
            positions: (agent, tp) -> the next one to settle; what is settled is left out.
        """
        self._room.set()
        while True:
            await self._room.wait()
            for batch in await self._session.poll(CHUNK_EVENTS):
                self._distribute(batch, positions)
            if self.waiting > WAITING_EVENTS:
                self._room.clear()

    def settled(self) -> None:
        """Events were settled: there may be room again."""
        if not self._room.is_set() and self.waiting < WAITING_EVENTS // 2:
            self._room.set()

    def starves(self, *, asked: bool) -> None:
        """An agent has no event while others have some.

        Its own may lie behind those of an agent that is slow, or, where one is `asked`, that
        asks it and waits.
        """
        if asked or self.waiting < MOST_WAITING_EVENTS:
            self._room.set()

    def _distribute(self, batch: Batch, positions: Mapping[tuple[str, TP], int]) -> None:
        """Decode a batch once and give it to each agent that reads its topic."""
        if self._patterns and batch.tp.topic not in self._met:
            self._meet(batch.tp, positions)
        topic = self._topics[batch.tp.topic]
        values, bad = _decoded(topic.value_codec, batch.values)
        keys: list[Any] | None = None
        if topic.has_typed_keys:
            keys, bad_keys = _decoded(topic.key_codec, batch.keys)
            bad |= {index: f"its key: {reason}" for index, reason in bad_keys.items()}
        for feed in self._readers[batch.tp.topic]:
            settled = positions[feed.agent.name, batch.tp]
            cursor = bisect_left(batch.positions, settled)
            if cursor == len(values):
                continue
            run = Run(batch, topic, values, keys, cursor)
            for index, reason in bad.items():
                if index >= cursor:
                    run.try_apart(index, Trial(refused="it cannot be decoded", error=reason))
            self._trials.mark(run, feed.agent.name)
            feed.add(run)

    def _meet(self, tp: TP, positions: Mapping[tuple[str, TP], int]) -> None:
        """Find out which agents read a topic as it matches a pattern of theirs."""
        self._met.add(tp.topic)
        for feed, pattern in self._patterns:
            reads = (feed.agent.name, tp) in positions
            if reads and means(pattern.name, tp.topic) and feed not in self._readers[tp.topic]:
                self._topics.setdefault(tp.topic, pattern)
                self._readers[tp.topic].append(feed)


def _decoded(codec: Codec, column: list[bytes | None]) -> tuple[list[Any], dict[int, str]]:
    """A column's values, None for those that cannot be decoded, and why: index -> reason."""
    try:
        return codec.decode_many(column), {}
    except DecodeError:
        # One by one, to find which.
        values: list[Any] = [None] * len(column)
    bad: dict[int, str] = {}
    for index, data in enumerate(column):
        try:
            values[index] = None if data is None else codec.decode(data)
        except DecodeError as error:
            bad[index] = str(error)
    return values, bad
