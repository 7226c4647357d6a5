"""What stands before every request: names, keys, sizes, times, and what every answer carries."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from small_servers import Answer, ask, connected, listening, read_to_end, say, status_of
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Scope

from danlu.web import guard, server
from danlu.web.errors import HttpError
from danlu.web.guard import Guard, Limits

KEY, OTHER_KEY = "sk-first", "sk-second"
LIMITS = Limits(body_bytes=1000, body_seconds=0.5, seconds=1.5)
SECURITY = {
    "content-security-policy": "default-src 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


async def _length(http: Request) -> Response:
    return JSONResponse({"bytes": len(await http.body()), "key": http.scope.get("client_key")})


async def _unread(http: Request) -> Response:
    return JSONResponse({"unread": True}, 415)


async def _sleep(http: Request) -> Response:
    await asyncio.sleep(30)
    return Response()


async def _pieces(http: Request) -> Response:
    async def pieces() -> Any:
        yield b"begun"
        await asyncio.sleep(30)
        yield b"never"

    return StreamingResponse(pieces())


async def _fail(http: Request) -> Response:
    raise TimeoutError("of the application's own")


async def _refuse(http: Request) -> Response:
    raise HttpError(429, "too much")


async def _much(http: Request) -> Response:
    return Response(b"x" * 2**25)


async def _told(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 500)


async def _in_form(_: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return error.response()


INNER = Starlette(
    routes=[
        Route("/", _length, methods=["GET", "POST"]),
        Route("/open/below", _length),
        Route("/unread", _unread, methods=["POST"]),
        Route("/sleep", _sleep),
        Route("/pieces", _pieces),
        Route("/fail", _fail),
        Route("/refuse", _refuse),
        Route("/much", _much),
    ],
    exception_handlers={Exception: _told, HttpError: _in_form},
)


def around(**options: Any) -> Guard:
    return Guard(INNER, **{"limits": LIMITS, **options})


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


# Over real connections


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "HEADER_SECONDS", 0.5)
        patch.setattr(server, "IDLE_SECONDS", 1)
        patch.setattr(server, "FLUSH_SECONDS", 1.0)
        patch.setattr(guard, "_LINGER_SECONDS", 0.5)
        open_paths = ["/", "/sleep", "/pieces", "/unread", "/much"]
        with listening(around(keys=[KEY], open_paths=open_paths)) as found:
            yield found


@pytest.fixture(autouse=True)
def _still_serves(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did to it, the server answers the next request."""
    yield
    if "port" in request.fixturenames:
        assert ask(request.getfixturevalue("port"), "/").status == 200


def assert_is_refusal(data: bytes, status: int) -> None:
    """An answer in the API's form, with the headers of safety, after which the connection is closed."""
    assert status_of(data) == status, data[:200]
    head, _, body = data.partition(b"\r\n\r\n")
    names = {line.partition(b":")[0].decode().lower() for line in head.split(b"\r\n")[1:]}
    assert SECURITY.keys() <= names
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["message"]


def within(seconds: float, begin: float) -> bool:
    """Far less than the connection's own patience, and some time for a busy machine."""
    return time.monotonic() - begin < seconds + 5


def test_the_body_has_its_time_as_a_whole(port: int) -> None:
    """A byte now and then doesn't make it longer."""
    begin = time.monotonic()
    with connected(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n")
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while time.monotonic() - begin < 20:
                connection.sendall(b"x")
                time.sleep(0.1)
                connection.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    if connection.recv(1, socket.MSG_PEEK) is not None:
                        break
                connection.settimeout(20)
        connection.settimeout(20)
        assert_is_refusal(read_to_end(connection), 408)
    assert within(0.5, begin)


def test_a_body_that_nobody_waits_for_does_not_hold_the_connection(port: int) -> None:
    """The answer is there long before the body is: a client that sends on for ever is cut off."""
    begin = time.monotonic()
    with connected(port) as connection:
        connection.sendall(b"POST /unread HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while time.monotonic() - begin < 20:
                connection.sendall(b"1\r\nx\r\n")
                time.sleep(0.05)
        data = read_to_end(connection)
    assert within(0.5, begin)
    assert status_of(data) in (0, 415)


@pytest.mark.parametrize("size", [10, 900, 15_000])
def test_a_body_that_comes_is_no_reason_to_close(port: int, size: int) -> None:
    """Refused without a look at it, or as too large: the next request on the same connection is answered."""
    path = b"/" if size > 1000 else b"/unread"
    asked = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (path, size) + b"x" * size
    found = say(port, asked + b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert status_of(found) == (413 if size > 1000 else 415)
    assert found.count(b"HTTP/1.1 200 OK") == 1


def test_a_client_that_asks_first_is_told_before_it_sends(port: int) -> None:
    asked = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n"
    assert_is_refusal(say(port, asked % (b"/", 5000)), 413)
    assert_is_refusal(say(port, asked % (b"/refuse", 500)), 401)
    with connected(port) as connection:
        connection.sendall(asked % (b"/", 500))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"x" * 500)
        assert status_of(connection.recv(1000)) == 200


def test_too_long_a_body_without_an_end(port: int) -> None:
    asked = (
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"400\r\n"
        + b"x" * 1024
        + b"\r\n"
    )
    begin = time.monotonic()
    assert_is_refusal(say(port, asked), 413)
    assert within(0.5, begin)


def test_a_request_has_its_time(port: int) -> None:
    begin = time.monotonic()
    found = ask(port, "/sleep")
    assert found.status == 504
    assert within(1.5, begin)


def test_an_answer_that_takes_too_long_is_cut(port: int) -> None:
    begin = time.monotonic()
    data = say(port, b"GET /pieces HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert status_of(data) == 200
    assert b"begun" in data
    assert not data.endswith(b"0\r\n\r\n")  # so that nobody takes it for whole
    assert within(1.5, begin)


def test_an_answer_that_nobody_reads_is_cut(port: int) -> None:
    begin = time.monotonic()
    with connected(port, receives=4096) as connection:
        connection.sendall(b"GET /much HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(3)
        data = read_to_end(connection)
    assert status_of(data) == 200
    assert len(data) < 2**25
    assert within(3, begin)


def test_a_slow_reader_gets_all_of_it(port: int) -> None:
    with connected(port, receives=2**17) as connection:
        connection.sendall(b"GET /much HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        time.sleep(0.3)
        assert len(read_to_end(connection)) > 2**25


def test_silent_connections_are_closed(port: int) -> None:
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(port)) for _ in range(20)]
        assert ask(port, "/").status == 200  # meanwhile
        assert [read_to_end(one) for one in silent] == [b""] * 20
    assert within(0.5, begin)


def test_idle_connections_are_closed(port: int) -> None:
    begin = time.monotonic()
    found = say(port, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert status_of(found) == 200
    assert within(1, begin)


@pytest.mark.parametrize(
    "begun", [b"G", b"GET / HTTP/1.1\r\nHost: loc", b"GET / HTTP/1.1\r\nHost: localhost\r\n"]
)
def test_half_a_head_is_told_that_it_is_late(port: int, begun: bytes) -> None:
    begin = time.monotonic()
    assert_is_refusal(say(port, begun), 408)
    assert within(0.5, begin)


def test_a_head_that_dribbles_in_is_late_too(port: int) -> None:
    begin = time.monotonic()
    with connected(port) as connection, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        while time.monotonic() - begin < 20:
            connection.sendall(b"X: y\r\n")
            time.sleep(0.05)
    assert within(0.5, begin)


def test_what_comes_behind_a_request_does_not_end_its_answer(port: int) -> None:
    """Some clients send a line end too many; the time for headers is shorter than the answer takes."""
    data = say(port, b"GET /sleep HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n\r\n")
    assert status_of(data) == 504


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 10**6 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
        b"GET /" + b"x" * 10**6 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X" * 10**6,
    ],
    ids=["line", "many", "path", "name"],
)
def test_headers_without_end(port: int, data: bytes) -> None:
    begin = time.monotonic()
    assert status_of(say(port, data)) in (0, 431)
    assert within(0, begin)


def test_headers_somewhat_too_large_are_told(port: int) -> None:
    """More than the limit, and few enough that none is left unread, which would lose the answer."""
    data = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 66_000
    with connected(port) as connection:
        connection.sendall(data[:10])
        time.sleep(0.1)
        connection.sendall(data[10:])
        assert_is_refusal(read_to_end(connection), 431)


def test_trailers_without_end(port: int) -> None:
    begin = time.monotonic()
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX: "
    data = say(port, head + b"y" * 5 * 10**6)
    assert status_of(data) in (0, 431)
    assert within(0, begin)


def test_a_body_in_chunks_of_one_byte_is_read(port: int) -> None:
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    data = say(port, head + b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n")
    assert status_of(data) == 200
    assert data.endswith(b'{"bytes":1000,"key":null}')


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
        b"\x00\x01\x02\xff" * 100,
        b"hello\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / FTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    ],
)
def test_what_is_no_http_is_told_so(port: int, data: bytes) -> None:
    begin = time.monotonic()
    assert_is_refusal(say(port, data), 400)
    assert within(0, begin)


def test_old_http(port: int) -> None:
    """0.9 has no headers, so no name; 1.0 is closed after the answer."""
    assert status_of(say(port, b"GET /\r\n\r\n")) in (0, 400, 421)
    assert status_of(say(port, b"GET / HTTP/1.0\r\n\r\n")) == 421
    assert status_of(say(port, b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")) == 200


def test_pipelined_requests_are_answered_in_their_order(port: int) -> None:
    asked = [b"GET %s HTTP/1.1\r\nHost: localhost\r\n" % path for path in (b"/", b"/refuse", b"/") * 3]
    data = say(port, b"\r\n".join(asked) + b"Connection: close\r\n\r\n")
    assert [status_of(b"HTTP/1.1 " + part) for part in data.split(b"HTTP/1.1 ")[1:]] == [200, 401, 200] * 3


def test_too_many_pipelined_requests_are_not_kept(port: int) -> None:
    begin = time.monotonic()
    with connected(port) as connection, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        connection.sendall(b"GET /sleep HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50_000)
        read_to_end(connection)
    assert time.monotonic() - begin < 1.4 + 5


def test_more_connections_than_are_allowed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_CONNECTIONS", 10)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(port)) for _ in range(10)]
        for one in held:
            one.sendall(b"GET /sleep HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.3)
        crowded = ask(port, "/")
        assert (crowded.status, crowded.headers["retry-after"]) == (503, "1")
        assert SECURITY.keys() <= crowded.headers.keys()
        more = [stack.enter_context(connected(port)) for _ in range(10)]
        assert ask_or_nothing(port) == 0
        assert [status_of(read_to_end(one)) for one in more] == [0] * 10
    time.sleep(0.2)


def ask_or_nothing(port: int) -> int:
    try:
        return ask(port, "/").status
    except (ConnectionError, OSError):
        return 0


@pytest.mark.parametrize("told", [b"websocket", b"h2c"])
def test_an_upgrade_is_not_made(port: int, told: bytes) -> None:
    asked = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n" % told
    assert status_of(say(port, asked)) == 200
