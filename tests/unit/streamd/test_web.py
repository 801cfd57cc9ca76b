import asyncio
import json
import logging
from datetime import UTC, datetime
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from streamd import web
from streamd.errors import AppError, TimedOut
from streamd.web import (
    MissingParameter,
    ParseError,
    Request,
    Response,
    View,
    Web,
    answer,
    as_view,
    gives_model,
    methods_of,
    takes_model,
)
from streamd.wire import PageReply, PageRequest

APP = SimpleNamespace(pages=[SimpleNamespace(name="word", path="/count/{word:[a-z]{2}}/")])


class Word(msgspec.Struct):
    word: str
    n: int = 0


def page_request(
    method: str = "GET",
    path: str = "/x/",
    *,
    query: str = "",
    body: bytes = b"",
    headers: list[tuple[str, str]] | None = None,
    match_info: dict[str, str] | None = None,
) -> PageRequest:
    return PageRequest(
        route=0,
        partition=-1,
        method=method,
        path=path,
        query=query,
        headers=headers or [("host", "127.0.0.1:6066")],
        body=body,
        match_info=match_info or {},
        client="127.0.0.1",
    )


def ask(target: Any, request: PageRequest | None = None, app: Any = APP) -> PageReply:
    return asyncio.run(answer(as_view(target), app, request or page_request()))


def post_fields(content_type: str, body: bytes) -> Any:
    message = page_request("POST", body=body, headers=[("Content-Type", content_type)])
    return asyncio.run(Request(message, APP).post())


def test_a_function_answers_get_with_match_info_by_name() -> None:
    async def get_count(web: Web, request: Request, word: str) -> Response:
        """Count of a word."""
        return web.json({word: 3})

    reply = ask(get_count, page_request(match_info={"word": "the", "other": "x"}))

    assert (reply.status, json.loads(reply.body)) == (200, {"the": 3})
    assert ("Content-Type", "application/json") in reply.headers
    assert methods_of(as_view(get_count)) == ["GET"]


def test_the_guides_view_counts_over_requests() -> None:
    class counter(View):
        count: int = 0

        async def get(self, request: Request) -> Response:
            return self.json({"count": self.count})

        async def post(self, request: Request) -> Response:
            self.count += int(request.query["n"])
            return self.json({"count": self.count})

        async def delete(self, request: Request) -> None:
            self.count = 0

    assert json.loads(ask(counter, page_request("POST", query="n=2")).body) == {"count": 2}
    assert json.loads(ask(counter, page_request("POST", query="n=3")).body) == {"count": 5}
    assert json.loads(ask(counter).body) == {"count": 5}
    assert ask(counter, page_request("DELETE")) == PageReply(204, [], b"")
    assert json.loads(ask(counter).body) == {"count": 0}
    assert methods_of(counter) == ["GET", "POST", "DELETE"]


def test_a_view_of_another_app_is_another_object() -> None:
    class counter(View):
        async def get(self, request: Request) -> str:
            return str(self.app.id)

    assert ask(counter, app=SimpleNamespace(id="one")).body == b"one"
    assert ask(counter, app=SimpleNamespace(id="two")).body == b"two"


@pytest.mark.parametrize(
    ("result", "status", "kind", "body"),
    [
        (None, 204, None, b""),
        ("té", 200, "text/plain; charset=utf-8", "té".encode()),
        (b"\0", 200, "application/octet-stream", b"\0"),
        ([1, {"a": None}], 200, "application/json", b'[1,{"a":null}]'),
        (Word("the"), 200, "application/json", b'{"word":"the","n":0}'),
        (Decimal("1.50"), 200, "application/json", b'"1.50"'),
        (datetime(2026, 1, 2, tzinfo=UTC), 200, "application/json", b'"2026-01-02T00:00:00Z"'),
        ({"k": range(2)}, 200, "application/json", b'{"k":[0,1]}'),
        (Response("x", 201, content_type="text/html"), 201, "text/html; charset=utf-8", b"x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_view_returns_becomes_a_reply(
    result: Any, status: int, kind: str | None, body: bytes
) -> None:
    async def page(web: Web, request: Request) -> Any:
        return result

    reply = ask(page)

    assert (reply.status, dict(reply.headers).get("Content-Type"), reply.body) == (
        status,
        kind,
        body,
    )


@pytest.mark.parametrize(
    ("error", "status", "body"),
    [
        (web.NotFound(), 404, {"error": "Not found."}),
        (web.PermissionDenied("no", user="ann"), 403, {"error": "no", "user": "ann"}),
        (web.WebError("teapot", code=418), 418, {"error": "teapot"}),
        (View.ValidationError("n is no number"), 400, {"error": "n is no number"}),
        (MissingParameter("lacks 'n'"), 400, {"error": "lacks 'n'"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_web_error_becomes_its_status_and_reason(
    error: web.WebError, status: int, body: dict[str, str]
) -> None:
    async def page(web: Web, request: Request) -> None:
        raise error

    reply = ask(page)

    assert (reply.status, json.loads(reply.body)) == (status, body)


def test_a_view_may_answer_its_errors_itself() -> None:
    class page(View):
        async def get(self, request: Request) -> None:
            raise self.NotFound("gone")

        async def on_request_error(self, request: Request, error: web.WebError) -> Response:
            return self.text(f"sorry: {error}", status=error.code)

    assert ask(page).body == b"sorry: gone"


def test_an_exception_is_logged_once_and_tells_the_client_an_id_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def page(web: Web, request: Request) -> None:
        raise RuntimeError("the password is x")

    reply = ask(page)

    body = json.loads(reply.body)
    assert reply.status == 500
    assert set(body) == {"error", "id"}
    assert body["error"] == "Server error."
    (record,) = caplog.records
    assert body["id"] in record.getMessage()
    assert record.exc_info


def test_what_json_cannot_say_is_an_error_of_the_page() -> None:
    async def page(web: Web, request: Request) -> Any:
        return {"x": object()}

    assert ask(page).status == 500


def test_a_time_out_of_a_look_up_says_when_to_ask_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def page(web: Web, request: Request) -> None:
        raise TimedOut("no answer in 1 s")

    reply = ask(page)

    assert (reply.status, dict(reply.headers)["Retry-After"]) == (503, "1")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_cancelling_passes_through() -> None:
    async def page(web: Web, request: Request) -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        ask(page)


def test_a_missing_method_is_told_with_those_that_are_there() -> None:
    async def page(web: Web, request: Request) -> str:
        return "x"

    refused = ask(page, page_request("POST"))
    asked = ask(page, page_request("OPTIONS"))
    dunder = ask(page, page_request("DISPATCH"))

    assert (refused.status, dict(refused.headers)["Allow"]) == (405, "GET")
    assert (asked.status, dict(asked.headers)["Allow"]) == (204, "GET")
    assert dunder.status == 405


def test_head_has_the_length_of_get_and_no_body() -> None:
    async def page(web: Web, request: Request) -> str:
        return "four"

    reply = ask(page, page_request("HEAD"))

    assert (reply.body, dict(reply.headers)["Content-Length"]) == (b"", "4")


def test_a_request_has_aiohttps_names() -> None:
    request = Request(
        page_request(
            path="/a b/",
            query="n=1&n=2&e=&t=%C3%A9",
            headers=[
                ("host", "h:6066"),
                ("X-One", "1"),
                ("cookie", 'a=1; b="x=y"'),
                ("content-type", "Application/JSON; charset=latin-1"),
            ],
            body=b"1",
        ),
        APP,
    )

    assert request.query["n"] == "1"
    assert request.query.getall("n") == ["1", "2"]
    assert (request.query["e"], request.query["t"]) == ("", "é")
    assert request.query.get("none") is None
    assert request.query.getall("none", []) == []
    assert request.query.getone("none", 7) == 7
    assert request.headers["x-ONE"] == "1"
    assert request.cookies == {"a": "1", "b": "x=y"}
    assert (request.content_type, request.charset) == ("application/json", "latin-1")
    assert request.url == "http://h:6066/a%20b/?n=1&n=2&e=&t=%C3%A9"
    assert request.can_read_body


def test_a_missing_query_parameter_is_a_key_error_and_the_clients_fault() -> None:
    query = Request(page_request(), APP).query

    with pytest.raises(KeyError, match="the query parameter 'n' is missing") as caught:
        query["n"]
    assert isinstance(caught.value, web.ValidationError)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[" * 5000], ids=["empty", "cut", "bytes", "deep"]
)
def test_a_body_that_is_no_json_is_the_clients_fault(body: bytes) -> None:
    async def page(view: Any, request: Request) -> Any:
        return await request.json()

    class post(View):
        async def post(self, request: Request) -> Any:
            return await request.json()

    assert ask(post, page_request("POST", body=body)).status == 400


def test_a_form_is_read_urlencoded_and_multipart() -> None:
    plain = post_fields("application/x-www-form-urlencoded", b"a=1&b=x+y&a=2")
    multipart = post_fields(
        'multipart/form-data; boundary="XX"',
        b'--XX\r\nContent-Disposition: form-data; name="a"\r\n\r\none\r\n'
        b'--XX\r\nContent-Disposition: form-data; name="f"; filename="x.bin"\r\n'
        b"Content-Type: image/png\r\n\r\n\0\r\n--X\n\r\n--XX--\r\n",
    )

    assert (plain["b"], plain.getall("a")) == ("x y", ["1", "2"])
    assert multipart["a"] == "one"
    file = multipart["f"]
    assert (file.filename, file.content_type) == ("x.bin", "image/png")
    assert file.file.read() == b"\0\r\n--X\n"
    assert len(post_fields("application/json", b"{}")) == 0


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"--X\r\n\r\n--X--"),
        ("multipart/form-data; boundary=X", b""),
        ("multipart/form-data; boundary=X", b"--X\r\nno head\r\n--X--"),
        ("application/x-www-form-urlencoded", b"a=1&" * 2000),
        ("application/x-www-form-urlencoded; charset=klingon", b"a=1"),
    ],
    ids=["no boundary", "empty", "no name", "too many", "unknown charset"],
)
def test_a_broken_form_is_the_clients_fault(content_type: str, body: bytes) -> None:
    with pytest.raises(ParseError):
        post_fields(content_type, body)


def test_models_are_taken_and_given() -> None:
    class page(View):
        @takes_model(Word)
        @gives_model(Word)
        async def post(self, request: Request, word: Word, *, more: str) -> Word:
            return Word(word.word + more, word.n + 1)

    match = {"more": "!"}
    good = ask(page, page_request("POST", body=b'{"word":"a","n":1}', match_info=match))
    bad = ask(page, page_request("POST", body=b'{"word":1}', match_info=match))

    assert json.loads(good.body) == {"word": "a!", "n": 2}
    assert bad.status == 400
    assert "str" in json.loads(bad.body)["error"]


def test_a_page_is_found_by_name() -> None:
    made = Web(APP)

    assert made.url_for("word", word="a/b", n=1) == "/count/a%2Fb/?n=1"
    assert made.url_for("word", "http://h/", word="ab") == "http://h/count/ab/"
    with pytest.raises(KeyError, match="no page 'nothing'"):
        made.url_for("nothing")


def test_a_header_cannot_be_split() -> None:
    async def page(web: Web, request: Request) -> Response:
        return web.text("x", headers={"X": "a\r\nSet-Cookie: b"})

    assert ask(page).status == 500


def test_cookies_are_set_beside_each_other() -> None:
    async def page(web: Web, request: Request) -> Response:
        response = web.text("x")
        response.set_cookie("a", "1", max_age=5, httponly=True)
        response.del_cookie("b")
        return response

    cookies = [value for name, value in ask(page).headers if name == "Set-Cookie"]
    assert len(cookies) == 2
    assert cookies[0].startswith("a=1;")
    assert "Max-Age=0" in cookies[1]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (object(), "neither a function nor a View"),
        (dict, "is a class, but no View"),
        (type("Empty", (View,), {}), "answers nothing"),
        (lambda: None, "takes no request"),
    ],
    ids=["an object", "another class", "an empty view", "no request"],
)
def test_what_is_no_page_is_refused(target: Any, message: str) -> None:
    with pytest.raises(AppError, match=message):
        as_view(target)
