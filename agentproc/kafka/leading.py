"""The choice of one process of all hosts for what runs once: a lease on a topic's partition.

Whoever has the partition of `{id}-leader` in the group `{id}.{group}.leader` leads. It shows
that it still has it by commits: one that the cluster took at a moment keeps others away for a
session from then on. So the lease ends a session after the last such commit was sent, and the
next one begins later, whatever happened to this process meanwhile: it was stopped, cut off, or
its machine slept. What is said of other machines' clocks is only that they run equally fast.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from streamd.agentproc.kafka.health import Health
from streamd.agentproc.kafka.options import Options

log = logging.getLogger(__name__)

POLL_S = 0.2
RENEWALS = 5  # in a session
CLOSE_S = 3.0
AGAIN_S = 1.0

Tell = Callable[[bool], None]


class Leading(threading.Thread):
    """One candidate; see `streamd.agentproc.broker.Lead`.

    Args:
        options: Of a static member; its session is the lease's length.
        tell: Called on `loop` at each change.
    """

    def __init__(
        self,
        options: Options,
        topic: str,
        health: Health,
        loop: asyncio.AbstractEventLoop,
        tell: Tell,
    ) -> None:
        super().__init__(name=f"kafka {options['group.id']}", daemon=True)
        self._options = options
        self._session_s = options["session.timeout.ms"] / 1000
        self._place = TopicPartition(topic, 0, 0)
        self._health = health
        self._loop = loop
        self._tell = tell
        self._until = 0.0  # monotonic; on the loop
        self._told = False
        self._expiry: asyncio.TimerHandle | None = None
        self._ending = threading.Event()
        self._leave = False
        self._has = False  # the partition
        self._asked_at = 0.0  # when the commit that is under way was sent; 0: none is
        self._renew_at = 0.0

    # On the loop.

    def holds(self) -> bool:
        """Does this process surely lead at this very moment?"""
        return time.monotonic() < self._until

    async def close(self, *, leave: bool) -> None:
        """Be no candidate any more; `leave`: another one may lead at once, for good."""
        self._drop()
        self._leave = leave
        self._ending.set()
        await asyncio.to_thread(self.join, CLOSE_S)

    def _take(self, until: float) -> None:
        if self._ending.is_set() or until <= time.monotonic():
            return
        self._until = until
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = self._loop.call_later(until - time.monotonic(), self._expire)
        if not self._told:
            self._told = True
            log.info("this process leads: %s", self._options["group.id"])
            self._tell(True)

    def _expire(self) -> None:
        log.warning("this process does not lead any more: the cluster is not heard")
        self._drop()

    def _drop(self) -> None:
        self._until = 0.0
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if self._told:
            self._told = False
            self._tell(False)

    # The thread.

    def run(self) -> None:
        while not self._ending.is_set():
            try:
                self._be_candidate()
            except (KafkaException, RuntimeError) as error:
                log.warning("the choice of a leader is tried again: %s", error)
                self._ending.wait(AGAIN_S)

    def _be_candidate(self) -> None:
        """Take part until the end, or until the client cannot go on."""
        fatal: list[KafkaError] = []

        def problem(error: KafkaError) -> None:
            if error.fatal():
                fatal.append(error)
            else:
                self._health.on_error(error)

        calls = {"error_cb": problem, "on_commit": self._committed}
        consumer = Consumer({**self._options, **calls})
        self._has, self._asked_at = False, 0.0
        try:
            consumer.subscribe(
                [self._place.topic],
                on_assign=self._assigned,
                on_revoke=self._revoked,
                on_lost=self._revoked,
            )
            while not self._ending.is_set():
                message = consumer.poll(POLL_S)
                if message is not None and message.error() is None:
                    log.debug("a record in %s, which is for nobody", self._place.topic)
                if fatal:
                    raise KafkaException(fatal[0])
                self._renew(consumer)
            if self._leave:
                # `close` alone keeps a static member's partition until its session ends.
                consumer.unsubscribe()
                deadline = time.monotonic() + CLOSE_S / 2
                while consumer.assignment() and time.monotonic() < deadline:
                    consumer.poll(0.05)
        finally:
            self._lost()
            consumer.close()

    def _renew(self, consumer: Consumer) -> None:
        now = time.monotonic()
        if self._has and not self._asked_at and now >= self._renew_at:
            self._renew_at = now + self._session_s / RENEWALS
            self._asked_at = now
            consumer.commit(offsets=[self._place], asynchronous=True)

    def _committed(self, error: KafkaError | None, places: list[TopicPartition]) -> None:
        asked_at, self._asked_at = self._asked_at, 0.0
        error = error or next((place.error for place in places if place.error), None)
        if error is not None:
            log.debug("the lease was not renewed: %s", error)
            self._renew_at = time.monotonic() + POLL_S
        elif self._has and asked_at:
            self._loop.call_soon_threadsafe(self._take, asked_at + self._session_s)

    def _assigned(self, consumer: Consumer, gained: list[TopicPartition]) -> None:
        consumer.incremental_assign([self._place] if gained else [])
        if gained:
            consumer.pause(gained)  # nothing is read
            self._has, self._renew_at = True, 0.0

    def _revoked(self, consumer: Consumer, lost: list[TopicPartition]) -> None:
        if lost:
            self._lost()
            consumer.incremental_unassign(lost)

    def _lost(self) -> None:
        if self._has:
            self._has = False
            self._loop.call_soon_threadsafe(self._drop)
