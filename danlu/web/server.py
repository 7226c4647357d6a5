"""Running an application: on which address, with which patience, until when."""

import asyncio
import contextlib
import socket
from collections.abc import Generator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from danlu.core.errors import UserError
from danlu.web.errors import HttpError
from danlu.web.guard import HEADERS

HEADER_SECONDS = 15.0
"""For the first line and the headers of a request; uvicorn would wait for ever."""
IDLE_SECONDS = 30
"""That an open connection may wait for its next request."""
FLUSH_SECONDS = 120.0
"""For a client to take what is left of an answer that is whole; uvicorn would keep it for ever."""
MOST_CONNECTIONS = 512
"""More are told to come back; of twice as many the last ones are cut."""
MOST_HEADER_BYTES = 64 * 2**10
MOST_PIPELINED = 16
"""Requests that may wait behind the one that is answered, on the same connection."""
_FRAME_BYTES = 8
"""That a byte of the body may take beside itself: the body may come in chunks of one."""


def listen(host: str, port: int) -> socket.socket:
    """Takes the address; port 0 = any free one. Nobody is heard before the server runs.

    Raises UserError where it can't be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"host {host}: {error.strerror}", "give an address of this machine") from None
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind(address)
    except OSError as error:
        taken.close()
        raise UserError(f"{host}, port {port}: {error.strerror}", "choose another with --port") from None
    return taken


class _Protocol(HttpToolsProtocol):
    """uvicorn's, with limits on all that it would wait for, or keep, without end."""

    _timer: asyncio.TimerHandle | None = None
    """Runs until the headers are there."""
    _in_head = False
    _in_body = False
    _n_bytes = 0
    """Received of this request, less what the body makes up for: headers, trailers, frames of chunks."""
    _answered: RequestResponseCycle | None = None
    """The request that is, or was last, being answered; `cycle` is the last one that came."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > 2 * MOST_CONNECTIONS:
            transport.abort()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)
        if self._answered is not None and not self._answered.response_complete:
            # uvicorn tells the last one that came, which may wait behind this one.
            self._answered.disconnected = True
            self._answered.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._timer is None and not self._in_body:
            self._wait()
        self._n_bytes += len(data)
        super().data_received(data)
        if self._n_bytes > MOST_HEADER_BYTES:
            self._refuse(431, f"the headers are larger than {MOST_HEADER_BYTES:,} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._n_bytes = True, 0
        own: Any = {"abort": self.transport.abort, "crowded": len(self.connections) > MOST_CONNECTIONS}
        self.scope.update(own)

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        self._stop()
        super().on_headers_complete()
        if len(self.pipeline) > MOST_PIPELINED:
            self.transport.abort()

    def on_body(self, body: bytes) -> None:
        self._n_bytes -= len(body) * (1 + _FRAME_BYTES)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_body = False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(FLUSH_SECONDS, self._unless_taken)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP request")

    @property
    def _is_answering(self) -> bool:
        return self._answered is not None and not self._answered.response_complete

    def _wait(self) -> None:
        self._timer = self.loop.call_later(HEADER_SECONDS, self._late)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self._is_answering:
            self._wait()  # an answer has a limit of its own, and what comes meanwhile doesn't end it
        elif self._in_head:
            self._refuse(408, f"the headers did not come within {HEADER_SECONDS:g} seconds")
        else:
            self.transport.abort()

    def _unless_taken(self) -> None:
        if not self.transport.get_write_buffer_size():
            return
        if self._is_answering:
            self.loop.call_later(FLUSH_SECONDS, self._unless_taken)
        else:
            self.transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        """Says so, unless that would stand in the middle of an answer; and it is over."""
        if self.transport.is_closing():
            return
        if self._is_answering and self._answered is not None and self._answered.response_started:
            self.transport.abort()
            return
        told = HttpError(status, message).response()
        own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        headers = [*self.server_state.default_headers, *told.raw_headers, *own, (b"connection", b"close")]
        lines = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(STATUS_LINE[status] + lines + b"\r\n" + bytes(told.body))
        self.transport.close()
        self.loop.call_later(FLUSH_SECONDS, self.transport.abort)


class Server(uvicorn.Server):
    """Ends by itself after SIGTERM or SIGINT, once what runs is finished; a second SIGINT ends it at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        with super().capture_signals():
            yield
            self._captured_signals.clear()  # else uvicorn raises them once more


def make_server(app: ASGIApp, grace_seconds: float) -> Server:
    """`grace_seconds`: how long what runs may still take once it is told to end."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=max(1, round(grace_seconds)),
    )
    return Server(config)
