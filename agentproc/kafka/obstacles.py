"""What keeps a process from its topics and its group: they are gone, or it may not use them.

The client says little of either: a consumer of a topic that was deleted is silent, and one of
a topic that was made anew under its name goes on at the old offset, past whatever is below it.
So a session asks the cluster each few seconds. What stands in the way is waited for; it is
logged once, and `status` says it. Everything here blocks.
"""

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AclOperation,
    AdminClient,
    ConsumerGroupDescription,
)

from streamd.agentproc.kafka import topics
from streamd.agentproc.kafka.health import Health
from streamd.agentproc.kafka.topics import Found

log = logging.getLogger(__name__)

LOOK_S = 3.0  # and longer, up to `RARELY_S`, while nothing happens
RARELY_S = 10.0
RARER = 1.25
AGAIN_S = 1.0  # where somebody waits
OBSTRUCTED = frozenset({
    KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION, KafkaError.UNKNOWN_TOPIC_ID,
    KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
})  # fmt: skip
"""What clients say where a topic is gone, or may not be used."""

Needs = Mapping[str, frozenset[str]]  # topic -> "read", "write"

READ, WRITE = frozenset({"read"}), frozenset({"write"})


@dataclass(slots=True)
class Look:
    """What the cluster said."""

    found: dict[str, Found] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)  # topics that are not there
    forbidden: dict[str, list[str]] = field(default_factory=dict)  # topic -> what for
    barred: list[str] = field(default_factory=list)  # groups that may not be read


def look(admin: AdminClient, needs: Needs, timeout_s: float = topics.TRY_S) -> Look:
    """Are topics there, and may they be used?

    Raises:
        Away: The cluster cannot be reached.
        BrokerError: It refuses to say, for another reason than permission.
    """
    result = Look()
    if not needs:
        return result
    asked = admin.describe_topics(
        TopicCollection(list(needs)),
        include_authorized_operations=True,
        request_timeout=timeout_s,
    )
    for name, future in asked.items():
        try:
            topic = future.result()
        except KafkaException as error:
            code = error.args[0].code()
            if code == KafkaError.UNKNOWN_TOPIC_OR_PART:
                result.gone.append(name)
            elif code == KafkaError.TOPIC_AUTHORIZATION_FAILED:
                result.forbidden[name] = sorted(needs[name])
            else:
                raise topics.broker_error(
                    f"topic {name!r} cannot be described", error
                ) from error
            continue
        result.found[name] = topics.found_of(topic)
        if lacks := lacking(topic.authorized_operations, needs[name]):
            result.forbidden[name] = lacks
    return result


def barred(
    asked: Mapping[str, "Future[ConsumerGroupDescription]"], timeout_s: float = topics.TRY_S
) -> list[str]:
    """The groups in which this user may be no member; blocks.

    Args:
        asked: Group -> what the cluster is being asked about it, with what is authorized.
        timeout_s: How long each is waited for.

    Raises:
        Away: The cluster cannot be reached.
    """
    found = []
    for name, future in asked.items():
        try:
            granted = future.result(timeout_s).authorized_operations
        except TimeoutError:
            raise topics.Away(f"group {name!r} was not told of in {timeout_s:g} s") from None
        except KafkaException as error:
            code = error.args[0].code()
            if code in topics.AWAY_CODES:
                raise topics.broker_error(
                    f"group {name!r} cannot be described", error
                ) from error
            if code in OBSTRUCTED:
                found.append(name)
            continue  # else there is none yet
        if granted and lacking(granted, READ):
            found.append(name)
    return found


def lacking(granted: Iterable[object] | None, needed: Iterable[str]) -> list[str]:
    """What is needed and not granted.

    Args:
        granted: Operations; None: the cluster is too old to say.
    """
    if granted is None:
        return []
    has = {AclOperation[each.name] for each in granted}  # type: ignore[attr-defined]
    return sorted(word for word in needed if AclOperation[word.upper()] not in has)


def sentences(seen: Look, user: str, counts: Mapping[str, int]) -> list[str]:
    """What is in the way and what to do, one sentence a topic or group (pure).

    Args:
        user: Whom the cluster takes the app for.
        counts: How many partitions a topic must have, where that is known.

    >>> sentences(Look(gone=["posts"]), "user 'ann'", {"posts": 4})
    ["waits for topic 'posts', which was deleted: make it again, with 4 partitions"]
    >>> sentences(Look(forbidden={"posts": ["read"]}), "user 'ann'", {})
    ["waits for permission to read topic 'posts': give user 'ann' an ACL for it"]
    """
    told = []
    for name in sorted(seen.gone):
        number = f", with {counts[name]} partitions" if name in counts else ""
        told.append(f"waits for topic {name!r}, which was deleted: make it again{number}")
    for name, what in sorted(seen.forbidden.items()):
        told.append(
            f"waits for permission to {' and '.join(what)} topic {name!r}: give {user} an ACL "
            "for it"
        )
    told += [
        f"waits for permission to read group {name!r}: give {user} an ACL for it"
        for name in seen.barred
    ]
    return told


class Way:
    """What is in the way of one kind of work, told where people look; from any thread.

    Args:
        what: Whose work it is, in the log.
    """

    def __init__(self, health: Health, what: str) -> None:
        self._health = health
        self._what = what
        self._text = ""
        self._since = 0.0
        self._lock = threading.Lock()

    def tell(self, texts: Iterable[str]) -> None:
        """This is in the way now; nothing: it is clear."""
        text = "; ".join(texts)
        with self._lock:
            if text == self._text:
                return
            self._text = text
            if text:
                self._since = self._since or time.monotonic()
                log.warning("%s %s", self._what, text)
            else:
                waited_s, self._since = time.monotonic() - self._since, 0.0
                log.info("%s goes on after %.0f s", self._what, waited_s)
            self._health.doing(f"way of {self._what}", text)
