"""Whether the cluster can be reached, as all clients of one process see it.

One line says that it cannot, one each ten seconds that it still cannot, and one that it can
again: librdkafka itself tells of every try of every connection.
"""

import logging
import threading
import time

from confluent_kafka import KafkaError

log = logging.getLogger(__name__)

SAY_AGAIN_S = 10.0

# A single broker that is away is no reason to say anything: others have its partitions.
_AWAY = (KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT, KafkaError._TIMED_OUT_QUEUE)
_REASONS = (
    KafkaError._TRANSPORT,
    KafkaError._RESOLVE,
    KafkaError._SSL,
    KafkaError._AUTHENTICATION,
)


class Health:
    """See the module. May be called from any thread.

    Attributes:
        waits_for: What this process waits for, for people; "" while all is well.
        trouble: The last failure in a sentence.
    """

    def __init__(self, servers: str, *, tells: bool = True) -> None:
        """
        Args:
            tells: Log it; else who asks is told with an error alone.
        """
        self.waits_for = self.trouble = ""
        self._servers = servers
        self._tells = tells
        self._lock = threading.Lock()
        self._reason = ""
        self._since = self._said_at = 0.0
        self._doing = ""

    @property
    def is_away(self) -> bool:
        """True from a failure until something has worked."""
        return self._since > 0

    def on_error(self, error: KafkaError) -> None:
        """For `error_cb` of a client."""
        if error.code() in _REASONS:
            self._reason = error.str().partition(" (after ")[0]
        if error.code() in _AWAY or error.code() == KafkaError._AUTHENTICATION:
            self.failed(error.str())

    def failed(self, why: str) -> None:
        """Something was tried in vain, because of the cluster."""
        now = time.monotonic()
        with self._lock:
            why = self._reason or why
            self.trouble = f"the cluster at {self._servers} cannot be reached: {why}"
            if not self._tells:
                self._since = self._since or now
            elif not self._since:
                self._since = self._said_at = now
                log.warning("%s", self.trouble)
            elif now - self._said_at >= SAY_AGAIN_S:
                self._said_at = now
                log.warning(
                    "the cluster at %s cannot be reached for %.0f s now: %s",
                    self._servers, now - self._since, why,
                )  # fmt: skip
            self.waits_for = f"waits for the cluster at {self._servers}: {why}"

    def worked(self) -> None:
        """Something worked."""
        if not self._since:
            return
        with self._lock:
            if self._since and self._tells:
                away_s = time.monotonic() - self._since
                log.info("the cluster can be reached again after %.0f s", away_s)
            self._since = 0.0
            self._reason = ""
            self.waits_for = self._doing

    def doing(self, what: str) -> None:
        """What takes long, though all is well; "" when it is over."""
        with self._lock:
            if self.waits_for == self._doing:
                self.waits_for = what
            self._doing = what
