"""What can be had of a server without its key: the page and its files, nothing of a model."""

import asyncio
from typing import Any

import pytest
from starlette.responses import PlainTextResponse

from danlu.serve.app import OPEN_PATHS
from danlu.web.guard import Guard, Limits


def status_of(path: str, key: str = "") -> int:
    guard = Guard(PlainTextResponse("here"), limits=Limits(), keys=["secret"], open_paths=OPEN_PATHS)
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), *([(b"authorization", f"Bearer {key}".encode())] if key else [])]
    asyncio.run(guard({"type": "http", "method": "GET", "path": path, "headers": headers}, receive, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize("path", ["/", "/health", "/openapi.json", "/static/main.js", "/shared/base.css"])
def test_the_page_is_open(path: str) -> None:
    assert status_of(path) == 200


API = ["/v1/models", "/v1/chat/completions", "/page/markdown", "/page/preference", "/metrics", "/tokenize"]
ALMOST_OPEN = ["/static", "/shared", "/healthy", "//v1/models"]


@pytest.mark.parametrize("path", [*API, *ALMOST_OPEN])
def test_all_else_needs_the_key(path: str) -> None:
    assert status_of(path) == 401
    assert status_of(path, "wrong") == 401
    assert status_of(path, "secret") == 200
