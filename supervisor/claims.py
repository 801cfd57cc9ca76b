"""What an instance claims on its host: its name, the data directory and the web port.

They are held by the master until its end, so that a second instance is refused before it has
started anything, and a web process can be replaced without closing the port. The port may be
claimed by systemd, which hands it over and keeps it open between two masters. The name is
claimed by the command line, which takes `tree.lock` and leaves it to the tree.
"""

import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path

from streamd.errors import Busy, ConfigError, NotPermitted, StreamdError
from streamd.instance import Folder, InstanceRecord, folders

LISTEN_BACKLOG = 1024


class TreeLock:
    """`tree.lock` as the master has it: an open file, and the name that others look at.

    Args:
        fd: The descriptor that every process of the tree inherits.
    """

    def __init__(self, folder: Folder, fd: int) -> None:
        self._folder = folder
        self._fd = fd

    def keep(self) -> bool:
        """Make the file anew if somebody has deleted it; True if it was made.

        Only the master and what it starts from now on hold the new one. Where another start
        has it just now the next call makes it: that start is refused by `instance.json`.

        Raises:
            OSError: The runtime folder is gone.
        """
        held = os.fstat(self._fd)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(held, self._folder.lock_path.stat()):
                return False
        made = self._folder.try_lock()
        if made is None:
            return False
        os.pwrite(made, os.pread(self._fd, held.st_size, 0), 0)
        os.dup2(made, self._fd)
        os.close(made)
        return True


def claim_datadir(path: Path, name: str) -> int:
    """Make the data directory (0700) and take its lock; the lock's descriptor.

    Raises:
        Busy: Another instance has it.
        NotPermitted: It cannot be made or written.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_uid == os.geteuid():
            path.chmod(0o700)
        lock_path = path / "lock"
        fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NotPermitted(
            f"the data directory {path} cannot be used: {error.strerror}",
            remedy="choose another with --datadir",
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 200, 0).decode(errors="replace").split()
        os.close(fd)
        who = f"{holder[1]} (pid {holder[0]})" if len(holder) == 2 else "another instance"
        raise Busy(
            f"the data directory {path} is in use by {who}: one master owns a log",
            seen=[
                "more processes for a group: streamd scale GROUP=N",
                "shared work on several hosts: broker kafka://…",
            ],
            remedy="stop the other one, or choose another --datadir and --web-port",
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()} {name}\n".encode(), 0)
    return fd


def claim_port(bind: str, port: int) -> socket.socket:
    """Listen on the web address: a host with a port (0: any free one), or unix:/path.

    Raises:
        Busy: The port is taken.
        ConfigError: The address is none of this host's.
        NotPermitted: The port is for root only.
    """
    if bind.startswith("unix:"):
        return _listen_unix(bind.removeprefix("unix:"))
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host_of(bind),
            port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"the web address {bind!r} is none: {error}", remedy="set web_bind to an address"
        ) from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(LISTEN_BACKLOG)
    except OSError as error:
        listener.close()
        raise _port_error(bind, port, error) from error
    return listener


def given_listeners(environment: dict[str, str]) -> dict[str, socket.socket]:
    """What systemd handed over, by name; the guardian has told the descriptors.

    Raises:
        ConfigError: One of them is no socket.
    """
    given = {}
    for pair in filter(None, environment.get("STREAMD_LISTENERS", "").split(":")):
        number, _, name = pair.partition("=")
        os.set_inheritable(int(number), False)
        try:
            given[name or number] = socket.socket(fileno=int(number))
        except OSError as error:
            raise ConfigError(
                f"descriptor {number} of LISTEN_FDS is no socket: {error.strerror}",
                remedy="give the socket unit one ListenStream=",
            ) from error
    return given


def take_web(given: dict[str, socket.socket]) -> socket.socket | None:
    """The one named "web", else the only one, out of `given`; None: there is none.

    Raises:
        ConfigError: It takes no connections.
    """
    name = "web" if "web" in given else next(iter(given), "")
    if name not in given or (name != "web" and len(given) > 1):
        return None
    listener = given.pop(name)
    takes_streams = listener.type == socket.SOCK_STREAM
    if not takes_streams or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ConfigError(
            f"the socket {name!r} of systemd takes no connections",
            remedy="ListenStream=127.0.0.1:6066 and Accept=no in the socket unit",
        )
    return listener


def host_of(bind: str) -> str | bytes:
    """The address as getaddrinfo wants it; for text it loads the tables of international names,
    half a megabyte of the master's memory."""
    address = bind or "0.0.0.0"
    return address.encode() if address.isascii() else address


def _listen_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    staging = f"{path}.new"
    try:
        Path(staging).unlink(missing_ok=True)
        listener.bind(staging)
        listener.listen(LISTEN_BACKLOG)
        os.rename(staging, path)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"the web socket {path} cannot be made: {error.strerror or error}",
            remedy="set web_bind to unix:/path in a folder of yours",
        ) from error
    return listener


def _port_error(bind: str, port: int, error: OSError) -> StreamdError:
    if error.errno == errno.EADDRINUSE:
        other = _instance_at(port)
        return Busy(
            f"port {port} on {bind} is taken" + (f" by {other}" if other else ""),
            remedy="-p 0 picks a free one; --without-web serves no pages",
        )
    if error.errno == errno.EACCES:
        return NotPermitted(
            f"port {port} on {bind} is for root only", remedy="choose one above 1023 with -p"
        )
    return ConfigError(
        f"{bind} port {port} cannot be listened on: {error.strerror}",
        remedy="set web_bind to an address of this host",
    )


def _instance_at(port: int) -> str | None:
    """The living instance that serves on this port."""
    for folder in folders():
        record: InstanceRecord | None = folder.read_record()
        if record and record.web.endswith(f":{port}") and record.master.is_alive():
            return f"{record.name} (pid {record.master.pid})"
    return None


def gateway_of(listener: socket.socket, web_host: str) -> str:
    """`host:port` by which other hosts reach it; "" for a Unix socket.

    Args:
        web_host: The name to use, with or without a port of its own; "": the address that is
            listened on, or this host's name where that is all of them.
    """
    if listener.family == socket.AF_UNIX:
        return ""
    address, port = listener.getsockname()[:2]
    if web_host:
        name, colon, given = web_host.rpartition(":")
        if colon and given.isdigit() and (":" not in name or name.endswith("]")):
            return web_host
        address = web_host.strip("[]")
    elif address in ("0.0.0.0", "::"):
        address = socket.gethostname()
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def url_of(listener: socket.socket) -> str:
    """Where a browser finds it."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname().removesuffix('.new')}"
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
