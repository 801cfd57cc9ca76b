"""One store: the rows of one partition of a table in a SQLite file, and what they are.

Rows and mark are written in one transaction, so a file that can be read is right as of some
mark; which rows a mark stands for, and whether it counts, its reader decides. A power cut takes
the last marks back, never a part of one.

One process has a store at a time (flock on a file beside it). Who waits for it shows that by a
lock on the first byte of that file, so that one who can do without it lets go. Everything here
blocks, and is called by one thread at a time.
"""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import apsw
import msgspec

log = logging.getLogger(__name__)

APPLICATION_ID = 0x73747374  # "stst"
FORMAT = 1
INSERT_ROWS = 500  # by one statement: each one lets go of the interpreter, and must get it back
LOCK_S = 2.0  # whoever had the store before is about to end, or sees that it is wanted
_COMPANIONS = ("", "-wal", "-shm", "-journal")

_TABLES = """
CREATE TABLE mark (one INTEGER PRIMARY KEY CHECK (one = 1), data BLOB NOT NULL);
CREATE TABLE rows (k BLOB PRIMARY KEY, v BLOB NOT NULL) WITHOUT ROWID;
"""

Changed = tuple[bytes, bytes | None]  # key and new value, None: deleted


class Mark(msgspec.Struct, frozen=True):
    """What the rows of a store are: all that count of a changelog, at some checkpoint."""

    topic_id: str  # of the changelog
    offset: int  # in the changelog: all that counts before it is in the store, nothing else
    incarnation: tuple[int, int]  # whose checkpoint it was
    number: int  # of the checkpoint
    resets: int
    moment: float  # unix seconds


class StoreHeld(Exception):
    """Another process has the store; the text says so."""


class StoreFile:
    """See the module.

    Args:
        name: Of the file, in `folder`; says which partition it holds.
        patience_s: How long to wait for another process that has it.

    Raises:
        StoreHeld: Another process has it all that time.
        OSError, apsw.Error: It cannot be made.
    """

    def __init__(self, folder: Path, name: str, patience_s: float = LOCK_S) -> None:
        self.path = folder / f"{name}.db"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(folder / f"{name}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        self._db: apsw.Connection | None = None
        try:
            self._take_lock(patience_s)
            self.mark = self._open()
        except BaseException:
            self.close()
            raise

    def _take_lock(self, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise StoreHeld(f"another process has {self.path.name}") from None
                # Another one may be waiting, too, or looking at this moment.
                with contextlib.suppress(OSError):
                    fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
                time.sleep(0.01)
        fcntl.lockf(self._lock, fcntl.LOCK_UN, 1)

    def is_wanted(self) -> bool:
        """Does another process wait for it?"""
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
        except OSError:
            return True
        fcntl.lockf(self._lock, fcntl.LOCK_UN, 1)
        return False

    def _open(self) -> Mark | None:
        try:
            return self._connect()
        except apsw.BusyError:
            raise StoreHeld(f"something reads {self.path.name}") from None
        except (apsw.Error, msgspec.DecodeError) as error:
            self.wipe(f"it cannot be read: {error}")
            return None

    def _connect(self) -> Mark | None:
        """Open the file, made anew where it is not there; its mark.

        Raises:
            apsw.Error, msgspec.DecodeError: It is damaged, or no store.
        """
        is_new = not self.path.exists()
        db = self._db = apsw.Connection(str(self.path))
        db.pragma("locking_mode", "exclusive")  # no memory file to share
        db.pragma("journal_mode", "wal")
        db.pragma("synchronous", "normal")
        if is_new:
            with db:
                db.execute(_TABLES)
                db.pragma("application_id", APPLICATION_ID)
                db.pragma("user_version", FORMAT)
            return None
        kind = (db.pragma("application_id"), db.pragma("user_version"))
        if kind != (APPLICATION_ID, FORMAT):
            raise apsw.Error(f"it is no store of this version ({kind})")
        data = db.execute("SELECT data FROM mark").get
        return None if data is None else msgspec.msgpack.decode(data, type=Mark)

    def rows(self) -> list[tuple[bytes, bytes]]:
        """All of them.

        Raises:
            apsw.Error: The file is damaged.
        """
        assert self._db is not None
        return cast(
            "list[tuple[bytes, bytes]]", self._db.execute("SELECT k, v FROM rows").fetchall()
        )

    def save(self, changed: Sequence[Changed], mark: Mark) -> None:
        """Write what has changed and what the rows are now; all of it or nothing.

        Raises:
            apsw.Error: Nothing was written, e.g. the disk is full.
        """
        assert self._db is not None
        with self._db:
            self._write(changed)
            self._mark(mark)

    def begin_anew(self) -> None:
        """The rows are nothing until the next `save`: they may be written in pieces."""
        assert self._db is not None
        self.mark = None
        with self._db:
            self._db.execute("DELETE FROM mark")
            self._db.execute("DELETE FROM rows")

    def add(self, rows: Sequence[Changed]) -> None:
        """A piece of what was begun anew. Raises as `save`."""
        assert self._db is not None
        with self._db:
            self._write(rows)

    def _write(self, changed: Sequence[Changed]) -> None:
        assert self._db is not None
        # In the order of the file: four times as fast.
        written = sorted(row for row in changed if row[1] is not None)
        for piece in _pieces(written):
            values = ",".join(["(?,?)"] * len(piece))
            self._db.execute(
                f"INSERT OR REPLACE INTO rows VALUES {values}",
                [field for row in piece for field in row],
            )
        for piece in _pieces([row for row in changed if row[1] is None]):
            marks = ",".join("?" * len(piece))
            self._db.execute(f"DELETE FROM rows WHERE k IN ({marks})", [k for k, _ in piece])

    def _mark(self, mark: Mark) -> None:
        assert self._db is not None
        self._db.execute(
            "INSERT OR REPLACE INTO mark VALUES (1, ?)", (msgspec.msgpack.encode(mark),)
        )
        self.mark = mark

    def wipe(self, why: str) -> None:
        """Begin with an empty file."""
        log.warning("store %s is made anew: %s", self.path.name, why)
        self._disconnect()
        for companion in _COMPANIONS:
            self.path.with_name(self.path.name + companion).unlink(missing_ok=True)
        self.mark = self._connect()

    def close(self) -> None:
        """Let go of it: another process may have it."""
        self._disconnect()
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def _disconnect(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            # Of a damaged file: it is emptied, or was written as far as it could be.
            with contextlib.suppress(apsw.Error):
                db.close()


def _pieces(rows: list[Changed]) -> Iterator[list[Changed]]:
    return (rows[at : at + INSERT_ROWS] for at in range(0, len(rows), INSERT_ROWS))
