"""What librdkafka is told: the options of every client that streamd makes.

What the user gives by librdkafka's names wins; what must not be given, `streamd.librdkafka` has
refused.
"""

import logging
import os
from dataclasses import dataclass
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, Producer

from streamd.agentproc.kafka.tokens import token_callback
from streamd.config import Settings, broker_servers
from streamd.credentials import security
from streamd.errors import ConfigError
from streamd.kinds import show_duration

Options = dict[str, Any]

BEGINNING = OFFSET_BEGINNING

# What ends a client it writes at any level, to stderr unless it is given a logger; the error
# itself comes to our callbacks as well.
_silent = logging.getLogger(f"{__name__}.librdkafka")
_silent.addHandler(logging.NullHandler())
_silent.propagate = False

_FILES = ("ssl.ca.location", "ssl.certificate.location", "ssl.key.location")
MESSAGE_BYTES = 1_000_000
COUNTING = {"statistics.interval.ms": 5000}


@dataclass(frozen=True, slots=True)
class Reach:
    """What clients need to reach the cluster, and what the user says of them.

    Attributes:
        ours: Of every client; who hears its errors is added.
        given: The user's, of every client; of those that read; of those that write.
    """

    ours: Options
    given: Options
    given_reading: Options
    given_writing: Options
    settings: Settings

    @property
    def admin(self) -> Options:
        """A client that makes and describes."""
        return {**self.ours, **self.given}

    def reading(self, options: Options) -> Options:
        """A consumer."""
        return {**self.ours, **options, **self.given, **self.given_reading}

    def writing(self, options: Options) -> Options:
        """A producer."""
        return {**self.ours, **options, **self.given, **self.given_writing}


def connection(settings: Settings) -> Reach:
    """How the cluster is reached.

    Raises:
        ConfigError: Credentials or options cannot be used.
    """
    _check_times(settings)
    ours: Options = {
        "bootstrap.servers": ",".join(broker_servers(settings.broker)),
        "client.id": settings.broker_client_id or settings.id,
        "socket.timeout.ms": _ms(settings.broker_request_timeout),
        "reconnect.backoff.ms": 50,
        "reconnect.backoff.max.ms": 1000,
        # Errors come to our callbacks; librdkafka would write a line for each try as well.
        "log_level": 0,
        "logger": _silent,
    }
    credentials = settings.broker_credentials
    if credentials is not None and credentials.oauth_cb:
        ours["oauth_cb"] = token_callback(credentials.oauth_cb)
    reach = Reach(
        ours,
        security(settings.broker, credentials, settings.broker_options),
        settings.broker_consumer_options,
        settings.broker_producer_options,
        settings,
    )
    for name, place in reach.given.items():
        if name in _FILES and not os.access(str(place), os.R_OK):
            raise ConfigError(
                f"{name} is {place!r}, which is no file that this user can read",
                remedy="correct the path in broker_credentials or broker_options",
            )
    if reach.given or reach.given_reading or reach.given_writing:
        _try_out(reach)
    return reach


def _check_times(settings: Settings) -> None:
    session_s, beat_s = settings.broker_session_timeout, settings.broker_heartbeat_interval
    poll_s = settings.broker_max_poll_interval
    if beat_s is not None and beat_s >= session_s:
        raise ConfigError(
            f"broker_heartbeat_interval is {show_duration(beat_s)}, and the session that it "
            f"keeps alive ends after {show_duration(session_s)}",
            remedy="a third of broker_session_timeout, or less",
        )
    if poll_s < session_s:
        raise ConfigError(
            f"broker_max_poll_interval is {show_duration(poll_s)}, less than "
            f"broker_session_timeout ({show_duration(session_s)})",
            remedy="leave broker_max_poll_interval out",
        )


def _try_out(reach: Reach) -> None:
    """Let librdkafka say what it does not take, before anything is under way."""
    exactly_once = reach.settings.processing_guarantee == "exactly_once"
    reading = reach.reading({"group.id": "streamd"})
    writing = producer(reach, transactional_id="streamd" if exactly_once else None)
    for options in (reading, writing):
        # It connects nowhere without servers, and so needs no token: a client that is to have
        # one waits for it for a second, whatever it is for.
        options |= {"bootstrap.servers": "", "error_cb": _overhear}
        options.pop("oauth_cb", None)
    try:
        Consumer(reading).close()
        Producer(writing)
    except KafkaException as error:
        raise ConfigError(
            f"Kafka's client refuses its options: {error.args[0].str()}",
            remedy="correct broker_credentials or broker_options; `streamd config` shows them",
        ) from error


def _overhear(error: Any) -> None:
    """That there are no servers is known."""


def _ms(seconds: float) -> int:
    return max(1, int(seconds * 1000))


def reader(reach: Reach, group: str, **further: Any) -> Options:
    """A consumer that is told what to read, and is in no group.

    Args:
        further: Options by librdkafka's names, with `_` for `.`.
    """
    options = {
        "group.id": group,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "error",
        "isolation.level": "read_committed",
        "fetch.queue.backoff.ms": 1,
        "fetch.wait.max.ms": 10,
        "queued.max.messages.kbytes": 16_384,
        "enable.partition.eof": True,
        **_fetching(reach.settings),
        **{name.replace("_", "."): value for name, value in further.items()},
    }
    return reach.reading(options)


def _fetching(settings: Settings) -> Options:
    return {
        "max.partition.fetch.bytes": settings.consumer_max_fetch_size,
        "check.crcs": settings.broker_check_crcs,
    }


def member(reach: Reach, group: str, name: str, instance: str, *, together: bool) -> Options:
    """A consumer that is a static member of a group.

    Args:
        name: Its client id, by which other hosts find it.
        together: The partitions of one number go to one member, whatever their topic.
    """
    session_ms = _ms(reach.settings.broker_session_timeout)
    beat_s = reach.settings.broker_heartbeat_interval
    beat_ms = max(100, min(1000, session_ms // 10)) if beat_s is None else _ms(beat_s)
    return reach.reading(
        {
            **_any_member(reach, group, name),
            "group.instance.id": instance,
            "partition.assignment.strategy": "range" if together else "cooperative-sticky",
            "session.timeout.ms": session_ms,
            "heartbeat.interval.ms": beat_ms,
        }
    )


def dynamic_member(reach: Reach, group: str, name: str, *, together: bool) -> Options:
    """The same by the protocol of KIP-848, in which the cluster assigns, and says itself how
    long a session is.

    Not static: the cluster would refuse the successor of a member that was killed until its
    session has ended.
    """
    return reach.reading(
        {
            **_any_member(reach, group, name),
            "group.protocol": "consumer",
            "group.remote.assignor": "range" if together else "uniform",
        }
    )


def _any_member(reach: Reach, group: str, name: str) -> Options:
    return {
        "client.id": name,
        **COUNTING,
        "group.id": group,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        # A position is ours, always: where it cannot be read from, somebody must know.
        "auto.offset.reset": "error",
        "isolation.level": "read_committed",
        "max.poll.interval.ms": _ms(reach.settings.broker_max_poll_interval),
        "enable.partition.eof": True,
        "fetch.queue.backoff.ms": 1,
        "fetch.wait.max.ms": 500,
        "queued.min.messages": 20_000,
        "queued.max.messages.kbytes": 16_384,
        **_fetching(reach.settings),
    }


def producer(
    reach: Reach, *, transactional_id: str | None, batch_bytes: int | None = None
) -> Options:
    """A producer that leaves no gaps: it waits for the broker as long as it takes.

    Args:
        batch_bytes: What each of its topics takes as one batch; None: what the setting says.
    """
    settings = reach.settings
    most = settings.producer_max_batch_size
    options = {
        **COUNTING,
        "enable.idempotence": True,
        "acks": "all",
        "linger.ms": _ms(settings.producer_linger) if settings.producer_linger else 0,
        "compression.type": settings.producer_compression_type,
        "partitioner": "murmur2_random",
        "batch.num.messages": 10_000,
        "batch.size": min(most, batch_bytes or most),
        "request.timeout.ms": _ms(settings.producer_request_timeout),
        "queue.buffering.max.messages": 200_000,
        "queue.buffering.max.kbytes": 65_536,
        "message.max.bytes": MESSAGE_BYTES + 48_576,
        "message.timeout.ms": 0,
        "delivery.report.only.error": True,
    }
    if transactional_id is not None:
        del options["message.timeout.ms"]
        options["transactional.id"] = transactional_id
        # The cluster refuses a transaction's first offsets until the one before it is over
        # everywhere, some ms after its commit; the waits between further tries grow.
        options["retry.backoff.ms"] = 2
        transaction_ms = _ms(settings.broker_session_timeout)
        options["transaction.timeout.ms"] = transaction_ms
        # librdkafka refuses to wait longer for an answer than a transaction may last.
        options["socket.timeout.ms"] = min(transaction_ms, _ms(settings.broker_request_timeout))
    return reach.writing(options)


def at_once(reach: Reach, within_s: float = 30.0) -> Options:
    """A producer for records that somebody waits for; later than `within_s` none is written."""
    return reach.writing(
        {
            "enable.idempotence": True,
            "acks": "all",
            "linger.ms": 0,
            "partitioner": "murmur2_random",
            "message.timeout.ms": _ms(within_s),
        }
    )
