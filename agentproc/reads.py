"""A thread that answers look-ups while the loop works.

An agent that reads another group's table waits for the answer and its loop with it. If that
table's process waits in the same way for the first one, both would wait for ever, were the
answers given by the loops. This thread needs no loop: it reads what is committed, and only
that. It listens beside the process's own socket, at `read_address`.
"""

import logging
import os
import selectors
import signal
import socket
import threading
from collections.abc import Callable

from streamd.errors import StreamdError, WireError
from streamd.link import listen
from streamd.wire import FrameReader, Message, Refusal, encode_frame

log = logging.getLogger(__name__)

# A client that does not take its answer in this time loses its connection: the others wait.
_WRITE_TIMEOUT_S = 0.2


def read_address(address: str) -> str:
    """Where the process that listens at `address` answers look-ups."""
    return f"{address}.r"


class ReadServer:
    """Answers requests, one after another, in a thread of its own.

    `answer` is called in that thread; a StreamdError that it raises becomes a `Refusal`.
    """

    def __init__(self, address: str, answer: Callable[[Message], Message]) -> None:
        """Listen at `read_address(address)`; requests wait until `start`.

        Raises:
            NotPermitted: The path is longer than a Unix socket's may be.
        """
        self._answer = answer
        self._listener = listen(read_address(address))
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._readers: dict[socket.socket, FrameReader] = {}
        self._thread = threading.Thread(target=self._run, name="streamd reads", daemon=True)

    def start(self) -> None:
        """Serve from now on."""
        # A signal that this thread took would not interrupt what the main thread waits for.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._thread.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        """Stop serving; requests that were not answered lose their connection."""
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        for connection in (self._listener, *self._readers):
            connection.close()
        os.close(self._wake)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj == self._wake:
                        return
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    elif isinstance(key.fileobj, socket.socket):
                        self._serve(selector, key.fileobj)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            log.warning("a look-up's connection was not accepted: %s", error.strerror)
            return
        connection.settimeout(_WRITE_TIMEOUT_S)
        self._readers[connection] = FrameReader()
        selector.register(connection, selectors.EVENT_READ)

    def _serve(self, selector: selectors.BaseSelector, connection: socket.socket) -> None:
        try:
            data = connection.recv(65536)
            for id, message in self._readers[connection].feed(data):
                connection.sendall(encode_frame(-id, self._answered(message)))
        except (OSError, WireError) as error:
            log.debug("a look-up's connection is closed: %s", error)
            data = b""
        if not data:
            selector.unregister(connection)
            del self._readers[connection]
            connection.close()

    def _answered(self, message: Message) -> Message:
        try:
            return self._answer(message)
        except StreamdError as error:
            return Refusal(str(error), error.seen, error.remedy, error.exit_code)
        except Exception as error:
            log.exception("a %s failed", type(message).__name__)
            return Refusal(f"{type(error).__name__}: {error}", exit_code=70)
