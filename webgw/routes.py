"""Which of the user's pages a path means: aiohttp's patterns over decoded paths. No I/O.

`{word}` is one path segment, `{x:regex}` what the expression says. Expressions see decoded
text, in which a slash that came as `%2F` is no separator: a key may hold one.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from urllib.parse import unquote

from streamd.errors import AppError
from streamd.wire import RouteInfo

# Stands for a slash that is part of a segment. A noncharacter: no text holds it.
_INNER_SLASH = "\ufdd0"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class BadPath(ValueError):
    """The path is not text: bad UTF-8, or a character that no path holds."""


class Match(NamedTuple):
    """A page, and what the braces of its path stand for."""

    route: RouteInfo
    match_info: dict[str, str]


class NotAllowed(NamedTuple):
    """There is such a page, for other methods only."""

    methods: list[str]


def decode_path(raw_path: bytes) -> str:
    """The path as text, a slash inside a segment marked as such.

    Raises:
        BadPath: It cannot be text.
    """
    try:
        text = raw_path.decode("ascii")
        path = _decoded(text)
    except UnicodeDecodeError as error:
        raise BadPath(f"the path {raw_path!r} is not UTF-8") from error
    if "\0" in path or _INNER_SLASH in text:
        raise BadPath(f"the path {raw_path!r} holds a character that a path must not have")
    return path


def _decoded(text: str) -> str:
    return "/".join(
        unquote(segment, errors="strict").replace("/", _INNER_SLASH)
        for segment in text.split("/")
    )


def plain(path: str) -> str:
    """Undo the marks of `decode_path`, for a whole path or one segment of it."""
    return path.replace(_INNER_SLASH, "/")


def compile_path(path: str) -> re.Pattern[str]:
    """The expression that matches what `decode_path` gives.

    >>> compile_path("/count/{word}/").fullmatch("/count/the/").groupdict()
    {'word': 'the'}

    Raises:
        AppError: The pattern cannot be read.
    """
    parts: list[str] = []
    at = 0
    while at < len(path):
        if path[at] != "{":
            end = path.find("{", at)
            end = len(path) if end < 0 else end
            parts.append(re.escape(_decoded(path[at:end])))
        else:
            end = _closing_brace(path, at) + 1
            name, colon, expression = path[at + 1 : end - 1].partition(":")
            if not _NAME.fullmatch(name):
                raise AppError(f"the path {path!r} has no name in {path[at:end]!r}")
            parts.append(f"(?P<{name}>{expression if colon else '[^/]+'})")
        at = end
    try:
        return re.compile("".join(parts))
    except re.error as error:
        raise AppError(f"the path {path!r} is no pattern: {error}") from error


def _closing_brace(path: str, start: int) -> int:
    depth = 0
    for at in range(start, len(path)):
        depth += (path[at] == "{") - (path[at] == "}")
        if depth == 0:
            return at
    raise AppError(f"the path {path!r} has an open brace at {path[start:]!r}")


class RouteTable:
    """The user's pages, in the order in which they were made; the first that fits wins."""

    def __init__(self, routes: Iterable[RouteInfo] = ()) -> None:
        self._fixed: dict[str, list[RouteInfo]] = {}  # path without braces -> its routes
        self._patterns: list[tuple[re.Pattern[str], RouteInfo]] = []
        for route in routes:
            if "{" in route.path:
                self._patterns.append((compile_path(route.path), route))
            else:
                self._fixed.setdefault(_decoded(route.path), []).append(route)

    def match(self, method: str, path: str) -> Match | NotAllowed | None:
        """The page for a path of `decode_path`. A HEAD is for whoever takes a GET."""
        allowed: list[str] = []
        for route in self._fixed.get(path, ()):
            if takes(route.methods, method):
                return Match(route, {})
            allowed += route.methods
        for pattern, route in self._patterns:
            found = pattern.fullmatch(path)
            if found is None:
                continue
            if takes(route.methods, method):
                values = found.groupdict(default="")
                return Match(route, {name: plain(text) for name, text in values.items()})
            allowed += route.methods
        return NotAllowed(_with_head(allowed)) if allowed else None


def takes(methods: Sequence[str], method: str) -> bool:
    """True when a page with these methods answers `method`."""
    upper = {name.upper() for name in methods}
    return method in upper or "*" in upper or (method == "HEAD" and "GET" in upper)


def _with_head(methods: Iterable[str]) -> list[str]:
    upper = {name.upper() for name in methods}
    return sorted(upper | ({"HEAD"} if "GET" in upper else set()))
