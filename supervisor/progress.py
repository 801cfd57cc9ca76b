"""How a start goes, told to whoever started it.

JSON lines on the ready descriptor, as `docs/internals.md` describes under Start; without one,
an error is written to standard error in the command line's form. Nobody has to listen.
"""

import contextlib
import os
import time
from typing import Any

import msgspec

from streamd.errors import StreamdError


class Progress:
    """The teller of one start; silent once the start has ended either way."""

    def __init__(self, ready_fd: int) -> None:
        self._began_at = time.monotonic()
        self._fd = ready_fd
        if ready_fd >= 0:
            os.set_inheritable(ready_fd, False)
            os.set_blocking(ready_fd, False)
        self._is_open = ready_fd >= 0

    @property
    def after_s(self) -> float:
        """How long the start has taken by now."""
        return round(time.monotonic() - self._began_at, 3)

    def tell(self, process: str, state: str, detail: str = "") -> None:
        """Say how far a process is."""
        self._write(
            {"process": process, "state": state, "after_s": self.after_s, "detail": detail}
        )

    def tell_ready(self, web: str) -> None:
        """Say that everything runs; the last word."""
        self._write({"ready": True, "pid": os.getpid(), "web": web, "after_s": self.after_s})
        self._close()

    def tell_error(self, error: StreamdError, traceback: str = "") -> None:
        """Say why there is no start; the last word."""
        if self._fd < 0:
            lines = [f"Error: {error}", *(f"  {seen}" for seen in error.seen)]
            lines += [f"Try: {error.remedy}"] if error.remedy else []
            text = "\n".join([*traceback.splitlines(), *lines]) + "\n"
            with contextlib.suppress(OSError):
                os.write(2, text.encode(errors="replace"))
            return
        self._write(
            {
                "error": {
                    "message": str(error),
                    "seen": error.seen,
                    "remedy": error.remedy,
                    "exit_code": error.exit_code,
                    "traceback": traceback,
                }
            }
        )
        self._close()

    def _write(self, told: dict[str, Any]) -> None:
        if not self._is_open:
            return
        try:
            os.write(self._fd, msgspec.json.encode(told) + b"\n")
        except OSError:
            # Who started us has not the time to wait.
            self._close()

    def _close(self) -> None:
        if self._is_open:
            os.close(self._fd)
            self._is_open = False
