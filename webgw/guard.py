"""What stands before every request: who may name us, who may write, and how much of what.

Pure ASGI, so that streams pass through untouched. A refusal is JSON and says why.
"""

import asyncio
import logging
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streamd.webgw.hosts import HOP_PATH
from streamd.webgw.options import FRAME_ROOM_BYTES, WebOptions, may_be_called
from streamd.webgw.replies import HttpError, refuse

log = logging.getLogger(__name__)

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
METHODS = SAFE_METHODS | {"POST", "PUT", "PATCH", "DELETE"}
MAX_HEADERS = 100
MAX_HEADER_BYTES = 16 * 1024
MAX_TARGET_BYTES = 8 * 1024

# A request has its own limit, `web_timeout`; this one is for what that does not cover: a
# client that takes its reply byte by byte.
SENDING_S = 30.0


class Guard:
    """Lets a request through to `app` if nothing speaks against it."""

    def __init__(self, app: ASGIApp, options: Callable[[], WebOptions]) -> None:
        self._app = app
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] != "http":
            # A refused WebSocket handshake is answered with 403.
            await send({"type": "websocket.close", "code": 1008})
            return
        options = self._options()
        try:
            check(scope, options)
        except HttpError as refused:
            await refuse(refused, scope, receive, send)
            return
        await self._pass(scope, receive, send, options.timeout_s + SENDING_S)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, limit_s: float) -> None:
        started = False
        try:
            async with asyncio.timeout(limit_s) as limit:

                async def watched(message: Message) -> None:
                    nonlocal started
                    if message["type"] == "http.response.start":
                        started = True
                        if is_stream(message):
                            limit.reschedule(None)
                    await send(message)

                await self._app(scope, receive, watched)
        except TimeoutError:
            log.warning("a request for %r took longer than %.0f s", scope["path"], limit_s)
            if not started:
                late = HttpError(504, "timed_out", f"no reply within {limit_s:g} s", close=True)
                await late.reply()(scope, receive, send)


def check(scope: Scope, options: WebOptions) -> None:
    """Refuse what may not pass, by its head alone.

    Raises:
        HttpError: Why it may not.
    """
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    if scope.get("http_version") not in {"1.0", "1.1"}:
        raise HttpError(505, "http_version", "this port speaks HTTP/1.1", close=True)
    raw_path: bytes = scope["raw_path"]
    if not raw_path.startswith(b"/"):
        raise HttpError(400, "bad_target", "the request's target is no path", close=True)
    if len(raw_path) + len(scope["query_string"]) > MAX_TARGET_BYTES:
        raise HttpError(
            414, "target_too_long", f"a URL may have {MAX_TARGET_BYTES} bytes", close=True
        )
    size_bytes = sum(len(name) + len(value) for name, value in headers)
    if len(headers) > MAX_HEADERS or size_bytes > MAX_HEADER_BYTES:
        raise HttpError(
            431,
            "headers_too_large",
            f"{len(headers)} headers of {size_bytes} bytes came; "
            f"{MAX_HEADERS} of {MAX_HEADER_BYTES} bytes are taken",
            close=True,
        )
    by_name = {name.lower(): value.decode("latin-1") for name, value in headers}
    if b"content-length" in by_name and b"transfer-encoding" in by_name:
        raise HttpError(
            400,
            "ambiguous_length",
            "Content-Length and Transfer-Encoding came both",
            close=True,
        )
    if "h2c" in by_name.get(b"upgrade", "").lower():
        raise HttpError(400, "no_upgrade", "this port does not upgrade to h2c", close=True)
    length = by_name.get(b"content-length", "0")
    limit_bytes = options.max_body_bytes
    if raw_path == HOP_PATH.encode():
        limit_bytes += FRAME_ROOM_BYTES  # another host's request for a page, body and head
    if length.isdigit() and int(length) > limit_bytes:
        raise too_large(limit_bytes)
    _check_origin(scope["method"], by_name, options)


def _check_origin(method: str, headers: dict[bytes, str], options: WebOptions) -> None:
    host = headers.get(b"host", "")
    if not may_be_called(host, options):
        raise HttpError(
            421,
            "host_not_allowed",
            f"the Host {host!r} is none of this server's names",
            hint="add it to the setting web_hosts if it is",
            close=True,
        )
    if method not in METHODS:
        raise HttpError(
            405,
            "method_not_allowed",
            f"the method {method!r} is not served",
            headers={"allow": ", ".join(sorted(METHODS))},
            close=True,
        )
    if method in SAFE_METHODS:
        return
    # Browsers say where a request comes from; who is no browser sends neither header.
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site is not None:
        foreign = site not in {"same-origin", "none"}
    else:
        foreign = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
    if foreign:
        raise HttpError(
            403,
            "cross_site",
            f"a {method} from another site's page"
            f"{f' (Origin {origin!r})' if origin is not None else ''} is refused",
            close=True,
        )


def too_large(limit_bytes: int) -> HttpError:
    """413; the rest of the body is not wanted."""
    return HttpError(
        413,
        "body_too_large",
        f"a body may have {limit_bytes} bytes",
        hint="raise the setting web_max_body",
        close=True,
    )


def is_stream(start: Message) -> bool:
    """True for the start of a reply that goes on for ever."""
    return any(
        name == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in start["headers"]
    )


async def _live(receive: Receive, send: Send) -> None:
    while True:
        phase = (await receive())["type"].removeprefix("lifespan.")
        await send({"type": f"lifespan.{phase}.complete"})
        if phase == "shutdown":
            return
