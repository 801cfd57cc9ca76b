"""Which topics agents read: those they name, and those that their patterns mean now.

A group's tables and markers have a partition for each number, so every topic of a group has as
many: for a pattern that is what it is declared with (`partitions`). What matches and has
another number is not read, and told.

Members subscribe to a topic of the group's own with as many partitions, and who is assigned a
number reads it of all topics. By the client's own patterns each member would find a new topic
at another moment, and until the last one has, two of them would have a share of one partition.
"""

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from streamd.agentproc.kafka import topics
from streamd.agentproc.kafka.obstacles import AGAIN_S, Way
from streamd.errors import BrokerError
from streamd.patterns import is_pattern, matching, own_topics

if TYPE_CHECKING:
    from streamd.agentproc.broker.kafka import KafkaBroker

FIND_S = 3.0
MOST_TOLD = 20


class Meant(NamedTuple):
    """What names and patterns mean."""

    topics: list[str]  # sorted
    misfits: dict[str, str]  # topic that matches and is not read -> why


def meant(broker: "KafkaBroker", names: Iterable[str], there: Mapping[str, int]) -> Meant:
    """The topics that these names and patterns mean.

    Args:
        there: The topics of the cluster, and their partitions; needed where there are patterns.
    """
    found: set[str] = set()
    misfits: dict[str, str] = {}
    own = own_of(broker)
    for name in names:
        if not is_pattern(name):
            found.add(name)
            continue
        count = broker.wanted(name).partitions
        for topic in matching(name, there, own):
            if there[topic] == count:
                found.add(topic)
            else:
                misfits[topic] = (
                    f"does not read topic {topic!r}: it has {there[topic]} partitions, and "
                    f"the pattern {name!r} is declared with partitions={count}"
                )
    return Meant(sorted(found), {t: why for t, why in misfits.items() if t not in found})


def own_of(broker: "KafkaBroker") -> re.Pattern[str]:
    """What matches the topics that no pattern of the app means."""
    owned = [info.name for info in broker.declared.values() if info.owned]
    return own_topics(broker.settings.id, owned)


def there_for(broker: "KafkaBroker", names: Iterable[str]) -> Mapping[str, int]:
    """What `meant` needs to know of the cluster; blocks where there are patterns."""
    if not any(map(is_pattern, names)):
        return {}
    return broker.patiently(lambda: topics.counts(broker.admin))


class Sources:
    """What the agents of one session read.

    Args:
        agents: Agent -> names and patterns.
    """

    def __init__(
        self, broker: "KafkaBroker", group: str, agents: Mapping[str, list[str]]
    ) -> None:
        names = {name for each in agents.values() for name in each}
        self.named = sorted(name for name in names if not is_pattern(name))
        self.patterns = sorted(name for name in names if is_pattern(name))
        self._broker = broker
        self._agents = agents
        self._way = Way(broker.health, f"group {group}")

    def find(self) -> list[str]:
        """What is to be read, as the cluster is now; blocks."""
        names = [*self.named, *self.patterns]
        found = meant(self._broker, names, there_for(self._broker, names))
        self._way.tell(found.misfits.values())
        return found.topics

    def said(self, topics: list[str]) -> str:
        """What the patterns mean of these, for people."""
        matched = [topic for topic in topics if topic not in self.named]
        further = f" and {len(matched) - MOST_TOLD} more" if len(matched) > MOST_TOLD else ""
        return f"by its patterns {', '.join(matched[:MOST_TOLD]) or 'nothing'}{further}"

    def agents(self, topics: list[str]) -> dict[str, list[str]]:
        """Agent -> those of these topics that it reads."""
        return {
            agent: [topic for topic in topics if topic in self._read_by(names, topics)]
            for agent, names in self._agents.items()
        }

    def resets(self, topics: list[str], said: Mapping[str, str]) -> dict[str, str]:
        """Topic -> where to begin in it, by what is said of names and patterns."""
        found = dict(said)
        for pattern in self.patterns:
            for topic in self._read_by([pattern], topics):
                found.setdefault(topic, said.get(pattern, "earliest"))
        return found

    def _read_by(self, names: list[str], topics: list[str]) -> set[str]:
        own = own_of(self._broker)
        return {
            topic
            for name in names
            for topic in (matching(name, topics, own) if is_pattern(name) else [name])
        }

    async def follow(
        self, read: Callable[[], list[str]], read_anew: Callable[[list[str]], None]
    ) -> None:
        """Read anew where other topics match for two looks; for ever."""
        before: list[str] | None = None
        pause_s = FIND_S
        while self.patterns:
            await asyncio.sleep(pause_s)
            if self._broker.health.is_away:
                continue
            try:
                found = await asyncio.to_thread(self.find)
            except BrokerError:
                continue
            if found in (read(), before):
                before, pause_s = None, FIND_S
                if found != read():
                    read_anew(found)
            else:
                before, pause_s = found, AGAIN_S
