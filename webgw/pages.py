"""streamd's own pages: the overview, its stream, JSON, look-ups, health, metrics, the graph.

They are at `/streamd/…` always, and at the short paths unless the user's pages took those.
None of them changes anything.
"""

import asyncio
import hashlib
import hmac
import mimetypes
import time
from collections.abc import Awaitable
from importlib import resources
from typing import Any, TypeVar
from urllib.parse import quote

import jinja2
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streamd.webgw import charts, metrics
from streamd.webgw.asking import ask, holder_of, owner_of, partition_of, twice, unexpected
from streamd.webgw.fleet import Fleet
from streamd.webgw.hops import Hops
from streamd.webgw.hosts import HOP_PATH
from streamd.webgw.live import Hub
from streamd.webgw.overview import Overview, Trend, view_of
from streamd.webgw.replies import SECURITY_HEADERS, HttpError, json_reply, not_now, reply
from streamd.webgw.topology import NODE_HEIGHT, NODE_WIDTH, draw
from streamd.wire import Found, LookupText, Missing, Scan, Scanned, TableInfo
from streamd.wire import Message as Frame

T = TypeVar("T")

HTML = "text/html; charset=utf-8"

# A snapshot comes each second; the master has stopped talking when it is older than this.
STALE_S = 5.0
RETRY_MS = 2000
SCAN_ROWS = 50


class StaticFile(msgspec.Struct, frozen=True):
    """A file of ours, held in memory: no request reads the disk."""

    body: bytes
    content_type: str
    version: str


class Pages:
    """The pages, as one ASGI app."""

    def __init__(self, fleet: Fleet, hub: Hub) -> None:
        self._fleet = fleet
        self._hub = hub
        self.hops = Hops(fleet)
        self._trend = Trend()
        self._files = _static_files()
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("streamd.webgw", "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters["segment"] = lambda text: quote(str(text), safe="")
        self._templates.filters["count"] = charts.count
        self._templates.globals.update(
            static=lambda name: f"/streamd/static/{name}?v={self._files[name].version}",
            node_width=NODE_WIDTH,
            node_height=NODE_HEIGHT,
        )
        self.app: ASGIApp = _with_security_headers(self._application())

    def _application(self) -> Starlette:
        pages = {
            "/": self.overview,
            "/stats/": self.stats,
            "/healthz": self.healthz,
            "/readyz": self.readyz,
            "/metrics": self.metrics,
            "/graph/": self.graph,
            "/table/": self.table_list,
            "/table/{name}/": self.table,
            "/table/{name}/{key:path}/": self.table_key,
            "/router/": self.router_list,
            "/router/{name}/{key:path}/": self.router_key,
        }
        routes = [Route("/streamd/events", self.events), Route("/favicon.ico", self.icon)]
        routes.append(Route(HOP_PATH, self.hops.from_host, methods=["POST"]))
        routes.append(Route("/streamd/static/{name}", self.static))
        for prefix in ("/streamd", ""):
            routes += [Route(prefix + path, page) for path, page in pages.items()]
        return Starlette(
            routes=routes,
            exception_handlers={
                HttpError: _show_http_error,
                HTTPException: _show_http_exception,
                Exception: _show_bug,
            },
        )

    def publish(self) -> None:
        """A new snapshot is here: give it to the open pages."""
        if self._fleet.snapshot is not None:
            self._trend.add(self._fleet.snapshot)
        if len(self._hub):
            self._hub.publish(self._live_event())

    # The overview.

    def _view(self) -> Overview:
        starting = {"state": "starting", "sentence": "Starting: nothing is known yet."}
        snapshot = self._fleet.snapshot or starting
        return view_of(snapshot, self._trend, self._fleet.route_infos, time.time())

    def _live_event(self) -> bytes:
        view = self._view()
        data = msgspec.json.encode({"shape": view.shape, "cells": view.cells})
        return b"event: snap\ndata: " + data + b"\n\n"

    def _render(self, template: str, **values: Any) -> bytes:
        options = self._fleet.options
        snapshot = self._fleet.snapshot or {}
        text = self._templates.get_template(template).render(
            instance=self._fleet.instance or str(snapshot.get("name", "streamd")),
            app_id=self._fleet.app_id,
            snapshot=snapshot,
            values_hidden=options.exposed and not options.token,
            token_needed=options.exposed and bool(options.token),
            **values,
        )
        return text.encode()

    async def overview(self, request: Request) -> Response:
        view = self._view()
        return reply(self._render("overview.html", view=view, c=view.cells), HTML)

    async def events(self, request: Request) -> Response:
        """The overview's cells, each second, as server-sent events."""
        head = f"retry: {RETRY_MS}\n\n".encode() + self._live_event()
        headers = {
            "content-type": "text/event-stream",
            "cache-control": "no-store",
            "x-accel-buffering": "no",
        }
        return StreamingResponse(self._hub.stream(head), headers=headers)

    async def static(self, request: Request) -> Response:
        file = self._files.get(request.path_params["name"])
        if file is None:
            raise HttpError(404, "not_found", "there is no such file")
        caching = {"cache-control": "public, max-age=31536000, immutable"}
        return reply(file.body, file.content_type, headers=caching)

    async def icon(self, request: Request) -> Response:
        file = self._files["icon.svg"]
        return reply(file.body, file.content_type)

    async def graph(self, request: Request) -> Response:
        picture = draw(self._fleet.snapshot or {}, self._fleet.route_infos)
        body = self._render("graph.svg", picture=picture, c=self._view().cells)
        return reply(body, "image/svg+xml")

    # For programs.

    async def stats(self, request: Request) -> Response:
        if self._fleet.snapshot is None:
            raise not_now("starting", "nothing is known yet")
        return reply(self._fleet.snapshot_json, "application/json")

    async def healthz(self, request: Request) -> Response:
        return json_reply({"ok": True})

    async def readyz(self, request: Request) -> Response:
        reasons = self.reasons_not_ready()
        if not reasons:
            return json_reply({"ready": True, "reasons": []})
        retry = {"retry-after": "1"}
        return json_reply({"ready": False, "reasons": reasons}, 503, retry)

    def reasons_not_ready(self) -> list[str]:
        """Why requests to this instance may fail now; empty when it is ready."""
        snapshot = self._fleet.snapshot
        if snapshot is None:
            return ["nothing is known yet"]
        age_s = time.monotonic() - self._fleet.snapshot_at
        reasons = [f"no word from the master for {age_s:.0f} s"] if age_s > STALE_S else []
        if snapshot.get("state") not in ("running", "reloading"):
            reasons.append(str(snapshot.get("sentence") or snapshot.get("state")))
        reasons += [
            f"{problem.get('process') or 'instance'}: {problem.get('text')}"
            for problem in snapshot.get("problems", ())
        ]
        reasons += [
            f"partition {partition} of {group} is recovering"
            for group, partition in self._fleet.owners.still_recovering()
        ]
        return reasons

    async def metrics(self, request: Request) -> Response:
        body = metrics.render(self._fleet.snapshot or {}, len(self._hub))
        return reply(body, metrics.CONTENT_TYPE)

    # Tables.

    async def table_list(self, request: Request) -> Response:
        return json_reply([self._about(table) for table in self._fleet.tables.values()])

    async def table(self, request: Request) -> Response:
        """A table and its keys; a page for browsers, JSON for others."""
        table = self._table(request)
        if "text/html" not in request.headers.get("accept", ""):
            return json_reply(self._about(table))
        key, prefix = request.query_params.get("key"), request.query_params.get("prefix", "")
        context: dict[str, Any] = {
            "table": table, "key": key, "prefix": prefix, "found": None, "problem": None,
            "rows": [], "about": self._about(table), "limit": SCAN_ROWS,
        }  # fmt: skip
        try:
            self._check_values_may_be_seen(request)
            if key is not None:
                context["found"] = await self._shown(table, key)
            else:
                context["rows"] = await self._scan(table, prefix)
        except HttpError as error:
            context["problem"] = str(error)
        return reply(self._render("table.html", **context), HTML)

    async def table_key(self, request: Request) -> Response:
        """The value of a key, as JSON."""
        table = self._table(request)
        self._check_values_may_be_seen(request)
        value, _ = await self._value(table, request.path_params["key"])
        return reply(value + b"\n", "application/json")

    async def router_list(self, request: Request) -> Response:
        owners = self._fleet.owners
        return json_reply(
            {
                table.name: {
                    str(partition): owner.process if owner else None
                    for partition in range(table.partitions)
                    for owner in [owners.owner(table.group, partition)]
                }
                for table in self._fleet.tables.values()
            }
        )

    async def router_key(self, request: Request) -> Response:
        """Which process has a key."""
        table, key = self._table(request), request.path_params["key"]

        async def attempt() -> dict[str, Any]:
            partition = await partition_of(self._fleet, table, key)
            owner = await owner_of(self._fleet, table.group, partition)
            return {
                "table": table.name, "key": key, "partition": partition, "group": owner.group,
                "process": owner.process,
            }  # fmt: skip

        return json_reply(await self._in_time(twice(self._fleet, attempt)))

    def _table(self, request: Request) -> TableInfo:
        name = request.path_params["name"]
        table = self._fleet.tables.get(name)
        if table is None:
            known = ", ".join(self._fleet.tables) or "none"
            raise HttpError(404, "table_not_found", f"no table {name!r}: there are {known}")
        return table

    def _about(self, table: TableInfo) -> dict[str, Any]:
        rows = (self._fleet.snapshot or {}).get("tables", ())
        keys = next((row.get("keys") for row in rows if row.get("name") == table.name), None)
        return {
            "name": table.name, "help": table.help, "group": table.group, "keys": keys,
            "partitions": table.partitions, "key_type": table.key_type,
            "value_type": table.value_type,
        }  # fmt: skip

    def _check_values_may_be_seen(self, request: Request) -> None:
        options = self._fleet.options
        if not options.exposed:
            return
        if not options.token:
            raise HttpError(
                403,
                "values_hidden",
                "values are not shown: this port is open to other machines and has no token",
                hint="set web_token, or bind it to 127.0.0.1",
            )
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(
            given.strip().encode(), options.token.encode()
        ):
            return
        raise HttpError(
            401,
            "token_needed",
            "values are shown to who has the token",
            hint="send it as Authorization: Bearer …",
            headers={"www-authenticate": 'Bearer realm="streamd"'},
        )

    async def _value(self, table: TableInfo, text: str) -> tuple[bytes, bool]:
        """The JSON of a key's value, or of the table's default; and whether the key is there.

        Raises:
            HttpError: There is no such key and no default, or it cannot be asked.
        """

        async def attempt() -> Frame:
            owner, partition = await holder_of(self._fleet, table, text)
            question = LookupText(table.name, text, partition)
            answer = await ask(self._fleet, owner, question, repeatable=True)
            if not isinstance(answer, Found | Missing):
                raise unexpected(owner, answer)
            return answer

        answer = await self._in_time(twice(self._fleet, attempt))
        if isinstance(answer, Found):
            return answer.value, True
        if isinstance(answer, Missing) and answer.default is not None:
            return answer.default, False
        raise HttpError(404, "key_not_found", f"no key {text!r} in {table.name}")

    async def _shown(self, table: TableInfo, text: str) -> dict[str, Any]:
        value, there = await self._value(table, text)
        try:
            pretty = msgspec.json.format(value, indent=2).decode()
        except msgspec.DecodeError:
            pretty = value.decode(errors="replace")
        return {"value": pretty, "there": there}

    async def _scan(self, table: TableInfo, prefix: str) -> list[tuple[str, str]]:
        """The first keys that begin with `prefix`, of all the table's processes."""
        question = Scan(table.name, prefix, SCAN_ROWS)

        async def attempt() -> list[tuple[str, str]]:
            rows: list[tuple[str, str]] = []
            for owner in self._fleet.owners.members(table.group):
                answer = await ask(self._fleet, owner, question, repeatable=True)
                if not isinstance(answer, Scanned):
                    raise unexpected(owner, answer)
                rows += answer.rows
            return sorted(rows)[:SCAN_ROWS]

        return await self._in_time(twice(self._fleet, attempt))

    async def _in_time(self, work: Awaitable[T]) -> T:
        limit_s = self._fleet.options.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await work
        except TimeoutError:
            raise HttpError(504, "timed_out", f"no answer within {limit_s:g} s") from None


def _static_files() -> dict[str, StaticFile]:
    files = {}
    for entry in resources.files("streamd.webgw").joinpath("static").iterdir():
        body = entry.read_bytes()
        content_type = mimetypes.guess_type(entry.name)[0] or "application/octet-stream"
        if content_type.startswith("text/"):
            content_type += "; charset=utf-8"
        version = hashlib.sha256(body).hexdigest()[:8]
        files[entry.name] = StaticFile(body, content_type, version)
    return files


def _with_security_headers(app: ASGIApp) -> ASGIApp:
    """Give every reply of ours the headers, redirects and streams too."""
    wanted = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                there = {name for name, _ in message["headers"]}
                missing = [pair for pair in wanted if pair[0] not in there]
                message = {**message, "headers": [*message["headers"], *missing]}
            await send(message)

        await app(scope, receive, sending)

    return wrapped


async def _show_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return error.reply()


async def _show_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    texts = {404: ("not_found", f"there is no page {request.url.path!r}")}
    code, text = texts.get(error.status_code, ("refused", str(error.detail)))
    if error.status_code == 405:
        code, text = "method_not_allowed", f"this page does not take {request.method}"
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    return HttpError(error.status_code, code, text, headers=headers).reply()


async def _show_bug(request: Request, error: Exception) -> Response:
    # Starlette raises it again after this reply, and the server's logger writes it down.
    return HttpError(500, "bug", "an error in streamd; its log has the traceback").reply()
