"""What the instance remembers over its restarts: who ran, how they ended, what happened.

It is history and nothing else: whatever goes wrong with the file costs history, never a wait.
sqlitedict writes in a thread of its own; a failed commit ends that thread, and a caller that
waits for it would wait for ever. So nothing here waits: the file is read before the thread
starts, writes are queued up to a bound, and a thread that died is left alone.
"""

import contextlib
import logging
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from sqlitedict import SqliteDict

from streamd.errors import StreamdError
from streamd.instance import Identity
from streamd.secrets import mask

log = logging.getLogger(__name__)

TABLE = "registry"
MAX_QUEUE = 1_000
MAX_EVENTS = 1_000
FIELDS = ("n", "t", "level", "kind", "process", "text")

Kind = Literal[
    "start",  # of the instance, and of a process that had ended before
    "exit",  # a process ended, and stays so
    "restart",  # a process ended, and is started again; or somebody asked for it
    "fatal",  # a process is given up
    "hang",
    "memory",  # out of it; or replaced since it had grown
    "park",  # an event took its process down too often
    "reload",
    "scale",
    "disk",
    "hosts",
    "stray",  # what a process left behind
    "stop",  # of the instance
]


class Registry:
    """The registry of one instance. It works in memory until `open`, and if that fails."""

    def __init__(self) -> None:
        self.last_exits: dict[str, str] = {}  # process -> how its last run ended, from before
        self.events: list[dict[str, Any]] = []  # with FIELDS; the oldest first
        self._early: dict[str, dict[str, Any]] | None = {}  # written before there was a file
        self._path = Path()
        self._rows: SqliteDict | None = None
        self._number = 0
        self._has_dropped = False
        self._has_written = False  # since the last commit

    def open(self, path: Path) -> None:
        """Read what `path` holds and write to it from now on; never raises for its sake."""
        self._path = path
        early, self.events = self.events, []
        rows, self._early = self._early or {}, None
        try:
            self._load()
            self._rows = SqliteDict(
                str(path),
                tablename=TABLE,
                journal_mode="WAL",
                outer_stack=False,
                autocommit=False,
                encode=msgspec.json.encode,
                decode=msgspec.json.decode,
            )
            # sqlitedict has just turned it off.
            self._rows.conn.execute("PRAGMA synchronous=NORMAL")
        except Exception as error:
            self._give_up(error)
        for key, value in rows.items():
            self._write(key, value)
        for event in early:
            # Numbered anew, after what the file holds.
            self._add(event)

    def note(self, level: str, kind: Kind, text: str, process: str = "") -> None:
        """Add an event to the history.

        Args:
            process: Which one it is about, "" for the whole instance.
        """
        text = mask(text)
        self._add(
            {"t": time.time(), "level": level, "kind": kind, "process": process, "text": text}
        )

    def _add(self, event: dict[str, Any]) -> None:
        self._number += 1
        event["n"] = self._number
        self.events.append(event)
        del self.events[:-MAX_EVENTS]
        if self._early is None:
            self._write(f"event/{self._number % MAX_EVENTS:04d}", event)

    def started(self, process: str, identity: Identity, restarts: int) -> None:
        """Write down who runs."""
        self._write(
            f"process/{process}",
            {
                "pid": identity.pid,
                "start_ticks": identity.start_ticks,
                "boot_id": identity.boot_id,
                "restarts": restarts,
                "t": time.time(),
            },
        )

    def ended(self, process: str, how: str) -> None:
        """Write down how a process ended."""
        self._write(f"exit/{process}", {"how": how, "t": time.time()})

    def commit(self) -> None:
        """Let what was written since the last call become durable, in a while."""
        if self._has_written and self._usable():
            assert self._rows is not None
            self._has_written = False
            try:
                self._rows.commit(blocking=False)
            except Exception as error:
                self._give_up(error)

    def close(self, timeout_s: float) -> None:
        """Commit and wait for the thread, for at most `timeout_s`."""
        self.commit()
        if self._rows is None:
            return
        thread, self._rows.conn = self._rows.conn, None
        thread.close(force=True)
        thread.join(timeout_s)
        self._rows = None

    def _load(self) -> None:
        connection = sqlite3.connect(self._path, timeout=0.2)
        try:
            # The master's loop waits here, and nine syncs of a new file took 40 ms of each
            # first start. A power cut in this moment costs a history that has not begun.
            connection.execute("PRAGMA synchronous=OFF")
            # Whatever would stop the thread later shows here, where it can be caught.
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(
                f'CREATE TABLE IF NOT EXISTS "{TABLE}" (key TEXT PRIMARY KEY, value BLOB)'
            )
            connection.execute(f'DELETE FROM "{TABLE}" WHERE 0')
            connection.commit()
            history = _history(connection)
        finally:
            connection.close()
        self.last_exits = {name: row["how"] for name, row in history.exits.items()}
        self.events = history.events
        self._number = self.events[-1]["n"] if self.events else 0

    def _write(self, key: str, value: dict[str, Any]) -> None:
        if self._early is not None:
            self._early[key] = value
        if not self._usable():
            return
        assert self._rows is not None
        try:
            self._rows[key] = value
            self._has_written = True
        except Exception as error:
            # The error of an earlier write, which sqlitedict tells at the next one.
            self._give_up(error)

    def _usable(self) -> bool:
        if self._rows is None:
            return False
        thread = self._rows.conn
        if not thread.is_alive():
            self._give_up(RuntimeError("its thread ended"))
            return False
        if thread.reqs.qsize() <= MAX_QUEUE:
            return True
        if not self._has_dropped:
            self._has_dropped = True
            log.warning(
                "%s: %d writes wait for the disk; some are left out", self._path, MAX_QUEUE
            )
        return False

    def _give_up(self, error: Exception) -> None:
        log.warning(
            "the registry %s cannot be used: %s; going on without: what happened is not "
            "remembered over a restart",
            self._path,
            error,
        )
        if isinstance(error, (sqlite3.DatabaseError, msgspec.DecodeError, KeyError)):
            # So that the next start has one again.
            with contextlib.suppress(OSError):
                self._path.rename(self._path.with_suffix(".damaged"))
        self._rows = None


@dataclass(frozen=True, slots=True)
class History:
    """What a registry holds."""

    events: list[dict[str, Any]]  # with FIELDS; the oldest first
    starts: dict[str, dict[str, Any]]  # process -> its last start: "pid", "restarts", "t" …
    exits: dict[str, dict[str, Any]]  # process -> its last end: "how", "t"


def read_history(path: Path) -> History:
    """What the registry at `path` holds, whether a master writes to it or none lives.

    Raises:
        StreamdError: There is none, or it cannot be read.
    """
    if not path.exists():
        raise StreamdError(
            f"there is no history at {path}",
            remedy="name the data directory with -D, or the instance with --name",
        )
    try:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=1.0
        )
        try:
            return _history(connection)
        finally:
            connection.close()
    except (sqlite3.Error, msgspec.DecodeError, KeyError) as error:
        raise StreamdError(
            f"the history {path} cannot be read: {error}",
            remedy="it is moved away at the next start, which begins a new one",
        ) from error


def _history(connection: sqlite3.Connection) -> History:
    rows = connection.execute(
        f'SELECT key, value FROM "{TABLE}" LIMIT {4 * MAX_EVENTS}'
    ).fetchall()
    history = History([], {}, {})
    for key, value in rows:
        kind, _, name = key.partition("/")
        row = msgspec.json.decode(value)
        if kind == "event":
            history.events.append({field: row.get(field, "") for field in FIELDS})
        elif kind == "process":
            history.starts[name] = row
        elif kind == "exit":
            history.exits[name] = row
    history.events.sort(key=lambda event: event["n"])
    return history
