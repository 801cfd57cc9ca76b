"""An instance on this host: its name, its runtime folder, and who runs it.

The runtime folder (0700) holds `tree.lock`, whose flock every process of the tree inherits,
so that it is free only when none is left; `control.sock`; `instance.json`; and a socket for
each process. Nothing here imports the app.
"""

import fcntl
import functools
import os
import stat
from pathlib import Path

import msgspec

from streamd.errors import ConfigError, NotPermitted

TREE_VARIABLE = "STREAMD_TREE"


class Identity(msgspec.Struct, frozen=True):
    """One process, for ever: pids are reused, this triple is not."""

    pid: int
    start_ticks: int
    boot_id: str

    def is_alive(self) -> bool:
        """True while this very process exists and is no zombie."""
        try:
            return identify(self.pid) == self and process_state(self.pid) not in "ZX"
        except ProcessLookupError:
            return False


class InstanceRecord(msgspec.Struct, frozen=True):
    """The content of `instance.json`, written by the master once it knows them."""

    name: str
    app: str  # what -A said
    app_id: str
    mode: str  # "start" | "worker"
    tree: str  # the value of STREAMD_TREE of every process of this tree
    guardian: Identity
    master: Identity
    datadir: str
    web: str  # "http://127.0.0.1:6066", "" without web
    started_at: float
    version: str
    unit: str = ""  # systemd's unit, when it runs this instance
    cgroup: str = ""  # the folder of the control group of the tree, where it has one
    stopping: bool = False  # it was told to stop; once the lock is free it has
    workdir: str = ""  # where it was started: `app` is found from there
    config_file: str = ""  # the settings file that it reads, where it has one


class StartSpec(msgspec.Struct, frozen=True):
    """What the command line decided before anything of the user's is imported.

    It travels to guardian and master as JSON in a memory file, whose descriptor number is the
    guardian's first argument.
    """

    app: str
    name: str
    mode: str  # "start": a process for each group; "worker": all groups in one
    foreground: bool
    options: dict[str, str]  # settings given as options: setting name -> text
    config_file: str | None
    workdir: str
    folder: str  # the instance's runtime folder
    tree: str
    logfile: str | None
    loglevel: str
    log_format: str  # "auto" | "text" | "json"
    color: bool
    user: str | None = None
    group: str | None = None
    umask: int | None = None
    nofile: int | None = None
    ready_fd: int = -1  # where progress goes as JSON lines, or -1
    nproc: int | None = None
    core_bytes: int | None = None
    nice: int | None = None
    env: list[str] = []  # "NAME=value", for every process
    log_max_size_bytes: int = 0  # 0: no limit
    log_max_age_s: float = 0.0  # 0: no limit
    log_keep: int = 0


@functools.cache
def boot_id() -> str:
    """The kernel's id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def identify(pid: int) -> Identity:
    """Who `pid` is now.

    Raises:
        ProcessLookupError: There is no such process.
    """
    return Identity(pid, int(_stat_fields(pid)[19]), boot_id())


def process_state(pid: int) -> str:
    """The state letter of `pid`: R, S, D, T, Z …

    Raises:
        ProcessLookupError: There is no such process.
    """
    return _stat_fields(pid)[0]


def _stat_fields(pid: int) -> list[str]:
    # Fields from the third on: the second is the command in parentheses, which may hold
    # anything, so the last parenthesis ends it.
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError as error:
        raise ProcessLookupError(pid) from error
    return text.rpartition(")")[2].split()


def instance_name(app: str, name: str | None) -> str:
    """`--name`, else the last part of -A: "proj" of "site.proj:app" and of "proj.py".

    Raises:
        ConfigError: The name cannot be a folder's.
    """
    if name is None:
        module = app.partition(":")[0]
        name = Path(module).stem if module.endswith(".py") else module.rpartition(".")[2]
    if not name or name in {".", ".."} or "/" in name or "\0" in name or len(name) > 40:
        raise ConfigError(
            f"the instance name {name!r} cannot name a folder: 1 to 40 characters without /",
            remedy="give one with --name",
        )
    return name


def runtime_root() -> Path:
    """The folder that holds the runtime folders of this user's instances.

    STREAMD_RUNTIME_DIR, else systemd's RUNTIME_DIRECTORY, else /run/streamd for root, else
    $XDG_RUNTIME_DIR/streamd, else streamd-UID under the temporary folder.
    """
    if given := os.environ.get("STREAMD_RUNTIME_DIR"):
        return Path(given)
    if given := os.environ.get("RUNTIME_DIRECTORY"):
        return Path(given.partition(":")[0])
    if os.geteuid() == 0 and os.access("/run", os.W_OK):
        return Path("/run/streamd")
    if given := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(given) / "streamd"
    import tempfile  # noqa: PLC0415 - a megabyte that the master does not need

    return Path(tempfile.gettempdir()) / f"streamd-{os.geteuid()}"


class Folder:
    """The runtime folder of one instance."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock_path = path / "tree.lock"
        self.control_path = path / "control.sock"
        self.record_path = path / "instance.json"
        self.log_path = path / "log.sock"
        self.gateway_path = path / "web.sock"

    @classmethod
    def of(cls, name: str) -> "Folder":
        return cls(runtime_root() / name)

    def process_path(self, process: str) -> Path:
        """Where the process of this name listens."""
        return self.path / f"{process}.sock"

    def make(self) -> None:
        """Make the folder, 0700, or check that the one there is ours.

        Raises:
            NotPermitted: It belongs to someone else, is a link, or cannot be made.
        """
        try:
            self._make_root()
            self.path.mkdir(mode=0o700, exist_ok=True)
            there = self.path.lstat()
        except OSError as error:
            raise NotPermitted(
                f"the runtime folder {self.path} cannot be made: {error.strerror}",
                remedy="set STREAMD_RUNTIME_DIR to a folder of yours",
            ) from error
        # Root makes it for the user of the setting `user`, whose it is from then on.
        is_ours = there.st_uid == os.geteuid() or os.geteuid() == 0
        if not stat.S_ISDIR(there.st_mode) or not is_ours:
            raise NotPermitted(
                f"the runtime folder {self.path} is not a folder of uid {os.geteuid()}",
                remedy="remove it, or set STREAMD_RUNTIME_DIR to a folder of yours",
            )
        self.path.chmod(0o700)

    def _make_root(self) -> None:
        if os.geteuid() == 0 and not self.path.parent.exists():
            # Others may pass, not look: a folder in it may be another user's.
            self.path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
            self.path.parent.chmod(0o711)
        else:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)

    def try_lock(self) -> int | None:
        """Take `tree.lock` without waiting; its descriptor, inheritable, or None if held.

        The file is never unlinked: a second file of the name would be a second lock.
        """
        fd = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        os.set_inheritable(fd, True)
        return fd

    def read_record(self) -> InstanceRecord | None:
        """What the last master wrote, or None if there is nothing that can be read."""
        try:
            return msgspec.json.decode(self.record_path.read_bytes(), type=InstanceRecord)
        except (OSError, msgspec.DecodeError):
            return None

    def write_record(self, record: InstanceRecord) -> None:
        """Replace `instance.json` in one step."""
        staging = self.record_path.with_suffix(".new")
        staging.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
        staging.chmod(0o600)
        staging.rename(self.record_path)


def new_tree() -> str:
    """A value for STREAMD_TREE that no other tree has."""
    return os.urandom(16).hex()


def folders() -> list[Folder]:
    """The runtime folders of all instances of this user, running or not, by name."""
    root = runtime_root()
    if not root.is_dir():
        return []
    return [Folder(path) for path in sorted(root.iterdir()) if (path / "tree.lock").exists()]
