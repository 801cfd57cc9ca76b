"""The HTTP server: Hypercorn on an inherited socket, set up so that it always ends.

Everything that is particular to Hypercorn is here; another ASGI server would fit as well.
"""

import asyncio
import logging
import time
from typing import Any

import h11
import hypercorn.protocol
from hypercorn.asyncio import serve
from hypercorn.config import Config
from hypercorn.logging import Logger
from hypercorn.protocol.h11 import H11Protocol
from starlette.types import ASGIApp

from streamd.webgw.live import Hub

log = logging.getLogger(__name__)

# Requests that run get this long at the end; `OUTER_S` more, and the server is cut.
GRACE_S = 1.0
OUTER_S = 1.0

DISCONNECTS = (ConnectionError, h11.LocalProtocolError, asyncio.CancelledError, TimeoutError)


class _Http1Only(H11Protocol):
    """HTTP/1.1 and nothing else.

    Hypercorn leaves HTTP/1.1 for HTTP/2 on an `Upgrade: h2c` or a bare HTTP/2 preface, past
    any limit that a proxy in front set. Here such requests go on as HTTP/1.1, and the guard
    refuses them.
    """

    async def _check_protocol(self, event: h11.Request) -> None:
        return


# Hypercorn has no setting for it; its version is pinned.
hypercorn.protocol.H11Protocol = _Http1Only  # type: ignore[attr-defined]


class QuietLogger(Logger):
    """Hypercorn's log lines by our loggers: once, and none for a client that went away."""

    async def access(self, request: Any, response: Any, request_time: float) -> None:
        # The one of Hypercorn copies the whole environment for each request.
        if self.access_logger is None:
            return
        status = "-" if response is None else response["status"]
        client = request.get("client") or ("-",)
        self.access_logger.info(
            '%s "%s %s" %s %.1f ms',
            client[0],
            request.get("method", "-"),
            request["raw_path"].decode("ascii", "backslashreplace"),
            status,
            request_time * 1000,
        )

    async def info(self, message: str, *args: Any, **kwargs: Any) -> None:
        # "Running on …" is the master's to say.
        log.debug(message, *args)

    async def exception(self, message: str, *args: Any, **kwargs: Any) -> None:
        log.error(message, *args, exc_info=True)


async def serve_http(
    app: ASGIApp, listen_fd: int, stop: asyncio.Event, hub: Hub, *, access_log: bool = False
) -> None:
    """Serve until `stop` is set, then end streams and requests within bounded time.

    The listening socket is taken over.

    Raises:
        OSError: The socket cannot be used.
    """
    config = Config()
    config.bind = [f"fd://{listen_fd}"]
    config.errorlog = log
    config.accesslog = logging.getLogger("streamd.webgw.access") if access_log else None
    config.logger_class = QuietLogger
    config.backlog = 1024
    config.graceful_timeout = GRACE_S
    config.shutdown_timeout = GRACE_S
    config.keep_alive_timeout = 30.0
    config.keep_alive_max_requests = 10**9
    config.h11_max_incomplete_size = 32 * 1024
    config.include_server_header = False
    _keep_quiet(stop)
    server = asyncio.create_task(
        serve(app, config, shutdown_trigger=stop.wait),  # type: ignore[arg-type]
        name="http server",
    )
    stopped = asyncio.create_task(stop.wait(), name="wait for the end")
    await asyncio.wait({server, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if server.done():
        return server.result()
    began = time.monotonic()
    await hub.close()
    done, _ = await asyncio.wait({server}, timeout=GRACE_S + OUTER_S)
    if not done:
        # A client that does not read holds its connection open for ever.
        server.cancel()
        await asyncio.wait({server}, timeout=OUTER_S)
    if server.done() and not server.cancelled():
        # Hypercorn raises InvalidStateError when it was cut.
        server.exception()
    log.debug("the server ended after %.2f s", time.monotonic() - began)


def _keep_quiet(stop: asyncio.Event) -> None:
    """Let a connection that broke, or was cut at the end, leave no traceback."""

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if stop.is_set() or (error is not None and _is_disconnect(error)):
            log.debug("a connection ended: %s", error or context.get("message"))
        else:
            loop.default_exception_handler(context)

    asyncio.get_running_loop().set_exception_handler(handle)


def _is_disconnect(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_disconnect(inner) for inner in error.exceptions)
    return isinstance(error, DISCONNECTS)
