"""Running an application: on which address, with which patience, until when."""

import asyncio
import contextlib
import socket
from collections.abc import Generator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from danlu.core.errors import UserError

HEADER_SECONDS = 15.0
"""For the first line and the headers of a request; uvicorn would wait for ever."""
IDLE_SECONDS = 30
"""That an open connection may wait for its next request."""
MOST_CONNECTIONS = 512
MOST_HEADER_BYTES = 64 * 2**10


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
    """uvicorn's, with a limit on how long the headers may take and how large they may be."""

    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _in_head = True

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            if self._timer is None:
                self._wait()
        super().data_received(data)
        if self._in_head and self._head_bytes > MOST_HEADER_BYTES:
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._stop()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True

    def _wait(self) -> None:
        self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


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
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=max(1, round(grace_seconds)),
    )
    return Server(config)
