"""The embedded log's file: its tables, its connections, and what its errors mean.

A connection is opened after the last fork of its process and used by one thread at a time.
Nothing in a process may open and close `log.db` or its companions by any other way: closing a
descriptor of them drops the locks that SQLite holds.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apsw

from streamd.agentproc.broker.turnstile import Turnstile
from streamd.errors import BrokerError, LogDamaged

APPLICATION_ID = 0x73747264  # "strd"
FORMAT = 2
OFFSET_BITS = 44
OLDEST_SQLITE = (3, 51, 3)
BUSY_TIMEOUT_MS = 10_000

# packs.id = partition id << OFFSET_BITS | offset of the first event. A topic's partitions have
# the ids first_tp, first_tp + 1 …
_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE topics (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
    partitions INTEGER NOT NULL, first_tp INTEGER NOT NULL, owned INTEGER NOT NULL,
    retention_s REAL);
CREATE TABLE heads (tp INTEGER PRIMARY KEY, low INTEGER NOT NULL, next INTEGER NOT NULL,
    bytes INTEGER NOT NULL);
CREATE TABLE packs (id INTEGER PRIMARY KEY, n INTEGER NOT NULL, appended_at REAL NOT NULL,
    crc INTEGER NOT NULL, data BLOB NOT NULL);
CREATE TABLE agents (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE groups (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE tables (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
    partitions INTEGER NOT NULL);
CREATE TABLE positions (agent INTEGER, tp INTEGER, position INTEGER NOT NULL,
    PRIMARY KEY (agent, tp)) WITHOUT ROWID;
CREATE TABLE claims (grp INTEGER, partition INTEGER, epoch INTEGER NOT NULL,
    PRIMARY KEY (grp, partition)) WITHOUT ROWID;
CREATE TABLE rows (tid INTEGER, part INTEGER, k BLOB, v BLOB NOT NULL,
    PRIMARY KEY (tid, part, k)) WITHOUT ROWID;
CREATE TABLE reading (agent TEXT, topic TEXT, PRIMARY KEY (agent, topic)) WITHOUT ROWID;
CREATE TABLE bells (grp INTEGER, slot INTEGER, slots INTEGER NOT NULL, topic TEXT,
    address TEXT NOT NULL, PRIMARY KEY (grp, slot, topic)) WITHOUT ROWID;
INSERT INTO meta VALUES ('bells', 0);
"""
TABLE_NAMES = frozenset(
    "meta topics heads packs agents groups tables positions claims rows reading bells".split()
)


def log_path(datadir: Path) -> Path:
    """Where the embedded log of a data directory is."""
    return datadir / "log.db"


def connect(datadir: Path, turnstile: Turnstile, *, cache_kib: int = 2000) -> apsw.Connection:
    """Open the log, made first where there is none.

    Args:
        cache_kib: Of pages of the file, at most.

    Raises:
        BrokerError: It cannot be opened.
        LogDamaged: It is no log of ours, or of a newer format.
    """
    _check_sqlite()
    path = log_path(datadir)
    try:
        db = _open(path, cache_kib)
        if _pragma(db, "user_version") == 0:
            turnstile.enter()
            try:
                _make(db, path)
            finally:
                turnstile.leave()
        _check_format(db, path)
    except apsw.Error as error:
        raise explained(error, path) from error
    return db


def _check_sqlite() -> None:
    version = tuple(int(part) for part in apsw.sqlite_lib_version().split("."))
    if version < OLDEST_SQLITE:
        raise BrokerError(
            f"apsw brings SQLite {apsw.sqlite_lib_version()}, whose write-ahead log can lose "
            f"data; {'.'.join(map(str, OLDEST_SQLITE))} or newer is needed",
            remedy="pip install -U apsw",
        )


def _open(path: Path, cache_kib: int) -> apsw.Connection:
    db = apsw.Connection(str(path))
    db.set_busy_timeout(BUSY_TIMEOUT_MS)
    # The process `log` alone moves the WAL into the file.
    db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    query_once(db, f"PRAGMA cache_size={-cache_kib}")
    # What it took when it was opened is for a cache of the usual size.
    db.release_memory()
    for pragma in (
        "wal_autocheckpoint=0",
        "synchronous=NORMAL",
        "mmap_size=0",
        "secure_delete=OFF",
        "temp_store=MEMORY",
    ):
        query_once(db, f"PRAGMA {pragma}")
    return db


def _make(db: apsw.Connection, path: Path) -> None:
    # Another process may have made it while this one waited for its turn.
    if _pragma(db, "user_version") != 0:
        return
    if _pragma(db, "application_id") or query(db, "SELECT 1 FROM sqlite_schema"):
        raise LogDamaged(
            f"{path} is a database, but not a log of streamd's",
            remedy="choose another data directory with --datadir",
        )
    path.chmod(0o600)
    query(db, "PRAGMA journal_mode=WAL")
    query(
        db,
        f"BEGIN IMMEDIATE; {_TABLES} PRAGMA application_id={APPLICATION_ID};"
        f"PRAGMA user_version={FORMAT}; COMMIT",
    )


def _check_format(db: apsw.Connection, path: Path) -> None:
    if _pragma(db, "application_id") != APPLICATION_ID:
        raise LogDamaged(
            f"{path} is a database, but not a log of streamd's",
            remedy="choose another data directory with --datadir",
        )
    if (found := _pragma(db, "user_version")) != FORMAT:
        raise LogDamaged(
            f"{path} has format {found}, this streamd knows format {FORMAT}",
            remedy="install the streamd that wrote it, or choose another --datadir",
        )


def query(
    db: apsw.Connection, sql: str, values: Sequence[Any] | dict[str, Any] = ()
) -> list[Any]:
    """All rows of a statement: the transaction, if it is one of its own, is over then."""
    return db.execute(sql, values).fetchall()


def query_once(db: apsw.Connection, sql: str) -> list[Any]:
    """The same, of a statement that is not kept for another time: it is 2 KB."""
    return db.execute(sql, can_cache=False).fetchall()


def _pragma(db: apsw.Connection, name: str) -> int:
    value = query_once(db, f"PRAGMA {name}")[0][0]
    assert isinstance(value, int)
    return value


def explained(error: apsw.Error, path: Path) -> BrokerError:
    """What an error of SQLite's means to who runs the log (pure, but for the free space)."""
    text = str(error) or type(error).__name__
    match error:
        case apsw.FullError():
            return BrokerError(
                f"the disk of {path} is full ({_free_bytes(path)} bytes free); nothing was "
                "written",
                remedy="free some space; writing goes on by itself",
            )
        case apsw.CorruptError() | apsw.NotADBError():
            return LogDamaged(
                f"{path} is damaged: {text}",
                remedy="put the file aside and restore a copy, or start with another --datadir",
            )
        case apsw.BusyError() | apsw.LockedError():
            return BrokerError(
                f"{path} was held by another program for {BUSY_TIMEOUT_MS / 1000:g} s: {text}",
                remedy=f"find it with: fuser {path}",
            )
        case apsw.ReadOnlyError() | apsw.PermissionsError() | apsw.CantOpenError():
            return BrokerError(
                f"{path} cannot be opened for writing: {text}",
                remedy="check the owner and the mode of the data directory and its disk",
            )
        case apsw.IOError():
            if getattr(error, "extendedresult", 0) in (
                apsw.SQLITE_IOERR_FSYNC,
                apsw.SQLITE_IOERR_DIR_FSYNC,
            ):
                # What a failed fsync lost cannot be known; a second one may report success.
                return LogDamaged(
                    f"the disk of {path} failed while it was made durable: {text}",
                    remedy="check the disk, then start again",
                )
            return BrokerError(
                f"the disk of {path} failed ({_free_bytes(path)} bytes free): {text}",
                remedy="check the disk and its free space",
            )
    return BrokerError(f"{path}: {text}")


def _free_bytes(path: Path) -> int:
    try:
        disk = os.statvfs(path.parent)
    except OSError:
        return 0
    return disk.f_bavail * disk.f_frsize
