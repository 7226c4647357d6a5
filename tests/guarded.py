"""An application behind the guard that can do all that tests of the guard ask for."""

import asyncio
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

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
