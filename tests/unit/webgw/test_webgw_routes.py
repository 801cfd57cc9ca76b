"""Paths, keys and owners, as they are computed."""

import pytest

from streamd.errors import AppError
from streamd.partition import partition_for
from streamd.webgw.owners import OwnerMap, route_partition
from streamd.webgw.routes import BadPath, Match, NotAllowed, RouteTable, decode_path
from streamd.wire import Owner, Owners, RouteInfo, TableInfo


def route(path: str, *methods: str) -> RouteInfo:
    return RouteInfo(1, path, list(methods) or ["GET"], "p", "app", None, None, None, "")


def found(path: str, raw: bytes, method: str = "GET") -> dict[str, str] | None:
    match = RouteTable([route(path)]).match(method, decode_path(raw))
    return match.match_info if isinstance(match, Match) else None


@pytest.mark.parametrize(
    ("path", "raw", "info"),
    [
        ("/count/{word}/", b"/count/the/", {"word": "the"}),
        ("/count/{word}/", b"/count/a%2Fb/", {"word": "a/b"}),
        ("/count/{word}/", b"/count/%C3%A4/", {"word": "ä"}),
        ("/count/{word}/", b"/count/a/b/", None),
        ("/count/{word}/", b"/count/the", None),
        ("/count/{word}/", b"/count//", None),
        ("/n/{x:[0-9]+}", b"/n/12", {"x": "12"}),
        ("/n/{x:[0-9]+}", b"/n/1a", None),
        ("/n/{x:[0-9]{2}}", b"/n/12", {"x": "12"}),
        ("/a.b/", b"/aXb/", None),
    ],
)
def test_what_a_path_matches(path: str, raw: bytes, info: dict[str, str] | None) -> None:
    assert found(path, raw) == info


def test_other_methods_are_not_allowed_and_head_is_for_get() -> None:
    table = RouteTable([route("/x/", "GET"), route("/x/", "POST")])

    assert isinstance(table.match("HEAD", "/x/"), Match)
    assert table.match("PUT", "/x/") == NotAllowed(["GET", "HEAD", "POST"])
    assert table.match("GET", "/y/") is None


@pytest.mark.parametrize("raw", [b"/%ff/", b"/a%00b/", b"/\xe4/"])
def test_what_is_no_text_is_no_path(raw: bytes) -> None:
    with pytest.raises(BadPath):
        decode_path(raw)


@pytest.mark.parametrize("path", ["/{/", "/{1x}/", "/{x:[}/"])
def test_a_pattern_that_cannot_be_read_is_an_error_of_the_app(path: str) -> None:
    with pytest.raises(AppError):
        RouteTable([route(path)])


def owner(process: str, slot: int, active: list[int], **more: list[int]) -> Owner:
    return Owner("g", process, f"{process}.sock", slot, 2, active, more.get("recovering", []))


def test_owners_are_those_of_the_newest_word() -> None:
    first = OwnerMap().updated(Owners(2, [owner("g#0", 0, [0, 2]), owner("g#1", 1, [1, 3])]))

    assert first.updated(Owners(1, [])) is first
    newer = first.updated(Owners(3, [owner("g#1", 1, [1], recovering=[0])]))

    assert (found_in := newer.owner("g", 1)) is not None and found_in.process == "g#1"
    assert newer.owner("g", 0) is None
    assert newer.still_recovering() == [("g", 0)]
    assert [each.process for each in first.members("g")] == ["g#0", "g#1"]


@pytest.mark.parametrize(
    ("codec", "type_name", "text", "key"),
    [
        ("raw", "str", "the", b"the"),
        ("json", "str", "the", b'"the"'),
        ("json", "int", "7", b"7"),
    ],
)
def test_a_key_of_a_url_is_placed_as_its_producer_does(
    codec: str, type_name: str, text: str, key: bytes
) -> None:
    table = TableInfo("t", "g", 8, "", codec, type_name, "", "")

    assert route_partition(table, text) == partition_for(key, 8)


def test_only_the_app_knows_its_own_codecs() -> None:
    assert route_partition(TableInfo("t", "g", 8, "", "mine", "Thing", "", ""), "x") is None
