"""Servers in a thread of the tests' own process, and what speaks to them: whole requests and bare sockets."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_models import save_random_model
from starlette.types import ASGIApp

from danlu.serve.app import App, make_app
from danlu.serve.config import ServeConfig
from danlu.serve.serve import load, warm_up
from danlu.tokens.bpe import train_bpe
from danlu.web.server import listen, make_server

CONTEXT = 1024


@contextlib.contextmanager
def listening(app: ASGIApp) -> Iterator[int]:
    """The port at which the application answers until the end of the block."""
    with contextlib.closing(listen("127.0.0.1", 0)) as taken:
        server = make_server(app, grace_seconds=1)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[taken])))
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield taken.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    port: int,
    path: str,
    body: Any = None,
    *,
    method: str = "",
    headers: dict[str, str] | None = None,
    seconds: float = 30,
) -> Answer:
    """An ordinary request: POST where there is a body; one that isn't bytes is sent as JSON."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    kind = {} if body is None else {"Content-Type": "application/json"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)) as connection:
        connection.request(
            method or ("GET" if body is None else "POST"), path, data, {**kind, **(headers or {})}
        )
        found = connection.getresponse()
        named = {name.lower(): value for name, value in found.getheaders()}
        return Answer(found.status, named, found.read())


@contextlib.contextmanager
def connected(port: int, seconds: float = 30, receives: int = 0) -> Iterator[socket.socket]:
    """A bare connection. `receives`: bytes that the system takes before anybody reads."""
    with socket.socket() as connection:
        if receives:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
        connection.settimeout(seconds)
        connection.connect(("127.0.0.1", port))
        yield connection


def read_to_end(connection: socket.socket) -> bytes:
    """All that comes until the server closes. Raises TimeoutError where it doesn't."""
    found = bytearray()
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while data := connection.recv(2**16):
            found += data
    return bytes(found)


def say(port: int, data: bytes, seconds: float = 30) -> bytes:
    """What comes back for some bytes until the server closes. Raises TimeoutError where it doesn't."""
    with connected(port, seconds) as connection:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(data)
        return read_to_end(connection)


def status_of(data: bytes) -> int:
    """Of the answer that begins here; 0 = the connection was closed without one."""
    return int(data.split(b" ", 2)[1]) if data.startswith(b"HTTP/1.1 ") else 0


def save_tiny_chat_model(folder: Path) -> None:
    """Random weights, a tokenizer of 400 entries and a chat template, as every model lies on disk."""
    texts = [
        "The furnace is hot, and the alchemist waits for the gold.\n",
        "丹炉里的火很旺。",
        "Fire 🔥 and glass 🧪!\n",
    ]
    tokenizer = train_bpe(texts * 4, 330)
    save_random_model(folder, tokenizer, noise=0.2, max_positions=CONTEXT, tied_embeddings=False)


def tiny_app(folder: Path, **options: Any) -> App:
    """What `danlu serve` runs, of a tiny model that is called "tiny"; its thumbs go into the folder."""
    save_tiny_chat_model(folder / "tiny")
    values = {"dtype": "float32", "cache_gb": 0.1, "preferences": folder / "preferences.jsonl", **options}
    config = ServeConfig(model=(f"tiny={folder / 'tiny'}",), **values)
    catalogue = load(config)
    warm_up(catalogue)
    return make_app(config, catalogue)
