"""Who has what of a group on all hosts, as the cluster says it.

A member's client id carries where it can be asked, and on which host it is:
`{gateway};{group};{slot};{installation}`.
"""

import asyncio
import threading
import time
from concurrent.futures import Future
from typing import NamedTuple

from confluent_kafka import ConsumerGroupState, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    ConsumerGroupDescription,
)

from streamd.agentproc.kafka.health import Health
from streamd.agentproc.kafka.topics import Away, broker_error
from streamd.errors import BrokerError
from streamd.wire import Described, Member

ASK_S = 5.0
LONGEST_S = 3600.0  # that librdkafka takes
ANEW_S = 10.0  # without an answer; then twice as long, and so on
JOIN_S = 30.0
LOOK_S = 3.0


def client_id(gateway: str, group: str, slot: int, installation: str) -> str:
    """What a member of a group calls itself."""
    return f"{gateway};{group};{slot};{installation}"


def gateway_of(client_id: str) -> str:
    """Where its host is asked; "" of a member that is none of ours.

    >>> gateway_of("10.0.0.2:6066;count;1;3f2a"), gateway_of("rdkafka")
    ('10.0.0.2:6066', '')
    """
    gateway, _, rest = client_id.partition(";")
    return gateway if rest else ""


def installation_of(client_id: str) -> str:
    """Which host it is on; gateways may be called the same on all of them.

    >>> installation_of("127.0.0.1:6066;count;1;3f2a")
    '3f2a'
    """
    return client_id.rpartition(";")[2]


class _Question(NamedTuple):
    answer: "Future[ConsumerGroupDescription]"
    pause_s: float  # until it is asked anew
    anew_at: float  # monotonic


class Roster:
    """Asks the cluster who is in a group; from any thread."""

    def __init__(self, admin: AdminClient) -> None:
        self._admin = admin
        self._lock = threading.Lock()
        self._asked: dict[str, _Question] = {}  # group -> the last

    def ask(self, group: str) -> Described:
        """Ask; blocks, up to `ASK_S`.

        Raises:
            BrokerError: The cluster does not say.
        """
        try:
            found = self.question(group).result(ASK_S)
        except KafkaException as error:
            raise broker_error(
                f"who is in group {group!r} could not be asked", error
            ) from error
        except TimeoutError:
            raise Away(f"who is in group {group!r} was not told in {ASK_S:g} s") from None
        members = [
            Member(
                member.client_id,
                gateway_of(member.client_id),
                sorted({place.partition for place in member.assignment.topic_partitions}),
            )
            for member in found.members
        ]
        return Described(members, found.state == ConsumerGroupState.STABLE)

    def question(self, group: str) -> "Future[ConsumerGroupDescription]":
        """What the cluster is being asked about a group, with what this user may do in it."""
        # A question whose time is over while its answer may still come ends the process, by an
        # assertion (librdkafka issue 4605). So it has all the time there is: who does not want
        # to wait any longer leaves it to the next. It is asked anew now and then, since one
        # from before the cluster knew of any group gets no answer at times.
        now = time.monotonic()
        with self._lock:
            last = self._asked.get(group)
            if last is not None and not last.answer.done() and now < last.anew_at:
                return last.answer
            pause_s = (
                2 * last.pause_s if last is not None and not last.answer.done() else ANEW_S
            )
            asked = self._admin.describe_consumer_groups(
                [group], include_authorized_operations=True, request_timeout=LONGEST_S
            )
            self._asked[group] = _Question(asked[group], pause_s, now + pause_s)
            return asked[group]


def without_reader(found: Described, partitions: int) -> list[int]:
    """Partitions of a group at rest that no member has (pure).

    >>> without_reader(Described([Member("a", "", [0, 3])], settled=True), 4)
    [1, 2]
    """
    if not found.settled or not found.members:
        return []
    had = {partition for member in found.members for partition in member.partitions}
    return [partition for partition in range(partitions) if partition not in had]


async def wait_to_join(
    roster: Roster, group: str, name: str, opened: "asyncio.Future[None]", health: Health
) -> None:
    """Wait until partitions come, or the cluster says that there are none for this member.

    By the protocol of KIP-848 a cluster tells a member that gets none nothing, as one does that
    does not know the protocol.

    Raises:
        BrokerError: The group did not take the member.
    """
    deadline = time.monotonic() + JOIN_S
    while True:
        await asyncio.wait({opened}, timeout=LOOK_S)
        if opened.done():
            return
        if health.is_away:
            deadline = time.monotonic() + JOIN_S
            continue
        try:
            found = await asyncio.to_thread(roster.ask, group)
        except BrokerError:
            found = Described([], settled=False)  # a group that nobody is in yet
        mine = [member for member in found.members if member.name == name]
        if mine and found.settled and not mine[0].partitions:
            return
        if not mine and time.monotonic() > deadline:
            raise BrokerError(
                f"group {group!r} did not take this process in {JOIN_S:g} s",
                seen=["broker_group_protocol is 'consumer', which Kafka has from 4.0 on"],
                remedy="broker_group_protocol='classic', or a cluster that has KIP-848",
            )
