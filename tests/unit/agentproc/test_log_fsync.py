"""A disk that fails to make the log durable, made by a layer below SQLite."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from streamd.agentproc.broker import TP, Output
from streamd.agentproc.broker.schema import log_path
from streamd.agentproc.broker.wal import Checkpointer
from streamd.agentproc.broker.writer import Writer
from streamd.errors import BrokerError, LogDamaged

RECORD = [Output(TP("t", 0), [None], [b"v"], [1.0])]


class Failing(apsw.VFS):
    """The usual files, of which some fail to be synchronised."""

    def __init__(self) -> None:
        self.error: int | None = None
        super().__init__("failing", "unix", makedefault=True)

    def xOpen(self, name: Any, flags: list[int]) -> "FailingFile":  # noqa: N802
        return FailingFile(self, name, flags)


class FailingFile(apsw.VFSFile):
    def __init__(self, vfs: Failing, name: Any, flags: list[int]) -> None:
        self._vfs = vfs
        super().__init__("unix", name, flags)

    def xSync(self, flags: int) -> None:  # noqa: N802
        if self._vfs.error is not None:
            raise apsw.exception_for(self._vfs.error)
        super().xSync(flags)


@pytest.fixture
def disk() -> Iterator[Failing]:
    vfs = Failing()
    yield vfs
    vfs.unregister()


def test_a_failed_fsync_of_an_acknowledged_record_is_told_as_damage(
    disk: Failing, tmp_path: Path
) -> None:
    writer = Writer(tmp_path, default_partitions=1)
    writer.append(RECORD, True)
    disk.error = apsw.SQLITE_IOERR_FSYNC

    with pytest.raises(LogDamaged, match="failed while it was made durable") as caught:
        writer.append(RECORD, True)

    assert str(log_path(tmp_path)) in str(caught.value)
    assert caught.value.exit_code == 78
    disk.error = None
    writer.close()


def test_a_failed_fsync_of_the_wal_is_told_as_damage(disk: Failing, tmp_path: Path) -> None:
    writer = Writer(tmp_path, default_partitions=1)
    checkpointer = Checkpointer(tmp_path)
    writer.append(RECORD, False)
    disk.error = apsw.SQLITE_IOERR_FSYNC

    with pytest.raises(LogDamaged, match="failed while it was made durable"):
        checkpointer.step()

    disk.error = None
    checkpointer.close()
    writer.close()


def test_another_failure_of_the_disk_may_pass(disk: Failing, tmp_path: Path) -> None:
    writer = Writer(tmp_path, default_partitions=1)
    disk.error = apsw.SQLITE_IOERR_LOCK

    with pytest.raises(BrokerError, match="the disk of") as caught:
        writer.append(RECORD, True)

    assert not isinstance(caught.value, LogDamaged)
    disk.error = None
    writer.append(RECORD, True)
    writer.close()
