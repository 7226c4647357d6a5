"""The guard and the server over real connections: what is late, too large, broken off or no HTTP."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import pytest
from guarded import KEY, SECURITY, around
from small_servers import ask, connected, listening, read_to_end, say, status_of

from danlu.web import guard, server


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
