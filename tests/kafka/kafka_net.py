"""A network of hosts on this machine: a switch, and hosts that can be cut off from it.

Each is a network namespace; nothing of it is seen outside. A thread enters one with `inside`:
sockets and processes that it makes there belong to it, and so do threads begun there.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which

CLONE_NEWNET = 0x40000000
SWITCH = "switch"
FOLDER = Path("/run/netns")

_libc = ctypes.CDLL(None, use_errno=True)


def can_have_networks() -> bool:
    """May this process make namespaces, and is iproute2 there?"""
    return os.geteuid() == 0 and which("ip") is not None and run("unshare -n true") == 0


def run(line: str) -> int:
    """Run a command; its exit code."""
    return subprocess.run(line.split(), stderr=subprocess.DEVNULL).returncode


def must(line: str) -> None:
    """Run a command that has to succeed."""
    subprocess.run(line.split(), check=True)


class Network:
    """A switch, which has the address `address_of(SWITCH)`, and hosts by name."""

    def __init__(self, *hosts: str) -> None:
        self._prefix = f"streamd-{os.getpid()}-"
        self._names = [SWITCH, *hosts]

    def __enter__(self) -> "Network":
        switch = self._prefix + SWITCH
        for name in self._names:
            must(f"ip netns add {self._prefix}{name}")
            must(f"ip -n {self._prefix}{name} link set lo up")
        must(f"ip -n {switch} link add {SWITCH} type bridge")
        must(f"ip -n {switch} link set {SWITCH} up")
        must(f"ip -n {switch} addr add {self.address_of(SWITCH)}/24 dev {SWITCH}")
        for name in self._names[1:]:
            other = self._prefix + name
            must(f"ip -n {switch} link add to-{name} type veth peer name eth0 netns {other}")
            must(f"ip -n {switch} link set to-{name} master {SWITCH} up")
            must(f"ip -n {other} addr add {self.address_of(name)}/24 dev eth0")
            must(f"ip -n {other} link set eth0 up")
        return self

    def __exit__(self, *error: object) -> None:
        for name in self._names:
            run(f"ip netns del {self._prefix}{name}")

    def address_of(self, name: str) -> str:
        """Where a host, or the switch, is reached."""
        return f"10.91.0.{self._names.index(name) + 1}"

    def cut(self, name: str) -> None:
        """Pull the cable of a host: what is sent to it or by it is lost."""
        must(f"ip -n {self._prefix}{SWITCH} link set to-{name} down")

    def mend(self, name: str) -> None:
        """Plug it in again."""
        must(f"ip -n {self._prefix}{SWITCH} link set to-{name} up")

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Let the calling thread be on a host, or on the switch."""
        with open("/proc/thread-self/ns/net") as home:
            with (FOLDER / (self._prefix + name)).open() as there:
                enter(there.fileno())
            try:
                yield
            finally:
                enter(home.fileno())


def enter(namespace: int) -> None:
    """Move the calling thread into a network namespace."""
    if _libc.setns(namespace, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
