"""Kafka as the engine's broker: what the sessions of one process share.

The way of events is in `streamd.agentproc.kafka.session`.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from confluent_kafka.admin import AdminClient

from streamd.agentproc.broker import (
    Holder,
    Subscription,
)
from streamd.agentproc.kafka import declaring, options, topics
from streamd.agentproc.kafka.figures import Figures
from streamd.agentproc.kafka.health import Health
from streamd.agentproc.kafka.leading import Leading
from streamd.agentproc.kafka.members import Roster
from streamd.agentproc.kafka.session import KafkaSession
from streamd.config import Settings
from streamd.wire import StandbyRow, TopicInfo

log = logging.getLogger(__name__)

T = TypeVar("T")

AWAY_PAUSE_S = 0.2


class KafkaBroker:
    """A cluster, as one process of an app uses it.

    Args:
        declared: What the app names; other topics are made with the default partitions.
        installation: Tells this data directory's members from another host's.
        patience_s: How long to wait for a cluster that is away; None: for ever.
        gateway: Where other hosts reach this one's pages.
        stores: The folder of local copies of tables; None: there are none.
    """

    def __init__(
        self,
        settings: Settings,
        declared: list[TopicInfo],
        installation: str,
        patience_s: float | None = None,
        gateway: str = "",
        stores: Path | None = None,
    ) -> None:
        self.settings = settings
        self.traces = settings.processing_guarantee == "at_least_once"
        self.installation = installation
        self.gateway = gateway
        self.reach = options.connection(settings)
        self.health = Health(self.reach.admin, tells=patience_s is None)
        self.reach.ours["error_cb"] = self.health.on_error
        self.figures = Figures()
        self.reach.ours["stats_cb"] = self.figures.take
        self.patience_s = patience_s
        self.stores = stores
        self.declared = {topic.name: topic for topic in declared}
        self._admin: AdminClient | None = None
        self._roster: Roster | None = None
        self._counts: dict[str, int] = {}  # topic -> partitions
        self._open: set[KafkaSession] = set()

    def session(self, subscription: Subscription, holder: Holder | None = None) -> KafkaSession:
        """A session that is not open yet."""
        return KafkaSession(self, subscription, holder)

    async def lead(self, group: str, tell: Callable[[bool], None]) -> Leading:
        """See `streamd.agentproc.broker.Broker`."""
        settings = self.settings
        topic = topics.Wanted(f"{settings.id}-leader", 1, settings.topic_replication_factor)
        await asyncio.to_thread(self.ensure, [topic])
        name = f"{settings.id}.{group}.leader"
        instance = f"{name}/{self.installation}"
        member = options.member(self.reach, name, settings.id, instance, together=False)
        leading = Leading(member, topic.name, self.health, asyncio.get_running_loop(), tell)
        leading.start()
        return leading

    async def close(self) -> None:
        """Close the sessions; what was committed stays."""
        for session in list(self._open):
            await session.close()

    @property
    def admin(self) -> AdminClient:
        """The client that makes and describes topics."""
        if self._admin is None:
            self._admin = AdminClient(self.reach.admin)
        return self._admin

    @property
    def roster(self) -> Roster:
        """Who has what of the groups."""
        if self._roster is None:
            self._roster = Roster(self.admin)
        return self._roster

    def packed(self, topic: str) -> bool:
        """Does a topic carry packs?"""
        info = self.declared.get(topic)
        return info is not None and info.packed

    def wanted(self, topic: str) -> topics.Wanted:
        """A topic of events, as it is declared."""
        return declaring.event_topic(self.settings, topic, self.declared.get(topic))

    @property
    def waits_for(self) -> str:
        """See `streamd.agentproc.broker.Broker`."""
        return self.health.waits_for

    def client_figures(self) -> dict[str, float]:
        """See `streamd.agentproc.broker.Broker`."""
        return self.figures.sums()

    def standby(self) -> list[StandbyRow]:
        """See `streamd.agentproc.broker.Broker`."""
        return [row for session in self._open for row in session.standby()]

    def ensure(
        self, wanted: Iterable[topics.Wanted], seen: Iterable[str] = ()
    ) -> dict[str, topics.Found]:
        """Make topics that are not there; blocks, until the cluster can be reached.

        Args:
            seen: Further topics to look at, which are not made.

        Raises:
            ConfigError: They have another number of partitions, or are not to be made.
            BrokerError: It cannot be reached for longer than the patience.
        """
        wanted, seen = list(wanted), list(seen)
        make = self.settings.topic_allow_declare
        found = self.patiently(
            lambda: topics.ensure(self.admin, wanted, topics.TRY_S, seen=seen, make=make)
        )
        self._counts |= {name: topic.partitions for name, topic in found.items()}
        return found

    def patiently(self, ask: Callable[[], T]) -> T:
        """What the cluster says, asked again while it is away; blocks.

        Raises:
            Away: It is away for longer than the patience.
        """
        asked_at = time.monotonic()
        while True:
            try:
                return ask()
            except topics.Away as error:
                self.admin.poll(0)  # what the connections complain of
                self.health.suspect(str(error))
                waited_s = time.monotonic() - asked_at
                if self.patience_s is not None and waited_s >= self.patience_s:
                    raise topics.Away(
                        self.health.trouble,
                        remedy="see that it runs, and that `broker` names it",
                    ) from error
                time.sleep(AWAY_PAUSE_S)

    def partitions_of(self, topic: str) -> int:
        """How many partitions a topic has; made if it is not there, which blocks once."""
        if topic not in self._counts:
            self.ensure([self.wanted(topic)])
        return self._counts[topic]

    def opened(self, session: KafkaSession) -> None:
        """Close this session too when the broker is closed."""
        self._open.add(session)

    def closed(self, session: KafkaSession) -> None:
        """The session let go of what it had."""
        self._open.discard(session)
