"""Moving the write-ahead log into the file: done by one connection of one process.

PASSIVE copies what it can and disturbs nobody. TRUNCATE then empties the WAL; it needs the
turn, so it is done when all was copied and nobody writes, or when the WAL is too large.
"""

import logging
from pathlib import Path

import apsw

from streamd.agentproc.broker.schema import connect, explained, log_path
from streamd.agentproc.broker.turnstile import Turnstile
from streamd.failpoints import failpoint

log = logging.getLogger(__name__)

MAX_WAL_BYTES = 64 * 1024 * 1024

# A reader that does not end must not keep the turn.
_BUSY_TIMEOUT_MS = 100


class Checkpointer:
    """The connection that checkpoints; used by one thread.

    Raises:
        BrokerError: The log cannot be opened.
    """

    def __init__(self, datadir: Path) -> None:
        self._datadir = datadir
        self._wal_path = Path(f"{log_path(datadir)}-wal")
        self._turnstile = Turnstile(datadir)
        self._db = connect(datadir, self._turnstile)
        self._db.set_busy_timeout(_BUSY_TIMEOUT_MS)
        self._last_frames = -1

    @property
    def wal_bytes(self) -> int:
        """How large the WAL is."""
        # A stat does not open the file: opening and closing it would drop SQLite's locks.
        try:
            return self._wal_path.stat().st_size
        except FileNotFoundError:
            return 0

    def step(self) -> None:
        """Copy what can be copied; empty the WAL if nobody wrote since the last step, or if
        it is too large.

        Raises:
            BrokerError: The disk is full or fails.
        """
        try:
            frames, copied = self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.BusyError:
            return
        except apsw.Error as error:
            raise explained(error, log_path(self._datadir)) from error
        idle = frames == copied == self._last_frames and frames > 0
        self._last_frames = frames
        if idle or self.wal_bytes > MAX_WAL_BYTES:
            self.truncate()

    def truncate(self) -> bool:
        """Empty the WAL; False if a reader is in the way."""
        failpoint("checkpoint.before-truncate")
        self._turnstile.enter()
        try:
            self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except apsw.BusyError:
            return False
        except apsw.Error as error:
            raise explained(error, log_path(self._datadir)) from error
        finally:
            self._turnstile.leave()
        self._last_frames = -1
        return True

    def close(self) -> None:
        self._db.close()
        self._turnstile.close()
