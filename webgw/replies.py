"""HTTP replies of streamd's own: JSON, errors, and the headers that every page of ours has."""

import asyncio
import contextlib
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

# How much of a refused body is still taken from a client, and for how long.
DRAIN_BYTES = 32 * 1024 * 1024
DRAIN_S = 2.0

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

SECURITY_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


def reply(
    body: bytes,
    content_type: str,
    status: int = 200,
    headers: dict[str, str] | None = None,
) -> Response:
    """A reply of ours. It is not stored by caches unless `headers` say otherwise."""
    all_headers = {"content-type": content_type, "cache-control": "no-store"}
    return Response(body, status, all_headers | SECURITY_HEADERS | (headers or {}))


def json_reply(
    value: Any, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """`value` as JSON."""
    return reply(msgspec.json.encode(value) + b"\n", "application/json", status, headers)


class HttpError(Exception):
    """A request that ends with an error status.

    Args:
        code: A word for programs, e.g. "key_not_found".
        message: A sentence for people.
        retry_after_s: When to ask again, if that may help.
        close: The connection is of no use any more.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        hint: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.hint = hint
        self.retry_after_s = retry_after_s
        self.headers = headers or {}
        self.close = close

    def reply(self) -> Response:
        """`{"error": {"code", "message", "hint", "retry_after_s"}}`."""
        error: dict[str, Any] = {"code": self.code, "message": str(self)}
        headers = dict(self.headers)
        if self.hint:
            error["hint"] = self.hint
        if self.retry_after_s is not None:
            error["retry_after_s"] = self.retry_after_s
            # The header holds whole seconds.
            headers["retry-after"] = str(max(1, round(self.retry_after_s + 0.499)))
        if self.close:
            headers["connection"] = "close"
        return json_reply({"error": error}, self.status, headers)


def not_now(
    code: str, message: str, retry_after_s: float = 1.0, hint: str | None = None
) -> HttpError:
    """503: nobody can answer this at the moment."""
    return HttpError(503, code, message, hint=hint, retry_after_s=retry_after_s)


async def refuse(error: HttpError, scope: Scope, receive: Receive, send: Send) -> None:
    """Send the error's reply.

    A client that is still sending reads a reply only when it is not cut off: the reply to a
    body that is too long is held open while the client finishes, within limits.
    """
    answer = error.reply()
    if error.status != 413 or scope["method"] == "HEAD":
        await answer(scope, receive, send)
        return
    await send(
        {
            "type": "http.response.start",
            "status": answer.status_code,
            "headers": answer.raw_headers,
        }
    )
    await send({"type": "http.response.body", "body": answer.body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            left_bytes = DRAIN_BYTES
            while left_bytes > 0:
                message = await receive()
                left_bytes -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    break
    await send({"type": "http.response.body", "body": b""})
