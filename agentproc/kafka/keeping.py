"""What the process `log` does of itself for an app on Kafka, in a thread of its own.

First it makes what the app declares. Then it looks at the groups' markers every few seconds:
it tells how far behind they are, and trims what nobody needs any more.
"""

import logging
import threading
import time
from collections.abc import Callable

from streamd.agentproc.broker.kafka import KafkaBroker
from streamd.agentproc.kafka.making import make
from streamd.agentproc.kafka.standings import Standings
from streamd.agentproc.kafka.trimming import Trimmer
from streamd.errors import BrokerError, StreamdError
from streamd.wire import Declare, LagRow

log = logging.getLogger(__name__)

FIRST_S = 1.0  # after a start somebody may wait for it
LOOK_S = 5.0
TRIM_S = 30.0
FETCH_S = 2.0


class Keeper(threading.Thread):
    """See the module.

    Args:
        tell: Called by this thread with how far behind the groups are.
        failed: Called by this thread with why the app cannot run as it is declared.
    """

    def __init__(
        self,
        broker: KafkaBroker,
        declared: Declare,
        tell: Callable[[list[LagRow]], None],
        failed: Callable[[StreamdError], None],
    ) -> None:
        super().__init__(name="kafka keeper", daemon=True)
        self._broker = broker
        self._declared = declared
        self._tell = tell
        self._failed = failed
        self._ending = threading.Event()

    def end(self) -> None:
        """Stop soon; a cluster that is away is not waited for."""
        self._ending.set()

    def run(self) -> None:
        declared = self._declared
        try:
            made = make(self._broker, declared.groups, declared.tables)
        except StreamdError as error:
            if not self._ending.is_set():
                self._failed(error)
            return
        for topic, how in made.different.items():
            log.warning("topic %s is not as the app declares it: %s", topic, "; ".join(how))
        standings = Standings(self._broker, declared.groups, FETCH_S)
        try:
            self._keep(standings, Trimmer(self._broker, declared.topics, standings))
        finally:
            standings.close()

    def _keep(self, standings: Standings, trimmer: Trimmer) -> None:
        trimmed_at = time.monotonic()
        trouble = ""
        pause_s = FIRST_S
        while not self._ending.wait(pause_s):
            pause_s = LOOK_S
            try:
                standings.look(LOOK_S)
                self._tell(standings.lag())
                if time.monotonic() - trimmed_at >= TRIM_S:
                    trimmed_at = time.monotonic()
                    trimmer.trim()
                trouble = ""
            except BrokerError as error:
                if str(error) != trouble:
                    log.warning("lag is not told, nothing is trimmed: %s", error)
                trouble = str(error)
