"""What a poller makes of the ends that a client tells of."""

import asyncio
from collections.abc import Callable

from confluent_kafka import KafkaError, Message

from streamd.agentproc.broker import TP
from streamd.agentproc.kafka import options
from streamd.agentproc.kafka.health import Health
from streamd.agentproc.kafka.packs import position_of
from streamd.agentproc.kafka.poller import Poller
from streamd.agentproc.kafka.reading import Read, Reading
from streamd.config import resolve
from streamd.errors import StreamdError

TOPIC = TP("t", 0)
REACH = options.connection(
    resolve({"id": "app", "broker": "kafka://127.0.0.1:1"}, {}, None, {})
)


async def nobody(*_: object) -> None:
    """No partition comes or goes."""


def end_at(offset: int) -> Message:
    error = KafkaError(KafkaError._PARTITION_EOF)
    return Message(topic=TOPIC.topic, partition=TOPIC.partition, offset=offset, error=error)


def make_poller(
    take: Callable[[list[Read]], None] = lambda reads: None,
    astray: Callable[[StreamdError | None], None] = lambda error: None,
) -> Poller:
    """One that does not run; on the running loop."""
    return Poller(
        options.member(REACH, "g", "name", "one", together=False), ["t"],
        asyncio.get_running_loop(), name="poller", lose=nobody, gain=nobody,
        take=take, failed=lambda error: None, astray=astray,
        health=Health(REACH.admin), bound_s=1, session_s=10,
    )  # fmt: skip


def test_an_end_beyond_what_was_read_is_asked_for_again_before_it_is_believed() -> None:
    async def body() -> None:
        taken: list[Read] = []
        poller = make_poller(take=taken.extend)
        poller._reading[TOPIC] = Reading(1, position_of(5), {})

        poller._hand_over([end_at(9)])
        # That of a fetch from before the seek to 5, perhaps: it is sought for once more.
        assert TOPIC not in poller._reading
        poller._reading[TOPIC], _ = poller._seeks.pop(TOPIC)
        await asyncio.sleep(0)
        assert taken == []

        poller._hand_over([end_at(9)])
        await asyncio.sleep(0)
        # Marks of transactions lie before it.
        assert [(read.start, read.end) for read in taken] == [(position_of(5), position_of(9))]

    asyncio.run(body())


def test_topics_are_looked_at_once_where_the_client_is_refused() -> None:
    async def body() -> None:
        told: list[StreamdError | None] = []
        poller = make_poller(astray=told.append)
        refused = KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED)
        poller._hand_over([Message(topic=None, partition=-1, error=refused)])
        poller._problem(KafkaError(KafkaError._TRANSPORT))  # says nothing of topics
        await asyncio.sleep(0)
        assert told == [None]

    asyncio.run(body())
