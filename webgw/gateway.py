"""A user's page: one request in, one hop, one reply out.

    match the path          the user's pages first, then streamd's own
    read the body           whole, within `web_max_body`
    find the owner          key -> partition -> process; or a process of the page's group
    one frame, one reply    over the kept link; Moved, or nobody there: once more, then 503

Never a guess: where nobody can be found who surely owns the key, the answer is 503.
"""

import asyncio
import logging
import re
from urllib.parse import parse_qs

from starlette.types import ASGIApp, Receive, Scope, Send

from streamd.webgw.asking import ask, holder_of, member_of, twice, unexpected
from streamd.webgw.fleet import Fleet
from streamd.webgw.guard import too_large
from streamd.webgw.replies import HttpError, refuse
from streamd.webgw.routes import BadPath, Match, NotAllowed, decode_path
from streamd.wire import PageReply, PageRequest, RouteInfo

log = logging.getLogger(__name__)

OWN_PREFIX = b"/streamd/"

# May be sent again when it is not known whether it was done (RFC 9110, 9.2.2).
IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})

HOP_BY_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection",
    "te", "trailer", "transfer-encoding", "upgrade", "http2-settings", "expect",
    "content-length",
})  # fmt: skip

_HEADER_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")


class Gateway:
    """The ASGI app: the user's pages over frames, everything else by `own_pages`."""

    def __init__(self, fleet: Fleet, own_pages: ASGIApp) -> None:
        self._fleet = fleet
        self._own_pages = own_pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            match = self._match(scope)
            if match is None:
                await self._own_pages(scope, receive, send)
                return
            page_reply = await self._answer(match, scope, receive)
            start = checked_start(page_reply)
        except HttpError as error:
            await refuse(error, scope, receive, send)
            return
        await send(start)
        await send({"type": "http.response.body", "body": page_reply.body})

    def _match(self, scope: Scope) -> Match | None:
        if scope["raw_path"].startswith(OWN_PREFIX):
            return None
        try:
            path = decode_path(scope["raw_path"])
        except BadPath as error:
            raise HttpError(400, "bad_path", str(error)) from error
        found = self._fleet.routes.match(scope["method"], path)
        if isinstance(found, NotAllowed):
            raise HttpError(
                405,
                "method_not_allowed",
                f"this page does not take {scope['method']}",
                headers={"allow": ", ".join(found.methods)},
            )
        return found

    async def _answer(self, match: Match, scope: Scope, receive: Receive) -> PageReply:
        options = self._fleet.options
        phase = HttpError(408, "body_timed_out", "the body did not come in time", close=True)
        try:
            async with asyncio.timeout(options.timeout_s):
                body = await read_body(receive, options.max_body_bytes)
                phase = HttpError(
                    504,
                    "timed_out",
                    f"the page did not answer within {options.timeout_s:g} s",
                )
                request = page_request(match, scope, body)
                return await twice(self._fleet, lambda: self._try(match.route, request))
        except TimeoutError:
            log.warning("%s %r: %s", scope["method"], match.route.path, phase)
            raise phase from None

    async def _try(self, route: RouteInfo, request: PageRequest) -> PageReply:
        partition = -1
        if route.table is not None:
            table = self._fleet.tables[route.table]
            text = key_text(route, request.match_info, request.query)
            owner, partition = await holder_of(self._fleet, table, text)
        else:
            owner = member_of(self._fleet, route.group)
        request = PageRequest(
            request.route, partition, request.method, request.path, request.query,
            request.headers, request.body, request.match_info, request.client,
        )  # fmt: skip
        repeatable = request.method in IDEMPOTENT
        answer = await ask(self._fleet, owner, request, repeatable=repeatable)
        if not isinstance(answer, PageReply):
            raise unexpected(owner, answer)
        return answer


def page_request(match: Match, scope: Scope, body: bytes) -> PageRequest:
    """The frame of a request, its partition still to be found."""
    method = scope["method"]
    takes_head = "HEAD" in {name.upper() for name in match.route.methods}
    if method == "HEAD" and not takes_head:
        method = "GET"
    client = scope.get("client")
    return PageRequest(
        route=match.route.id,
        partition=-1,
        method=method,
        path=scope["path"],
        query=scope["query_string"].decode("latin-1"),
        headers=request_headers(scope["headers"], len(body)),
        body=body,
        match_info=match.match_info,
        client=client[0] if client else "",
    )


def request_headers(
    headers: list[tuple[bytes, bytes]], body_bytes: int
) -> list[tuple[str, str]]:
    """What a view may see: nothing that is between client and gateway, or claims to be ours.

    A name with `_` is dropped too: some programs read it as the one with `-`.
    """
    pairs = [
        (name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in headers
    ]
    named = _named_by_connection(pairs)
    kept = [
        (name, value)
        for name, value in pairs
        if name not in HOP_BY_HOP
        and name not in named
        and "_" not in name
        and name != "forwarded"
        and not name.startswith(("x-forwarded-", "x-streamd-", "x-real-ip"))
    ]
    if body_bytes:
        kept.append(("content-length", str(body_bytes)))
    return kept


def _named_by_connection(pairs: list[tuple[str, str]]) -> set[str]:
    return {
        word.strip().lower()
        for name, value in pairs
        if name.lower() == "connection"
        for word in value.split(",")
    }


def checked_start(reply: PageReply) -> dict[str, object]:
    """The ASGI message that begins `reply`.

    Raises:
        HttpError: The view's status or headers cannot be sent.
    """
    named = _named_by_connection(reply.headers)
    headers: list[tuple[bytes, bytes]] = []
    for name, value in reply.headers:
        lower = name.lower()
        if lower in HOP_BY_HOP or lower in named:
            continue
        pair = (_octets(lower), _octets(value))
        if not _HEADER_NAME.fullmatch(pair[0]) or not _HEADER_VALUE.fullmatch(pair[1]):
            raise HttpError(502, "bad_reply", f"the page's header {name!r} cannot be sent")
        headers.append((pair[0], pair[1].strip()))
    if not 200 <= reply.status <= 599:
        raise HttpError(502, "bad_reply", f"the page's status {reply.status} cannot be sent")
    if reply.status not in {204, 304}:
        headers.append((b"content-length", str(len(reply.body)).encode()))
    return {"type": "http.response.start", "status": reply.status, "headers": headers}


def _octets(text: str) -> bytes:
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")


def key_text(route: RouteInfo, match_info: dict[str, str], query: str) -> str:
    """The key that a request to a `table_route` page is about.

    Raises:
        HttpError: The query has none.
    """
    if route.match_info is not None:
        return match_info[route.match_info]
    name = route.query_param or ""
    try:
        values = parse_qs(
            query, keep_blank_values=True, errors="strict", max_num_fields=1000
        ).get(name)
    except ValueError as error:
        raise HttpError(400, "bad_query", f"the query cannot be read: {error}") from error
    if not values:
        raise HttpError(400, "key_missing", f"the query parameter {name!r} is missing")
    return values[0]


async def read_body(receive: Receive, limit_bytes: int) -> bytes:
    """The whole body.

    Raises:
        HttpError: It is longer than `limit_bytes`, or the client went away.
    """
    parts: list[bytes] = []
    size_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HttpError(400, "gone", "the client went away", close=True)
        part = message.get("body", b"")
        size_bytes += len(part)
        if size_bytes > limit_bytes:
            raise too_large(limit_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)
