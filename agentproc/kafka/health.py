"""Whether the cluster can be reached, as all clients of one process see it.

A client that complains is no proof: it may tell late of what is over, or of one broker of
many. So the first complaint starts a thread that looks for itself, once a second, until the
cluster answers. One line says that it cannot be reached, one each ten seconds that it still
cannot, and one that it can again; librdkafka itself tells of every try of every connection.
"""

import logging
import re
import threading
import time

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from streamd.agentproc.kafka.options import Options

log = logging.getLogger(__name__)

SAY_AGAIN_S = 10.0
LOOK_S = 1.0
SHAKEN_S = 60.0

_AWAY = (
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._TIMED_OUT,
    KafkaError._TIMED_OUT_QUEUE,
    KafkaError._AUTHENTICATION,
)
_REASONS = (
    KafkaError._TRANSPORT,
    KafkaError._RESOLVE,
    KafkaError._SSL,
    KafkaError._AUTHENTICATION,
)
_NOISE = re.compile(
    r"^\w+://|/(?:bootstrap|\d+)(?=: )|(?:Connect to \w+#\S+ failed: )"
    r"|^(?:Failed to get metadata: )?(?:Local: )?| \(after \d+ms.*$"
)


def reason_of(text: str) -> str:
    """What librdkafka complains of, without what only its authors need (pure).

    >>> reason_of(
    ...     "kafka1:9092/bootstrap: Connect to ipv4#10.0.0.1:9092 failed: Connection refused "
    ...     "(after 0ms in state CONNECT)"
    ... )
    'kafka1:9092: Connection refused'
    """
    return _NOISE.sub("", text)


class Health:
    """See the module. May be called from any thread.

    Args:
        reach: The options of a client that looks.
        tells: Look and log; else who asks is told with an error alone.
    """

    def __init__(self, reach: Options, *, tells: bool = True) -> None:
        self._reach = reach
        self._tells = tells
        self._servers = reach["bootstrap.servers"]
        self._lock = threading.Lock()
        self._reason = ""
        self._is_looking = False
        self._since = self._said_at = 0.0
        self._shaken_at = float("-inf")  # monotonic; the last sign of trouble
        self.outages = 0  # how often the cluster was found away
        self._doing: dict[str, str] = {}  # what takes long -> in words

    @property
    def is_away(self) -> bool:
        """True from when the cluster was found away until it answers."""
        return self._since > 0

    def was_shaken(self) -> bool:
        """Was there a sign, in the last minute, that the cluster or a broker was away?

        Then the cluster may have ended for itself what it ends for a process that took over.
        """
        return self.is_away or time.monotonic() - self._shaken_at < SHAKEN_S

    @property
    def waits_for(self) -> str:
        """What this process waits for, for people; "" while all is well."""
        if self.is_away:
            return f"waits for the cluster at {self._servers}: {self._reason}"
        return "; ".join(dict.fromkeys(list(self._doing.values())))

    @property
    def trouble(self) -> str:
        """The last failure in a sentence."""
        return f"the cluster at {self._servers} cannot be reached: {self._reason}"

    def on_error(self, error: KafkaError) -> None:
        """For `error_cb` of a client."""
        if error.code() in _REASONS:
            self._shaken_at = time.monotonic()
            self._reason = reason_of(error.str())
        if error.code() in _AWAY:
            self.suspect(error.str())

    def suspect(self, why: str) -> None:
        """Something was tried in vain, and perhaps the cluster is away."""
        self._shaken_at = time.monotonic()
        with self._lock:
            self._reason = self._reason or reason_of(why)
            if self._tells and not self._is_looking:
                self._is_looking = True
                threading.Thread(target=self._look, name="kafka health", daemon=True).start()

    def doing(self, what: str, words: str) -> None:
        """What takes long, though the cluster answers; no words when it is over."""
        with self._lock:
            if words:
                self._doing[what] = words
            else:
                self._doing.pop(what, None)

    def _look(self) -> None:
        options: Options = {**self._reach, "error_cb": self.on_error}
        client = AdminClient(options)
        while True:
            began_at = time.monotonic()
            try:
                client.list_topics(timeout=LOOK_S)
                break
            except KafkaException as error:
                client.poll(0)  # what its connections complain of
                self._is_away(began_at, error.args[0].str())
            time.sleep(max(0.0, began_at + LOOK_S - time.monotonic()))
        self._is_there()

    def _is_away(self, now: float, why: str) -> None:
        with self._lock:
            self._reason = self._reason or reason_of(why)
            if not self._since:
                self._since = self._said_at = now
                self.outages += 1
                log.warning("%s", self.trouble)
            elif now - self._said_at >= SAY_AGAIN_S:
                self._said_at = now
                log.warning(
                    "the cluster at %s cannot be reached for %.0f s now: %s",
                    self._servers, now - self._since, self._reason,
                )  # fmt: skip

    def _is_there(self) -> None:
        with self._lock:
            if self._since:
                away_s = time.monotonic() - self._since
                self._shaken_at = time.monotonic()
                log.info("the cluster can be reached again after %.0f s", away_s)
            self._since = 0.0
            self._reason = ""
            self._is_looking = False
