"""The master's end of the link to a zygote.

It carries frames with descriptors. These ride on the first byte of their frame, which
asyncio's transports cannot send; so the socket is used as it is. Whatever cannot be sent at
once waits in order.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence

from streamd.errors import WireError
from streamd.wire import FrameReader, Message, encode_frame

log = logging.getLogger(__name__)


class ZygoteLink:
    """One end of a socket pair whose other end is a zygote."""

    def __init__(
        self,
        end: socket.socket,
        on_message: Callable[[Message], None],
        on_lost: Callable[["ZygoteLink"], None],
    ) -> None:
        end.setblocking(False)
        self._end = end
        self._on_message = on_message
        self._on_lost = on_lost
        self._reader = FrameReader()
        self._out: deque[tuple[bytes, list[int]]] = deque()  # bytes, descriptors (duplicates)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(end, self._on_readable)
        self._is_open = True

    def send(self, message: Message, *, id: int = 1, descriptors: Sequence[int] = ()) -> None:
        """Send a frame and its descriptors, which may be closed at once. Never blocks."""
        if not self._is_open:
            return
        with contextlib.ExitStack() as made:  # closed where the next one cannot be had
            held = []
            for fd in descriptors:
                held.append(os.dup(fd))
                made.callback(os.close, held[-1])
            made.pop_all()
        self._out.append((encode_frame(id, message), held))
        if len(self._out) == 1:
            self._push()

    def read_pending(self) -> None:
        """Take what has arrived, without waiting."""
        while self._is_open and self._on_readable():
            continue

    def close(self) -> None:
        """Close; the zygote ends when it reads the end of file. `on_lost` is not called."""
        if not self._is_open:
            return
        self._is_open = False
        self._loop.remove_reader(self._end)
        self._loop.remove_writer(self._end)
        self._end.close()
        for _, held in self._out:
            for fd in held:
                os.close(fd)
        self._out.clear()

    def _push(self) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self._out:
                data, held = self._out[0]
                sent = socket.send_fds(self._end, [data], held, socket.MSG_NOSIGNAL)
                for fd in held:
                    os.close(fd)
                if sent < len(data):
                    self._out[0] = (data[sent:], [])
                else:
                    self._out.popleft()
        if self._out:
            self._loop.add_writer(self._end, self._push)
        else:
            self._loop.remove_writer(self._end)

    def _on_readable(self) -> bool:
        """Read one piece; False when there is nothing more."""
        try:
            data = self._end.recv(65536)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data = b""
        if not data:
            self.close()
            self._on_lost(self)
            return False
        try:
            for _, message in self._reader.feed(data):
                self._on_message(message)
        except WireError as error:
            log.error("the zygote's link: %s; the zygote is replaced", error)
            self.close()
            self._on_lost(self)
            return False
        return True
