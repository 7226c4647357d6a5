"""What stands before every request: names, keys, sizes, times, and what every answer carries."""

import asyncio
import contextlib
import time
from typing import Any

import pytest
from guarded import KEY, OTHER_KEY, SECURITY, around
from small_servers import Answer
from starlette.types import Message, Scope

from danlu.web import guard
from danlu.web.guard import Guard


def call(
    app: Guard,
    path: str = "/",
    headers: list[tuple[bytes, bytes]] | None = None,
    method: str = "GET",
    bodies: list[bytes] | None = None,
) -> Answer:
    """One request as a server hands it to the application; the last of `bodies` ends it, b"…" never comes."""
    asked = [(b"host", b"localhost")] if headers is None else headers
    scope: Scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": asked,
        "root_path": "",
        "scheme": "http",
        "http_version": "1.1",
    }
    waiting, sent = bodies or [b""], []

    async def receive() -> Message:
        if not waiting:
            await asyncio.sleep(60)
        data = waiting.pop(0)
        return {"type": "http.request", "body": data, "more_body": bool(waiting)}

    async def send(message: Message) -> None:
        sent.append(message)

    with contextlib.suppress(TimeoutError):  # the application's own, which the server would log
        asyncio.run(app(scope, receive, send))
    assert [message["type"] for message in sent[:1]] == ["http.response.start"]
    found = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:]))


def host(name: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"host", name)]


# Names


@pytest.mark.parametrize(
    "name",
    [
        b"localhost",
        b"LocalHost",
        b"localhost:8000",
        b"127.0.0.1",
        b"127.0.0.1:8000",
        b"127.8.9.1:1",
        b"192.168.1.7:8000",
        b"0.0.0.0:8000",
        b"[::1]",
        b"[::1]:8000",
        b"[FE80::1]:8000",
        b"10.0.0.1",
        b"danlu.example",
        b"danlu.example:8000",
        b"DANLU.Example",
        b"Lab-PC:80",
    ],
)
def test_known_names_and_numbers_are_answered(name: bytes) -> None:
    assert call(around(hosts=["danlu.example", "lab-pc"]), headers=host(name)).status == 200
    assert call(around(hosts=["DANLU.EXAMPLE", "LAB-PC"]), headers=host(name)).status == 200


@pytest.mark.parametrize(
    "name",
    [
        b"evil.example",
        b"evil.example:8000",
        b"localhost.evil.example",
        b"evil.example.",
        b"127.0.0.1.evil.example",
        b"danlu.example.evil.example",
        b"xdanlu.example",
        b"evil.example@localhost",
        b"localhost@evil.example",
        b"2130706433",
        b"0x7f000001",
        b"0177.0.0.1",
        b"127.1",
        b"",
        b":",
        b":8000",
        b"[",
        b"[]",
        b"[]:80",
        b"::1.evil.example",
        b"\xff\xfe",
        b"localhost\xff",
        "ｌocalhost".encode(),
        b"*",
        b"null",
    ],
)
def test_other_names_are_refused(name: bytes) -> None:
    found = call(around(hosts=["danlu.example"]), headers=host(name))
    assert found.status == 421
    assert found.json["error"]["code"] == "unknown_host"


def test_a_request_without_a_name_is_refused() -> None:
    assert call(around(), headers=[]).status == 421


def test_a_star_knows_every_name() -> None:
    assert call(around(hosts=["*"]), headers=host(b"any.example")).status == 200


def test_a_page_that_rebinds_its_name_does_not_even_get_a_preflight() -> None:
    asked = [
        *host(b"evil.example"),
        (b"origin", b"http://evil.example"),
        (b"access-control-request-method", b"POST"),
    ]
    assert call(around(origins=["*"]), headers=asked, method="OPTIONS").status == 421


# Keys


def key(value: bytes) -> list[tuple[bytes, bytes]]:
    return [*host(b"localhost"), (b"authorization", value)]


@pytest.mark.parametrize(
    "value",
    [b"Bearer sk-first", b"bearer sk-first", b"BEARER sk-second", b"Bearer   sk-first ", b"bEaReR sk-second"],
)
def test_each_key_opens(value: bytes) -> None:
    found = call(around(keys=[KEY, OTHER_KEY]), headers=key(value))
    assert found.status == 200
    assert found.json["key"] == value.split()[1].decode()


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer sk-firs",
        b"Bearer sk-first1",
        b"Bearer SK-FIRST",
        b"sk-first",
        b"Basic sk-first",
        b"Bearersk-first",
        b"Token sk-first",
        b"Bearer sk-first sk-second",
        b"Bearer sk-first,sk-second",
        b"Bearer \xff\xfe",
        "Bearer ｓk-first".encode(),
        b"Bearer sk-first\xa0x",
        b"Bearer " + b"x" * 10_000,
    ],
)
def test_anything_else_does_not(value: bytes) -> None:
    found = call(around(keys=[KEY, OTHER_KEY]), headers=key(value))
    assert found.status == 401
    assert found.json["error"]["code"] == "invalid_api_key"
    assert found.headers["www-authenticate"] == "Bearer"
    assert KEY not in found.body.decode()


def test_a_key_is_asked_for_where_none_is_sent() -> None:
    found = call(around(keys=[KEY]))
    assert found.status == 401
    assert "Authorization: Bearer KEY" in found.json["error"]["message"]


OPEN_AND_NOT = [
    ("/open/below", 200),
    ("/open/", 404),
    ("/open/../", 404),
    ("/open/elsewhere", 404),
    ("/exact", 404),
    ("/open", 401),
    ("/openly", 401),
    ("/exact/below", 401),
    ("/exactly", 401),
    ("//open/below", 401),
    ("/OPEN/below", 401),
    ("/x/open/below", 401),
    ("/", 401),
    ("", 401),
]
"""404: it came as far as the application, which has nothing there."""


@pytest.mark.parametrize(("path", "status"), OPEN_AND_NOT)
def test_open_paths_need_none(path: str, status: int) -> None:
    assert call(around(keys=[KEY], open_paths=["/open/", "/exact"]), path).status == status


@pytest.mark.parametrize(("path", "status"), OPEN_AND_NOT)
def test_the_first_page_opens_no_other(path: str, status: int) -> None:
    """It ends in "/" as well."""
    expected = 200 if path == "/" else status
    assert call(around(keys=[KEY], open_paths=["/", "/open/", "/exact"]), path).status == expected


# Sizes and times of bodies


def announced(value: str) -> list[tuple[bytes, bytes]]:
    return [*host(b"localhost"), (b"content-length", value.encode())]


CHUNKED = [*host(b"localhost"), (b"transfer-encoding", b"chunked")]


def test_a_body_may_be_as_large_as_the_limit() -> None:
    for headers in (announced("1000"), CHUNKED):
        found = call(around(), headers=headers, method="POST", bodies=[b"x" * 400, b"x" * 600])
        assert (found.status, found.json["bytes"]) == (200, 1000)


def test_a_larger_one_is_refused() -> None:
    for headers in (
        announced("1001"),
        announced("5"),
        CHUNKED,
        announced("-5"),
        announced("x"),
        announced("1e3"),
    ):
        found = call(around(), headers=headers, method="POST", bodies=[b"x" * 400, b"x" * 601])
        assert found.status == 413
        assert found.json["error"]["code"] == "too_large"


@pytest.mark.parametrize("length", ["9" * 30, "9" * 5000, str(2**64), str(10**9)])
def test_what_announces_too_much_is_refused_before_it_comes(
    length: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_LINGER_SECONDS", 0.1)
    found = call(around(), headers=announced(length), method="POST", bodies=[b"x", b"never"][:1] * 2)
    assert found.status == 413


@pytest.mark.parametrize("length", ["-5", "", "five", "0x10", "²", "٣", "1e3", " 3"])
def test_a_length_that_is_none_counts_for_nothing(length: str) -> None:
    headers = [*host(b"localhost"), (b"content-length", length.encode("utf-8"))]
    assert call(around(), headers=headers, method="POST", bodies=[b"abc"]).json["bytes"] == 3


# Pages elsewhere


def origin(value: bytes, *more: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    return [*host(b"localhost"), (b"origin", value), *more]


ASKS = (b"access-control-request-method", b"POST")


@pytest.mark.parametrize("path", ["/", "/refuse", "/nothing"])
def test_pages_elsewhere_may_read_only_where_they_are_known(path: str) -> None:
    app = around(origins=["https://known.example"])
    for value in (
        b"https://evil.example",
        b"null",
        b"https://known.example.evil.example",
        b"http://known.example",
        b"*",
    ):
        found = call(app, path, headers=origin(value))
        assert not [name for name in found.headers if name.startswith("access-control")]
        assert found.headers["cross-origin-resource-policy"] == "same-origin"
    found = call(app, path, headers=origin(b"https://known.example"))
    assert found.headers["access-control-allow-origin"] == "https://known.example"
    assert found.headers["cross-origin-resource-policy"] == "cross-origin"
    assert found.headers["vary"].lower() == "origin"


def test_preflights() -> None:
    app = around(origins=["https://known.example"], keys=[KEY])
    found = call(app, headers=origin(b"https://known.example", ASKS), method="OPTIONS")
    assert found.status == 204
    assert found.headers["access-control-allow-origin"] == "https://known.example"
    assert "POST" in found.headers["access-control-allow-methods"]
    assert {"authorization", "content-type"} <= {*found.headers["access-control-allow-headers"].split(", ")}
    assert "access-control-allow-credentials" not in found.headers
    refused = call(app, headers=origin(b"https://evil.example", ASKS), method="OPTIONS")
    assert refused.status == 403
    assert not [name for name in refused.headers if name.startswith("access-control")]
    # Without what makes it a preflight it is a request as any other.
    assert call(app, headers=origin(b"https://known.example"), method="OPTIONS").status == 401
    assert call(app, headers=origin(b"https://known.example", ASKS), method="GET").status == 401


def test_a_star_lets_every_page_ask() -> None:
    found = call(around(origins=["*"]), headers=origin(b"https://any.example"))
    assert found.headers["access-control-allow-origin"] == "https://any.example"


# What every answer carries


@pytest.mark.parametrize(
    ("path", "headers", "method", "status"),
    [
        ("/", None, "GET", 200),
        ("/", None, "HEAD", 200),
        ("/nothing", None, "GET", 404),
        ("/", None, "DELETE", 405),
        ("/refuse", None, "GET", 429),
        ("/fail", None, "GET", 500),
        ("/sleep", None, "GET", 504),
        ("/", host(b"evil.example"), "GET", 421),
        ("/", announced("5000"), "POST", 413),
        ("/", origin(b"https://evil.example", ASKS), "OPTIONS", 403),
    ],
)
def test_every_answer_has_the_headers_of_safety(path: str, headers: Any, method: str, status: int) -> None:
    found = call(around(), path, headers, method, [b"x" * 5000] if method == "POST" else None)
    assert found.status == status
    for name, value in SECURITY.items():
        assert found.headers[name].startswith(value)


def test_the_headers_of_safety_need_a_key_no_less() -> None:
    found = call(around(keys=[KEY]))
    assert found.status == 401
    assert SECURITY.keys() <= found.headers.keys()


def test_no_script_may_stand_in_a_page() -> None:
    policy = call(around()).headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "*" not in policy
    assert "frame-ancestors 'none'" in policy


def test_an_error_of_the_application_is_not_called_late() -> None:
    begin = time.monotonic()
    found = call(around(), "/fail")
    assert (found.status, found.json) == (500, {"error": "of the application's own"})
    assert time.monotonic() - begin < 1
