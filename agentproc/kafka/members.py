"""Who has what of a group on all hosts, as the cluster says it.

A member's client id carries where it can be asked, and on which host it is:
`{gateway};{group};{slot};{installation}`.
"""

import asyncio
import time

from confluent_kafka import ConsumerGroupState, KafkaException
from confluent_kafka.admin import AdminClient

from streamd.agentproc.kafka.health import Health
from streamd.agentproc.kafka.topics import Away, broker_error
from streamd.errors import BrokerError
from streamd.wire import Described, Member

DESCRIBE_S = 5.0
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


def describe(admin: AdminClient, group: str) -> Described:
    """Ask the cluster; blocks, up to `DESCRIBE_S`.

    Raises:
        BrokerError: It does not say.
    """
    try:
        # Only of a cluster that answers: a description that is still waited for when a broker
        # comes back ends the process, by an assertion of librdkafka 2.16 (rd_kafka_enq_once).
        admin.list_topics(topic=None, timeout=DESCRIBE_S)
        answer = admin.describe_consumer_groups([group], request_timeout=DESCRIBE_S)
        found = answer[group].result(DESCRIBE_S)
    except KafkaException as error:
        raise broker_error(f"who is in group {group!r} could not be asked", error) from error
    except TimeoutError:
        raise Away(f"who is in group {group!r} was not told in {DESCRIBE_S:g} s") from None
    members = [
        Member(
            member.client_id,
            gateway_of(member.client_id),
            sorted({place.partition for place in member.assignment.topic_partitions}),
        )
        for member in found.members
    ]
    return Described(members, found.state == ConsumerGroupState.STABLE)


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
    admin: AdminClient, group: str, name: str, opened: "asyncio.Future[None]", health: Health
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
            found = await asyncio.to_thread(describe, admin, group)
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
