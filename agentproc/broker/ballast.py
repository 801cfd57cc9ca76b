"""A file that is there to be given up: on a full disk even deleting needs space."""

import os
from pathlib import Path

BALLAST_BYTES = 16 * 1024 * 1024
_PART_OF_FREE = 8


class Ballast:
    """The file `ballast` of a data directory."""

    def __init__(self, datadir: Path) -> None:
        self.path = datadir / "ballast"

    @property
    def held_bytes(self) -> int:
        """What it takes now."""
        return self.path.stat().st_size if self.path.exists() else 0

    def take(self) -> int:
        """Occupy the space, on a small disk an eighth of what is free; what is held then."""
        if (held := self.held_bytes) > 0:
            return held
        size = min(BALLAST_BYTES, self.free_bytes() // _PART_OF_FREE)
        if size > 0:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size)
            except OSError:
                os.ftruncate(fd, 0)
                size = 0
            finally:
                os.close(fd)
        return size

    def give_up(self) -> int:
        """Free the space; how much it was."""
        held = self.held_bytes
        self.path.unlink(missing_ok=True)
        return held

    def free_bytes(self) -> int:
        """What the disk has left for this user."""
        disk = os.statvfs(self.path.parent)
        return disk.f_bavail * disk.f_frsize
