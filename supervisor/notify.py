"""Telling systemd how it goes.

READY=1 comes once every group that is to run does; until then, and while it stops or reloads,
more time is asked for. WATCHDOG=1 comes from the master's loop alone: it ends when that does.

systemd listens to its main process, the guardian, which passes on what comes through the socket
of STREAMD_NOTIFY_FD. Without that variable nobody listens, and nothing is sent.
"""

import contextlib
import os
import socket
import time

# Not for children: one that says WATCHDOG=1 would hide a master that hangs.
PRIVATE_VARIABLES = frozenset(
    {
        "NOTIFY_SOCKET",
        "STREAMD_NOTIFY_FD",
        "STREAMD_GUARDIAN",
        "STREAMD_CGROUP",
        "WATCHDOG_USEC",
        "WATCHDOG_PID",
        "LISTEN_FDS",
        "LISTEN_PID",
        "LISTEN_FDNAMES",
        "STREAMD_LISTENERS",
    }
)


class Notify:
    """The messages that systemd understands; each costs some microseconds."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._socket: socket.socket | None = None
        self.watchdog_s: float | None = None  # how often to call `alive`, at least
        self.is_ready = False  # it was told that the instance is up
        self._sentence = ""  # the last state that was told
        if number := environment.get("STREAMD_NOTIFY_FD"):
            self._socket = socket.socket(fileno=int(number))
            self._socket.set_inheritable(False)
            self._socket.setblocking(False)
            if limit_us := environment.get("WATCHDOG_USEC"):
                self.watchdog_s = int(limit_us) / 2e6

    def ready(self, sentence: str) -> None:
        """Say that the instance is up."""
        self.is_ready, self._sentence = True, sentence
        self._send(f"READY=1\nSTATUS={sentence}")

    def reloading(self) -> None:
        """Say that a reload begins; what is not up yet reloads unnoticed."""
        if not self.is_ready:
            return
        moment_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send(f"RELOADING=1\nMONOTONIC_USEC={moment_us}")

    def reloaded(self, sentence: str) -> None:
        """Say that the reload is over, however it went."""
        if self.is_ready:
            self.ready(sentence)

    def status(self, sentence: str) -> None:
        """Say in a sentence how it is; nothing where that was the last word."""
        if sentence == self._sentence:
            return
        self._sentence = sentence
        self._send(f"STATUS={sentence}")

    def stopping(self) -> None:
        """Say that the instance stops."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """Say that supervision works."""
        self._send("WATCHDOG=1")

    def extend(self, span_s: float) -> None:
        """Ask for more time to start or stop."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(span_s * 1e6)}")

    def _send(self, text: str) -> None:
        if self._socket is None:
            return
        with contextlib.suppress(OSError):  # the guardian is gone, or does not read
            self._socket.send(text.encode())


def child_environment() -> dict[str, str]:
    """The environment of every process that the master starts."""
    return {name: text for name, text in os.environ.items() if name not in PRIVATE_VARIABLES}
