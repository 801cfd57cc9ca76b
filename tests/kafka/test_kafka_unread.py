"""No partition stays without a reader, wherever a member of the group is killed."""

import asyncio
import signal
import subprocess
import sys
import time

from kafka_sessions import WITHIN_S, Place, run

from streamd.agentproc.broker import Subscription
from streamd.agentproc.kafka.session import KafkaSession

# A member that is killed just when it is to give partitions away, and joins for no second step.
VICTIM = """
import os, signal, sys
from confluent_kafka import Consumer

servers, group, instance, topic = sys.argv[1:]
consumer = Consumer({
    "bootstrap.servers": servers, "group.id": group, "group.instance.id": instance,
    "partition.assignment.strategy": "cooperative-sticky", "session.timeout.ms": 10000,
    "auto.offset.reset": "earliest", "enable.auto.commit": False,
})

def assigned(consumer, places):
    print(len(places), flush=True)

def revoked(consumer, places):
    os.kill(os.getpid(), signal.SIGKILL)

consumer.subscribe([topic], on_assign=assigned, on_revoke=revoked)
while True:
    consumer.poll(0.1)
"""


def test_partitions_that_a_kill_between_two_steps_of_a_rebalance_left_to_nobody_are_read(
    kafka: str,
) -> None:
    place = Place(kafka, partitions=4)

    def session(slot: int) -> KafkaSession:
        sub = place.subscription
        slots = Subscription(sub.app_id, sub.group, slot, 2, sub.agents, sub.tables)
        return place.broker().session(slots)

    async def body() -> None:
        async with place.reader():
            pass  # the topics are there
        arguments = [kafka, f"{place.app_id}.g", f"{place.app_id}/g/one/0", place.words]
        victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, *arguments], stdout=subprocess.PIPE, text=True
        )
        assert victim.stdout is not None
        with victim:
            assert await asyncio.to_thread(victim.stdout.readline) == "4\n"
            other = session(1)
            opening = asyncio.ensure_future(other.open())
            assert await asyncio.to_thread(victim.wait, WITHIN_S) == -signal.SIGKILL
        heir = session(0)
        await asyncio.gather(heir.open(), opening)

        deadline = time.monotonic() + WITHIN_S
        while sorted([*heir.partitions, *other.partitions]) != [0, 1, 2, 3]:
            assert time.monotonic() < deadline, (heir.partitions, other.partitions)
            await asyncio.sleep(0.05)
        await asyncio.gather(heir.close(), other.close())

    run(body)
