"""The application: the API, the page, metrics, and what stands around them."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from danlu.serve import api, metrics, page_api
from danlu.serve.answers import Kitchen
from danlu.serve.config import ServeConfig
from danlu.serve.served import Catalogue
from danlu.serve.worker import Worker
from danlu.web.errors import HttpError
from danlu.web.guard import Guard, Limits
from danlu.web.pages import page_routes

log = logging.getLogger("danlu.serve")
PAGE = Path(__file__).with_name("page")
OPEN_PATHS = ("/", "/health", "/openapi.json", "/static/", "/shared/")
"""What needs no key: nothing of a model or a user is in it."""


def make_app(config: ServeConfig, catalogue: Catalogue, keys: tuple[str, ...] = ()) -> "App":
    kitchen = Kitchen(
        catalogue,
        Worker(catalogue.engines),
        metrics.Metrics(catalogue),
        most_pending=config.max_pending,
        default_tokens=config.max_tokens or None,
    )
    endpoints = (*api.ENDPOINTS, *page_api.endpoints(config.preferences))
    described = api.openapi(endpoints)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        kitchen.worker.start(asyncio.get_running_loop())
        yield
        await asyncio.to_thread(kitchen.worker.close)

    async def openapi(_: Request) -> Response:
        return JSONResponse(described)

    async def measured(_: Request) -> Response:
        return Response(kitchen.metrics.text(), media_type=metrics.CONTENT_TYPE)

    inner = Starlette(
        routes=[
            *api.routes(kitchen, endpoints),
            Route("/openapi.json", openapi),
            Route("/metrics", measured),
            *page_routes(PAGE),
        ],
        lifespan=lifespan,
        exception_handlers={HttpError: _refuse, HTTPException: _not_here, Exception: _failed},
    )
    guard = Guard(
        inner,
        limits=Limits(body_bytes=int(config.max_body_mb * 2**20), seconds=config.timeout),
        keys=keys,
        hosts=[*config.allow_host, config.host],
        origins=config.allow_origin,
        open_paths=OPEN_PATHS,
    )
    return App(guard, kitchen, {row.path for row in endpoints} | {"/", "/openapi.json", "/metrics"})


class App:
    """The whole, with requests counted by path and status; paths that aren't ours are one."""

    def __init__(self, app: ASGIApp, kitchen: Kitchen, paths: set[str]) -> None:
        self.app, self.kitchen, self.paths = app, kitchen, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = "none"

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            if scope["type"] == "http":
                named = scope["path"] if scope["path"] in self.paths else "other"
                self.kitchen.metrics.requests.labels(named, status).inc()


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return error.response()


async def _not_here(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = {404: f"there is nothing at {http.url.path[:200]}", 405: f"not with {http.method}"}
    found = HttpError(error.status_code, told.get(error.status_code, error.detail))
    found.headers.update(error.headers or {})
    return found.response()


async def _failed(_: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error)
    return HttpError(500, "the server failed on this request; its log says more").response()
