"""Whether a data directory can be trusted: its disk, its log, what was acknowledged.

`integrity_check` is no oracle: it calls a log that lost its newest half well. So the log is
held against itself (heads, packs, checksums) and against what is kept beside it.
"""

import os
from pathlib import Path

import apsw

from streamd.agentproc.broker.catalog import Catalog
from streamd.agentproc.broker.pack import is_sound
from streamd.agentproc.broker.reader import OFFSET_MASK, damaged
from streamd.agentproc.broker.schema import (
    OFFSET_BITS,
    TABLE_NAMES,
    explained,
    log_path,
    query,
)
from streamd.agentproc.broker.watermark import Watermark
from streamd.errors import ConfigError, LogDamaged

# SQLite needs locks and shared memory that all processes see; these give neither for certain.
NETWORK_FILE_SYSTEMS = frozenset(
    "nfs nfs4 cifs smb3 smbfs 9p afs ceph glusterfs lustre ncpfs ocfs2 gfs2 beegfs virtiofs "
    "fuse.sshfs fuse.s3fs fuse.gcsfuse fuse.rclone fuse.glusterfs fuse.juicefs".split()
)

# Above this a whole check would keep a start waiting for longer than a second.
MAX_CHECKED_BYTES = 64 * 1024 * 1024


def refuse_network_folder(datadir: Path, mounts: str | None = None) -> None:
    """See that the data directory is on a disk of this machine.

    Args:
        mounts: What /proc/self/mounts holds; None reads it.

    Raises:
        ConfigError: It is on a network file system.
    """
    kind = _file_system(datadir, mounts)
    if kind in NETWORK_FILE_SYSTEMS:
        raise ConfigError(
            f"the data directory {datadir} is on a network file system ({kind}), where the log "
            "would be damaged; a disk of this machine is needed",
            remedy="choose a local folder with --datadir",
        )


def _file_system(path: Path, mounts: str | None) -> str:
    if mounts is None:
        mounts = Path("/proc/self/mounts").read_text(errors="replace")
    folder = os.path.realpath(path)
    longest, kind = "", ""
    for line in mounts.splitlines():
        words = line.split(" ")
        if len(words) < 3:
            continue
        place = words[1].encode().decode("unicode_escape")
        inside = folder == place or folder.startswith(place.rstrip("/") + "/")
        # The last mount on a place hides the ones before it.
        if inside and len(place) >= len(longest):
            longest, kind = place, words[2]
    return kind


def check_log(db: apsw.Connection, datadir: Path) -> None:
    """Hold an open log against itself and against what was acknowledged.

    Raises:
        LogDamaged: It contradicts itself, or ends before what was acknowledged.
    """
    path = log_path(datadir)
    try:
        _check_structure(db, path)
        catalog = Catalog()
        catalog.load(db)
        _check_newest_packs(db, path, catalog)
        _check_acknowledged(db, path, catalog, Watermark(datadir))
    except apsw.Error as error:
        raise explained(error, path) from error


def _check_structure(db: apsw.Connection, path: Path) -> None:
    found = {name for (name,) in query(db, "SELECT name FROM sqlite_schema WHERE type='table'")}
    complaints = [f"table {name} is missing" for name in sorted(TABLE_NAMES - found)]
    if not complaints and path.stat().st_size <= MAX_CHECKED_BYTES:
        complaints = [text for (text,) in query(db, "PRAGMA quick_check(5)") if text != "ok"]
    if complaints:
        raise LogDamaged(
            f"{path} is damaged: SQLite cannot read all of it",
            seen=complaints,
            remedy="put the file aside and restore a copy, or start with another --datadir",
        )


def _check_newest_packs(db: apsw.Connection, path: Path, catalog: Catalog) -> None:
    newest = query(
        db,
        "SELECT tp, low, next, id, n, crc, data FROM heads LEFT JOIN packs ON id ="
        f" (SELECT max(id) FROM packs WHERE id BETWEEN tp << {OFFSET_BITS}"
        f" AND (tp + 1 << {OFFSET_BITS}) - 1)",
    )
    for tp_id, low, end, id, count, crc, data in newest:
        tp = catalog.tp_of(tp_id)
        last = low if id is None else (id & OFFSET_MASK) + count
        if last != end or low > end:
            raise LogDamaged(
                f"{tp} in {path} says that it ends at {end}, its newest pack ends at {last}",
                remedy="restore a copy of the data directory, or start with another --datadir",
            )
        if id is not None and not is_sound(id, count, crc, data):
            raise damaged(path, tp, id & OFFSET_MASK, count)


def _check_acknowledged(
    db: apsw.Connection, path: Path, catalog: Catalog, watermark: Watermark
) -> None:
    ends: dict[int, int] = dict(query(db, "SELECT tp, next FROM heads"))
    lost = [
        f"{catalog.tp_of(tp_id)} ends at {ends.get(tp_id, 0)}, acknowledged was {end}"
        for tp_id, end in watermark.read().items()
        if end > ends.get(tp_id, 0)
    ]
    if lost:
        raise LogDamaged(
            f"{path} has lost events that were acknowledged: it, or its write-ahead log, was "
            "cut, replaced or deleted",
            seen=lost,
            remedy=f"restore a copy of the data directory; to go on without them delete "
            f"{watermark.path}",
        )
