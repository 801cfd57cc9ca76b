"""The settings of the gateway, as they came with `Site.settings`. No I/O."""

import ipaddress
import socket
from collections.abc import Mapping
from typing import Any

import msgspec

from streamd.wire import MAX_FRAME_BYTES

# What a PageRequest holds beside its body: headers, path and query are limited by the guard.
FRAME_ROOM_BYTES = 256 * 1024

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1", "ip6-localhost"})


class WebOptions(msgspec.Struct, frozen=True):
    """How the gateway behaves."""

    max_body_bytes: int = 1024 * 1024
    timeout_s: float = 30.0
    token: str = ""
    bind: str = "127.0.0.1"
    hosts: frozenset[str] = frozenset()  # further names that a Host header may have
    access_log: bool = False

    @property
    def exposed(self) -> bool:
        """True when others than this machine's users can reach the port."""
        return not is_loopback(self.bind)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "WebOptions":
        """Take what is there; what is missing or None has its default."""
        given = {name: value for name, value in settings.items() if value is not None}
        usual = cls()
        most = MAX_FRAME_BYTES - FRAME_ROOM_BYTES
        hosts = [*given.get("web_hosts", ()), given.get("web_host", "")]
        return cls(
            max_body_bytes=min(int(given.get("web_max_body", usual.max_body_bytes)), most),
            timeout_s=float(given.get("web_timeout", usual.timeout_s)),
            token=str(given.get("web_token", "")),
            bind=str(given.get("web_bind", usual.bind)),
            hosts=frozenset(str(host).lower() for host in hosts if host),
            access_log=bool(given.get("web_access_log", False)),
        )


def is_loopback(name: str) -> bool:
    """True for names and addresses of this machine that no other machine reaches.

    >>> is_loopback("127.0.0.1"), is_loopback("[::1]"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    bare = name.strip("[]").lower()
    if bare in LOOPBACK_NAMES or bare.startswith(("unix:", "/")):
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


def host_name(header: str) -> str:
    """The name in a Host header, lower case, without its port and brackets.

    >>> host_name("Localhost:6066"), host_name("[::1]:6066"), host_name("::1")
    ('localhost', '::1', '::1')
    """
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    name, colon, port = header.rpartition(":")
    if colon and ":" not in name and port.isdigit():
        return name.lower()
    return header.lower()


def may_be_called(header: str, options: WebOptions) -> bool:
    """True when a request may name us so in its Host header.

    A page of another site that had its own name resolved to this machine (DNS rebinding)
    sends that name. An address is never such a name, so any of them is taken once the port
    is open to other machines.
    """
    name = host_name(header)
    if not name:
        return False
    if is_loopback(name) or "*" in options.hosts:
        return True
    if name in options.hosts or header.lower() in options.hosts or name == options.bind.lower():
        return True
    if not options.exposed:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in {socket.gethostname().lower(), socket.gethostname().lower() + ".local"}
    return True
