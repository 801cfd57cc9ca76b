"""A producer's transactions: each ends, or the producer is given up and another one made.

All calls block, and are made by one thread. A producer is given up where nobody can say how its
transaction ended: the cluster ends one that takes longer than `transaction.timeout.ms` for
itself, and librdkafka 2.16 may wait for ever for an answer that an outage took away
(`send_offsets_to_transaction`). Its successor has the same name: with its first call the
cluster ends what was left open. What counts of that, whoever reads it knows.

After an outage it is replaced as well: only a new one knows that what was before it is over,
and marks what the cluster left without a mark (`mending`).
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer

from streamd.agentproc.kafka.health import Health
from streamd.errors import BrokerError, BrokerLost, Fenced

log = logging.getLogger(__name__)

TURN_S = 0.2
MOST_TRIES = 5
MEND_S = 60.0
MARGIN_S = 5.0  # over the time that a transaction may take; then its producer is given up
_TAKEN_OVER = (KafkaError._FENCED, KafkaError.INVALID_PRODUCER_EPOCH)
# Another member came or went while a transaction was open; ours may be ours as before.
_REBALANCED = (
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError.FENCED_INSTANCE_ID,
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.NOT_COORDINATOR,
)


class Transactions:
    """See the module.

    Args:
        make: Makes the producer, and each one that takes its place.
        mend: Marks, with a new producer, what those before it left without a mark.
        timeout_s: How long the cluster lets a transaction be open.
        aborted: Told why one was aborted.
    """

    def __init__(
        self,
        make: Callable[[], Producer],
        mend: Callable[[Producer], None],
        timeout_s: float,
        health: Health,
        aborted: Callable[[KafkaError], None],
    ) -> None:
        self._aborted = aborted
        self._make = make
        self._mend = mend
        self._timeout_s = timeout_s
        self._health = health
        self._begun_at = time.monotonic()
        self._is_given_up = False
        self._outages = 0  # that were over when the producer was made
        self._was_shaken = False  # when one was aborted
        self._start()

    @property
    def is_in_doubt(self) -> bool:
        """May there be something without a mark, of this producer or one that was given up?"""
        return self._is_given_up or self._was_shaken or self._outages != self._health.outages

    def end_former(self) -> None:
        """Have what is in doubt ended; none is under way. Raises as `commit`."""
        if self.is_in_doubt:
            self._calls.shutdown(wait=False)
            self._start()

    def begin(self) -> None:
        """Open one, with a producer that can. Raises as `commit`."""
        self.end_former()
        self._begun_at = time.monotonic()
        self._until_done("a transaction cannot begin", self.producer.begin_transaction)

    def send_offsets(self, partitions: list[Any], metadata: object) -> None:
        """Have it commit where a group is. Raises as `commit`."""
        send: Any = self.producer.send_offsets_to_transaction
        self._until_done(
            "a transaction's offsets are refused", send, partitions, metadata, self._timeout_s
        )

    def commit(self) -> None:
        """End it: all of it counts.

        Raises:
            Fenced: Another process has taken over; nothing counts.
            BrokerLost: It cannot be known whether it does, until somebody reads it.
            BrokerError: It was aborted.
        """
        commit = self.producer.commit_transaction
        self._until_done("a transaction cannot be committed", commit, self._timeout_s)

    def abort(self) -> None:
        """End it: nothing of it counts.

        Raises:
            BrokerLost: It cannot be known whether it does.
        """
        deadline = time.monotonic() + self._timeout_s + MARGIN_S
        while True:
            try:
                self._call(self.producer.abort_transaction, self._timeout_s)
                self._was_shaken = self._health.was_shaken()
                return
            except KafkaException as error:
                cause = error.args[0]
                if cause.fatal() or not cause.retriable() or time.monotonic() > deadline:
                    why = f"a transaction cannot be aborted: {cause.str()}"
                    raise self._give_up(why) from None
                time.sleep(TURN_S)

    def _start(self) -> None:
        tries = 0
        while True:
            outages = self._health.outages
            self._start_one()
            try:
                self._calls.submit(self._mend, self.producer).result(MEND_S)
                break
            except (KafkaException, BrokerError, TimeoutError) as error:
                lost = self._give_up(f"what has no mark cannot be marked: {error}")
                self._health.suspect(str(lost))
                if tries == MOST_TRIES:
                    raise lost from None
                if not self._health.is_away:
                    tries += 1
                time.sleep(TURN_S)
        self._outages = outages
        self._is_given_up = self._was_shaken = False

    def _start_one(self) -> None:
        self.producer = self._make()
        self._calls = ThreadPoolExecutor(1, thread_name_prefix="kafka transactions")
        while True:
            try:
                self._call(self.producer.init_transactions, self._timeout_s)
                return
            except KafkaException as error:
                cause = error.args[0]
                if cause.fatal() or not cause.retriable():
                    raise self._give_up(f"a producer cannot start: {cause.str()}") from None
                self._health.on_error(cause)
                time.sleep(TURN_S)

    def _until_done(self, what: str, call: Callable[..., object], *arguments: object) -> None:
        while True:
            try:
                self._call(call, *arguments)
                return
            except KafkaException as error:
                cause = error.args[0]
                if cause.retriable() and not cause.fatal() and not self._is_late():
                    self._health.on_error(cause)
                    # The same call again carries on where the one before was.
                    time.sleep(TURN_S)
                    continue
                # The cluster says the same of a transaction that it ended for itself.
                took_s = time.monotonic() - self._begun_at
                is_ours = took_s > self._timeout_s or self._health.was_shaken()
                if cause.code() in _TAKEN_OVER and not is_ours:
                    raise Fenced(f"{what}: another process took over ({cause.str()})") from None
                if not cause.fatal() and (
                    cause.txn_requires_abort() or cause.code() in _REBALANCED
                ):
                    try:
                        self.abort()
                    finally:
                        self._aborted(cause)
                    raise BrokerError(f"{what}: {cause.str()}") from None
                raise self._give_up(f"{what}: {cause.str()}") from None

    def _is_late(self) -> bool:
        return time.monotonic() - self._begun_at > self._timeout_s + MARGIN_S

    def _call(self, call: Callable[..., object], *arguments: object) -> None:
        try:
            self._calls.submit(call, *arguments).result(self._timeout_s + MARGIN_S)
        except TimeoutError:
            # The call has the producer, for ever perhaps: neither can be ended.
            raise self._give_up("the client did not return from a call") from None

    def _give_up(self, why: str) -> BrokerLost:
        self._is_given_up = True
        # It may live on with what it has: nothing of that is to reach the cluster later.
        self.producer.purge(in_queue=True, in_flight=True, blocking=False)
        self._calls.shutdown(wait=False)
        return BrokerLost(why)
