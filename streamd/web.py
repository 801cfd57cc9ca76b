"""What pages are written with: views, requests, responses, and errors that are answers.

    @app.page("/count/")
    class counter(View):
        async def get(self, request: Request) -> Response:
            return self.json({"count": 1})

The names are Faust's and aiohttp's. A request arrives whole, as one frame, so nothing here
waits for the network. A view may return a Response; None, which becomes 204 without a body;
text or bytes; or anything else that JSON can say.

An error of the tree below becomes its status and `{"error": reason}`:

    WebError
    ├── ServerError            500
    ├── ServiceUnavailable     503
    ├── ValidationError        400   a value that cannot be used
    │   └── MissingParameter         also a KeyError
    ├── ParseError             400   a body that cannot be read; also a ValueError
    ├── NotAuthenticated       401
    ├── AuthenticationFailed   401
    ├── PermissionDenied       403
    ├── NotFound               404
    ├── MethodNotAllowed       405
    ├── NotAcceptable          406
    ├── UnsupportedMediaType   415
    └── Throttled              429
"""

import functools
import inspect
import io
import logging
import os
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from http.cookies import SimpleCookie
from typing import Any, ClassVar, NamedTuple, TypeVar
from urllib.parse import parse_qsl, quote, urlencode

import msgspec

from streamd.codecs import codec_for
from streamd.errors import AppError, DecodeError, StreamdError, TimedOut
from streamd.wire import PageReply, PageRequest

log = logging.getLogger(__name__)

METHODS = ("get", "head", "post", "put", "patch", "delete", "options", "search")
"""Methods of a View that answer the HTTP method of their name."""

# More fields than this in a form or query are an attack, not a form.
_MAX_FIELDS = 1000

_Bytes = bytes  # `Web.bytes` hides the name in the class
_Handler = Callable[..., Any]
V = TypeVar("V")


class WebError(StreamdError):
    """An error that the client is told, as JSON with the status `code`.

    Args:
        detail: The text; None: the class's own.
        extra: Further fields of the JSON.
    """

    code = 500
    detail = "Server error."

    def __init__(
        self, detail: str | None = None, *, code: int | None = None, **extra: Any
    ) -> None:
        super().__init__(detail or self.detail)
        self.detail = detail or self.detail
        self.code = code or self.code
        self.extra_context = extra


class ServerError(WebError):
    """The page cannot do what it should."""


class ServiceUnavailable(WebError):
    """Not now; ask again."""

    code = 503
    detail = "Service unavailable."


class ValidationError(WebError):
    """A value of the request cannot be used."""

    code = 400
    detail = "Invalid input."


class MissingParameter(ValidationError, KeyError):
    """The request lacks a query parameter or a field."""

    def __str__(self) -> str:
        return str(self.detail)  # KeyError would show the repr


class ParseError(WebError, ValueError):
    """The request's body cannot be read."""

    code = 400
    detail = "Malformed request."


class NotAuthenticated(WebError):
    """Nobody says who asks."""

    code = 401
    detail = "Authentication credentials were not provided."


class AuthenticationFailed(WebError):
    """Who asks is not who they say."""

    code = 401
    detail = "Incorrect authentication credentials."


class PermissionDenied(WebError):
    """Who asks may not do this."""

    code = 403
    detail = "You do not have permission to perform this action."


class NotFound(WebError):
    """There is no such thing."""

    code = 404
    detail = "Not found."


class MethodNotAllowed(WebError):
    """The page does not have this method."""

    code = 405
    detail = "Method not allowed."


class NotAcceptable(WebError):
    """The page cannot be had in what the client takes."""

    code = 406
    detail = "Could not satisfy the request Accept header."


class UnsupportedMediaType(WebError):
    """The body is of a type that the page does not read."""

    code = 415
    detail = "Unsupported media type in request."


class Throttled(WebError):
    """Too many requests."""

    code = 429
    detail = "Request was throttled."


class MultiDict(Mapping[str, V]):
    """Names with one or more values each, in order. `d[name]` is the first value.

    Args:
        missing: Makes the error for a name that is not there.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[str, V]] = (),
        *,
        missing: Callable[[str], Exception] = KeyError,
    ) -> None:
        self._pairs = list(pairs)
        self._missing = missing

    def _same(self, name: str) -> str:
        return name

    def getall(self, name: str, *default: Any) -> Any:
        """All values of a name, in order."""
        found = [value for key, value in self._pairs if self._same(key) == self._same(name)]
        if not found and not default:
            raise self._missing(name)
        return found or default[0]

    def getone(self, name: str, *default: Any) -> Any:
        """The first value of a name."""
        return self.get(name, default[0]) if default else self[name]

    def pairs(self) -> list[tuple[str, V]]:
        """Every name and value, also where a name has several."""
        return list(self._pairs)

    def __getitem__(self, name: str) -> V:
        wanted = self._same(name)
        for key, value in self._pairs:
            if self._same(key) == wanted:
                return value
        raise self._missing(name)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(key for key, _ in self._pairs))

    def __len__(self) -> int:
        return len({self._same(key) for key, _ in self._pairs})

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and any(
            self._same(key) == self._same(name) for key, _ in self._pairs
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._pairs!r})"


class Headers(MultiDict[str]):
    """Headers: names in any case. Those of a Response can be changed."""

    def _same(self, name: str) -> str:
        return name.lower()

    def __setitem__(self, name: str, value: object) -> None:
        self._pairs = [pair for pair in self._pairs if pair[0].lower() != name.lower()]
        self.add(name, value)

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._pairs = [pair for pair in self._pairs if pair[0].lower() != name.lower()]

    def add(self, name: str, value: object) -> None:
        """Add a further header of this name.

        Raises:
            ValueError: It would end the header: it holds a line break or a zero byte.
        """
        text = str(value)
        if re.search("[\r\n\0]", f"{name}{text}") or not name:
            raise ValueError(f"the header {name!r} cannot be {text!r}: it must be one line")
        self._pairs.append((name, text))

    def setdefault(self, name: str, value: object) -> None:
        """Set it unless it is there."""
        if name not in self:
            self.add(name, value)


class FileField(NamedTuple):
    """A file that a form sent."""

    name: str
    filename: str
    content_type: str
    file: io.BytesIO


class Request:
    """One request, in aiohttp's names."""

    def __init__(self, message: PageRequest, app: Any) -> None:
        self.app = app
        self.method = message.method.upper()
        self.path = message.path
        self.query_string = message.query
        self.headers = Headers(message.headers)
        self.match_info = dict(message.match_info)
        self.remote = message.client
        self.scheme = "http"
        self._body = message.body

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.path_qs}>"

    @property
    def path_qs(self) -> str:
        """Path and query as they were sent."""
        query = f"?{self.query_string}" if self.query_string else ""
        return f"{quote(self.path, safe='/:@!$&()*+,;=~')}{query}"

    rel_url = path_qs

    @property
    def host(self) -> str:
        """What the Host header says."""
        return self.headers.get("host", "")

    @property
    def url(self) -> str:
        """The whole address."""
        return f"{self.scheme}://{self.host}{self.path_qs}"

    @functools.cached_property
    def query(self) -> MultiDict[str]:
        """The query's parameters; a missing one is answered by 400."""
        return MultiDict(
            _fields(self.query_string, "utf-8"),
            missing=lambda name: MissingParameter(f"the query parameter {name!r} is missing"),
        )

    @functools.cached_property
    def cookies(self) -> Mapping[str, str]:
        """Name and value of each cookie."""
        found: dict[str, str] = {}
        for header in self.headers.getall("cookie", []):
            for part in header.split(";"):
                name, equals, value = part.partition("=")
                if equals:
                    found.setdefault(name.strip(), value.strip().strip('"'))
        return found

    @property
    def content_type(self) -> str:
        """The body's media type without parameters; aiohttp's default where none is told."""
        told = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        return told or "application/octet-stream"

    @property
    def charset(self) -> str | None:
        """The body's charset, if it is told."""
        return _parameters_of(self.headers.get("content-type", "")).get("charset")

    @property
    def content_length(self) -> int:
        return len(self._body)

    @property
    def can_read_body(self) -> bool:
        """True if there is a body."""
        return bool(self._body)

    body_exists = can_read_body
    has_body = can_read_body

    async def read(self) -> bytes:
        """The body."""
        return self._body

    async def text(self) -> str:
        """The body as text.

        Raises:
            ParseError: It is not text of its charset.
        """
        try:
            return self._body.decode(self.charset or "utf-8")
        except (UnicodeDecodeError, LookupError) as error:
            raise ParseError(f"the body is not text: {error}") from error

    async def json(self, *, loads: Callable[[str], Any] | None = None) -> Any:
        """The body read as JSON.

        Raises:
            ParseError: It is no JSON.
        """
        try:
            if loads is not None:
                return loads(await self.text())
            return msgspec.json.decode(self._body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise ParseError(f"the body is no JSON: {error}") from error

    async def post(self) -> MultiDict[str | FileField]:
        """The fields of a form, sent urlencoded or as multipart/form-data; empty for others.

        Raises:
            ParseError: It is no form.
        """
        pairs: Iterable[tuple[str, str | FileField]] = ()
        if self.content_type == "application/x-www-form-urlencoded":
            pairs = _fields(await self.text(), self.charset or "utf-8")
        elif self.content_type == "multipart/form-data":
            pairs = _multipart(self._body, self.headers.get("content-type", ""))
        return MultiDict(
            pairs, missing=lambda name: MissingParameter(f"the field {name!r} is missing")
        )


def _fields(text: str, charset: str) -> list[tuple[str, str]]:
    try:
        return parse_qsl(
            text, keep_blank_values=True, encoding=charset, max_num_fields=_MAX_FIELDS
        )
    except ValueError as error:
        raise ParseError(f"there are more than {_MAX_FIELDS} fields") from error


def _parameters_of(header: str) -> dict[str, str]:
    """`name` and `x` of `form-data; name="x"`, names in lower case."""
    found = re.findall(r';\s*([\w*-]+)=(?:"((?:[^"\\]|\\.)*)"|([^;\s]*))', header)
    return {
        name.lower(): re.sub(r"\\(.)", r"\1", quoted) or bare for name, quoted, bare in found
    }


def _multipart(body: bytes, content_type: str) -> list[tuple[str, str | FileField]]:
    boundary = _parameters_of(content_type).get("boundary", "").encode()
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary)
    if not boundary or len(parts) < 3 or not parts[-1].startswith(b"--"):
        raise ParseError("the body is no multipart/form-data with the boundary that is told")
    if len(parts) > _MAX_FIELDS:
        raise ParseError(f"there are more than {_MAX_FIELDS} fields")
    fields: list[tuple[str, str | FileField]] = []
    for part in parts[1:-1]:
        head, found, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        headers = Headers(
            (name.strip(), value.strip())
            for name, _, value in (
                line.partition(":") for line in head.decode("utf-8", "replace").split("\r\n")
            )
        )
        told = _parameters_of(headers.get("content-disposition", ""))
        if not found or "name" not in told:
            raise ParseError("a part of the form has no name")
        name = told["name"]
        if "filename" in told:
            kind = headers.get("content-type", "application/octet-stream")
            fields.append((name, FileField(name, told["filename"], kind, io.BytesIO(content))))
        else:
            fields.append((name, content.decode("utf-8", "replace")))
    return fields


class Response:
    """What a view answers, in aiohttp's names.

    Args:
        body: Bytes, or text.
        text: The body as text; instead of `body`.
    """

    def __init__(
        self,
        body: bytes | str | None = None,
        status: int = 200,
        reason: str | None = None,
        text: str | None = None,
        headers: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
        content_type: str | None = None,
        charset: str = "utf-8",
    ) -> None:
        if body is not None and text is not None:
            raise TypeError("Response takes body= or text=, one of the two")
        content = text if body is None else body
        self.status = status
        self.reason = reason
        self.headers = Headers()
        pairs = headers.items() if isinstance(headers, Mapping) else headers or ()
        for name, value in pairs:
            self.headers.add(name, value)
        if isinstance(content, str):
            self.body = content.encode(charset)
            content_type = content_type or "text/plain"
        else:
            self.body = bytes(content or b"")
        if content_type and content_type.startswith("text/") and "charset" not in content_type:
            content_type = f"{content_type}; charset={charset}"
        if content_type:
            self.headers["Content-Type"] = content_type
        elif self.body:
            self.headers.setdefault("Content-Type", "application/octet-stream")

    def __repr__(self) -> str:
        return f"<Response {self.status}: {len(self.body)} bytes of {self.content_type}>"

    @property
    def content_type(self) -> str:
        """The media type without parameters."""
        return self.headers.get("content-type", "").partition(";")[0]

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode()

    def set_cookie(self, name: str, value: str, **attributes: Any) -> None:
        """Set a cookie; attributes are path, max_age, secure, httponly, samesite, domain,
        expires."""
        cookie: SimpleCookie = SimpleCookie()
        cookie[name] = value
        for attribute, told in ({"path": "/"} | attributes).items():
            cookie[name][attribute.replace("_", "-")] = told
        self.headers.add("Set-Cookie", cookie[name].OutputString())

    def del_cookie(self, name: str, *, path: str = "/") -> None:
        """Let the client forget a cookie."""
        self.set_cookie(name, "", path=path, max_age="0")

    def reply(self, *, head: bool = False) -> PageReply:
        """The frame. With `head`, the body's length is told and the body left out."""
        headers = self.headers.pairs()
        body = self.body
        if self.status in (204, 304) or 100 <= self.status < 200:
            body = b""
        elif head:
            headers = [pair for pair in headers if pair[0].lower() != "content-length"]
            headers.append(("Content-Length", str(len(body))))
            body = b""
        return PageReply(self.status, headers, body)


class Web:
    """Makes responses. A page's function gets one as its first argument."""

    def __init__(self, app: Any, web: "Web | None" = None) -> None:
        self.app = app
        self.web = web or self

    def text(
        self,
        value: str,
        *,
        content_type: str | None = None,
        status: int = 200,
        reason: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """A response of plain text."""
        return Response(value, status, reason, None, headers, content_type or "text/plain")

    def html(
        self,
        value: str,
        *,
        content_type: str | None = None,
        status: int = 200,
        reason: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """A response of HTML."""
        return Response(value, status, reason, None, headers, content_type or "text/html")

    def json(
        self,
        value: Any,
        *,
        content_type: str | None = None,
        status: int = 200,
        reason: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """A response of JSON: of Records, dicts, dates, Decimals and what else holds values."""
        kind = content_type or "application/json"
        return Response(to_json(value), status, reason, None, headers, kind)

    def error(
        self,
        status: int,
        reason: str,
        *,
        headers: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> Response:
        """A response `{"error": reason}` with further fields."""
        return self.json({"error": reason, **fields}, status=status, headers=headers)

    def notfound(self, reason: str = "Not Found", **fields: Any) -> Response:
        """A response `{"error": "Not Found"}` with status 404."""
        return self.error(404, reason, **fields)

    def route(self, pattern: str, handler: Any, **options: Any) -> Any:
        """Add a page, as `app.page(pattern)(handler)`: while the module is imported."""
        return self.app.page(pattern, **options)(handler)

    def path_for(self, view_name: str, **match: Any) -> str:
        """The path of the page of this name; what its path does not take goes to the query.

        Raises:
            KeyError: There is no such page, or its path needs more.
        """
        for page in self.app.pages:
            if page.name == view_name:
                return fill_path(page.path, match)
        raise KeyError(f"there is no page {view_name!r}")

    def url_for(self, view_name: str, _base_url: str | None = None, **match: Any) -> str:
        """The same, behind a base address if one is given."""
        return f"{(_base_url or '').rstrip('/')}{self.path_for(view_name, **match)}"

    def bytes(
        self,
        value: _Bytes,
        *,
        content_type: str | None = None,
        status: int = 200,
        reason: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """A response of bytes."""
        kind = content_type or "application/octet-stream"
        return Response(value, status, reason, None, headers, kind)


class View(Web):
    """A page as a class: define `get`, `post`, `put`, `patch`, `delete`, `head`, `options` or
    `search`, each as `async def get(self, request, **match_info)`.

    One object for each process answers all its requests.
    """

    ServerError: ClassVar = ServerError
    ValidationError: ClassVar = ValidationError
    ParseError: ClassVar = ParseError
    NotAuthenticated: ClassVar = NotAuthenticated
    PermissionDenied: ClassVar = PermissionDenied
    NotFound: ClassVar = NotFound

    async def dispatch(self, request: Request) -> Any:
        """Call the method that the request names, with what of match_info it takes.

        Raises:
            MethodNotAllowed: There is none.
        """
        handler = self._handler(request.method.lower())
        if handler is None:
            if request.method == "OPTIONS":
                return Response(
                    status=204, headers={"Allow": ", ".join(methods_of(type(self)))}
                )
            raise MethodNotAllowed(f"{request.path} does not take {request.method}")
        taken = _taken_names(getattr(handler, "__func__", handler))
        match = request.match_info
        if taken is not None:
            match = {name: value for name, value in match.items() if name in taken}
        result = handler(request, **match)
        return await result if inspect.isawaitable(result) else result

    def _handler(self, method: str) -> _Handler | None:
        if method not in METHODS:
            return None
        found: _Handler | None = getattr(self, method, None)
        if found is None and method == "head":
            found = getattr(self, "get", None)
        return found

    async def read_request_content(self, request: Request) -> _Bytes:
        """The request's body."""
        return await request.read()

    async def on_request_error(self, request: Request, error: WebError) -> Response:
        """The response for an error that the view raised; to be overridden."""
        headers = {}
        if isinstance(error, MethodNotAllowed):
            headers["Allow"] = ", ".join(methods_of(type(self)))
        return self.error(error.code, error.detail, headers=headers, **error.extra_context)


@functools.cache
def _taken_names(handler: _Handler) -> frozenset[str] | None:
    """Which parts of match_info a view takes; None: all, by `**kwargs`."""
    parameters = list(inspect.signature(handler).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    # The first two are the view and the request.
    return frozenset(parameter.name for parameter in parameters[2:])


def as_view(target: Any, base: type[View] = View) -> type[View]:
    """The View class of a page: `target` itself, or one whose `get` is the function.

    Raises:
        AppError: It is neither, or answers nothing.
    """
    name = getattr(target, "__name__", repr(target))
    if inspect.isclass(target):
        if not issubclass(target, View):
            raise AppError(
                f"the page {name!r} is a class, but no View",
                remedy=f"class {name}(streamd.web.View):",
            )
        if not methods_of(target):
            raise AppError(
                f"the page {name!r} answers nothing: it has none of {', '.join(METHODS)}",
                remedy="async def get(self, request):",
            )
        return target
    if not inspect.isfunction(target):
        raise AppError(
            f"the page {name} is neither a function nor a View class",
            remedy="@app.page stands before an async function or a View class",
        )
    if len(inspect.signature(target).parameters) < 2:
        raise AppError(
            f"the page {name!r} takes no request", remedy=f"async def {name}(web, request):"
        )
    attributes = {"get": target, "__doc__": target.__doc__, "__module__": target.__module__}
    return type(name, (base,), attributes)


def methods_of(view: type[View]) -> list[str]:
    """The HTTP methods that the view has, in capitals."""
    return [method.upper() for method in METHODS if hasattr(view, method)]


def view_of(view: type[View], app: Any) -> View:
    """The one object of this view in this process."""
    made: View | None = view.__dict__.get("_streamd_made")
    if made is None or made.app is not app:
        made = view(app, Web(app))
        view._streamd_made = made  # type: ignore[attr-defined]
    return made


async def answer(view: type[View], app: Any, request: PageRequest) -> PageReply:
    """Run the view. Whatever it raises is answered; cancelling passes through.

    An error that the view did not mean is logged once with its traceback; the client gets its
    id and no more.
    """
    head = request.method.upper() == "HEAD"
    asked = Request(request, app)
    try:
        made = view_of(view, app)
        try:
            response = _response(made, await made.dispatch(asked))
        except WebError as error:
            response = _response(made, await made.on_request_error(asked, error))
        return response.reply(head=head)
    except TimedOut as error:
        log.warning("%s %s is answered by 503: %s", asked.method, asked.path, error)
        fields = {"error": "Service unavailable.", "reason": str(error)}
        busy = Response(
            to_json(fields), 503, headers={"Retry-After": "1"}, content_type="application/json"
        )
        return busy.reply(head=head)
    except (Exception, SystemExit):
        # A page that calls sys.exit fails like any other: it is not the process's to end.
        id = os.urandom(4).hex()
        log.exception(
            "%s %s failed, which the client knows as %s", asked.method, asked.path, id
        )
        body = to_json({"error": "Server error.", "id": id})
        return Response(body, 500, content_type="application/json").reply(head=head)


def _response(web: Web, result: Any) -> Response:
    if isinstance(result, Response):
        return result
    if result is None:
        return Response(status=204)
    if isinstance(result, str):
        return web.text(result)
    if isinstance(result, bytes | bytearray | memoryview):
        return web.bytes(bytes(result))
    return web.json(result)


def takes_model(model: Any) -> Callable[[_Handler], _Handler]:
    """Give the view the body, read as JSON of this type, behind the request.

    A body that is not of the type is answered by 400 with the reason.
    """
    codec = codec_for("json", model, default="json")

    def decorate(fun: _Handler) -> _Handler:
        @functools.wraps(fun)
        async def read_first(view: Web, request: Request, *args: Any, **match: Any) -> Any:
            try:
                value = codec.decode(await request.read())
            except DecodeError as error:
                raise ValidationError(str(error)) from error
            return await fun(view, request, value, *args, **match)

        return read_first

    return decorate


def gives_model(model: Any) -> Callable[[_Handler], _Handler]:
    """Answer what the view returns, which is of this type, as JSON."""

    def decorate(fun: _Handler) -> _Handler:
        @functools.wraps(fun)
        async def write_after(view: Web, request: Request, *args: Any, **match: Any) -> Any:
            result: Awaitable[Any] = fun(view, request, *args, **match)
            return view.json(await result)

        return write_after

    return decorate


def fill_path(path: str, match: Mapping[str, Any]) -> str:
    """A path with its `{name}` and `{name:regex}` parts filled in, the rest as query.

    >>> fill_path("/count/{word}/", {"word": "a b", "n": 1})
    '/count/a%20b/?n=1'

    Raises:
        KeyError: A part has no value.
    """
    left = dict(match)

    def fill(part: re.Match[str]) -> str:
        return quote(str(left.pop(part[1])), safe="")

    filled = re.sub(r"\{(\w+)(?::(?:[^{}]|\{[^{}]*\})*)?\}", fill, path)
    return f"{filled}?{urlencode(left)}" if left else filled


def _write_other(value: Any) -> Any:
    for name in ("__json__", "asdict"):
        represent = getattr(value, name, None)
        if represent is not None:
            return represent()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"there is no way to write a {type(value).__name__} as JSON")


to_json: Callable[[Any], bytes] = msgspec.json.Encoder(enc_hook=_write_other).encode
"""A value as JSON."""
