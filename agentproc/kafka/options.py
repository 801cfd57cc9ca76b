"""What librdkafka is told: the options of every client that streamd makes."""

import logging
from typing import Any

from confluent_kafka import OFFSET_BEGINNING

from streamd.config import Settings, broker_servers

Options = dict[str, Any]

BEGINNING = OFFSET_BEGINNING

# What ends a client it writes at any level, to stderr unless it is given a logger; the error
# itself comes to our callbacks as well.
_silent = logging.getLogger(f"{__name__}.librdkafka")
_silent.addHandler(logging.NullHandler())
_silent.propagate = False

POLL_INTERVAL_MS = 300_000
MESSAGE_BYTES = 1_000_000


def connection(settings: Settings) -> Options:
    """What every client needs to reach the cluster."""
    return {
        "bootstrap.servers": ",".join(broker_servers(settings.broker)),
        "client.id": f"{settings.id}",
        "reconnect.backoff.ms": 50,
        "reconnect.backoff.max.ms": 1000,
        # Errors come to our callbacks; librdkafka would write a line for each try as well.
        "log_level": 0,
        "logger": _silent,
    }


def reader(reach: Options, group: str) -> Options:
    """A consumer that is told what to read, and is in no group."""
    return {
        **reach,
        "group.id": group,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "error",
        "isolation.level": "read_committed",
        "fetch.queue.backoff.ms": 1,
        "fetch.wait.max.ms": 10,
        "queued.max.messages.kbytes": 16_384,
        "enable.partition.eof": True,
    }


def member(
    reach: Options, group: str, instance: str, *, session_ms: int, together: bool
) -> Options:
    """A consumer that is a static member of a group.

    Args:
        together: The partitions of one number go to one member, whatever their topic.
    """
    return {
        **_any_member(reach, group),
        "group.instance.id": instance,
        "partition.assignment.strategy": "range" if together else "cooperative-sticky",
        "session.timeout.ms": session_ms,
        "heartbeat.interval.ms": max(100, min(1000, session_ms // 10)),
    }


def dynamic_member(reach: Options, group: str, *, together: bool) -> Options:
    """The same by the protocol of KIP-848, in which the cluster assigns, and says itself how
    long a session is.

    Not static: the cluster would refuse the successor of a member that was killed until its
    session has ended.
    """
    return {
        **_any_member(reach, group),
        "group.protocol": "consumer",
        "group.remote.assignor": "range" if together else "uniform",
    }


def _any_member(reach: Options, group: str) -> Options:
    return {
        **reach,
        "group.id": group,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        # A position is ours, always: where it cannot be read from, somebody must know.
        "auto.offset.reset": "error",
        "isolation.level": "read_committed",
        "max.poll.interval.ms": POLL_INTERVAL_MS,
        "enable.partition.eof": True,
        "fetch.queue.backoff.ms": 1,
        "fetch.wait.max.ms": 500,
        "queued.min.messages": 20_000,
        "queued.max.messages.kbytes": 16_384,
    }


def producer(reach: Options, *, transactional_id: str | None, transaction_ms: int) -> Options:
    """A producer that leaves no gaps: it waits for the broker as long as it takes."""
    options = {
        **reach,
        "enable.idempotence": True,
        "acks": "all",
        "linger.ms": 5,
        "compression.type": "lz4",
        "partitioner": "murmur2_random",
        "batch.num.messages": 10_000,
        "queue.buffering.max.messages": 200_000,
        "queue.buffering.max.kbytes": 65_536,
        "message.max.bytes": MESSAGE_BYTES + 48_576,
        "message.timeout.ms": 0,
        "delivery.report.only.error": True,
    }
    if transactional_id is not None:
        del options["message.timeout.ms"]
        options["transactional.id"] = transactional_id
        options["transaction.timeout.ms"] = transaction_ms
    return options


def at_once(reach: Options, within_s: float = 30.0) -> Options:
    """A producer for records that somebody waits for; later than `within_s` none is written."""
    return {
        **reach,
        "enable.idempotence": True,
        "acks": "all",
        "linger.ms": 0,
        "partitioner": "murmur2_random",
        "message.timeout.ms": int(within_s * 1000),
    }
