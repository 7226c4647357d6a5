"""`danlu eval annotate`: a page on which people label texts, or compare answers; see `annotation.py`."""

import asyncio
import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from danlu.core.errors import UserError
from danlu.core.files import atomic_write
from danlu.core.show import console
from danlu.evaluate.annotation import Study, read_items
from danlu.evaluate.config import AnnotateConfig
from danlu.web.errors import HttpError
from danlu.web.guard import Guard, Limits
from danlu.web.pages import page_routes
from danlu.web.server import listen, make_server

PAGE = Path(__file__).with_name("annotate_page")


class Answer(BaseModel):
    """POST /api/answer"""

    model_config = ConfigDict(extra="forbid")

    rater: str = Field(min_length=1, max_length=100)
    item: int
    value: JsonValue
    seconds: float = Field(0, ge=0)


class Rater(BaseModel):
    """POST /api/undo"""

    model_config = ConfigDict(extra="forbid")

    rater: str = Field(min_length=1, max_length=100)


def annotate(config: AnnotateConfig) -> dict[str, Any]:
    """Serves the page until Ctrl-C; then writes what there is, where `export` names a file."""
    items = read_items(config.items, config.kind)
    database = config.db or config.items.with_suffix(".sqlite")
    study = Study(database, config.kind, config.labels, items)
    keys = tuple(filter(None, [os.environ.get("DANLU_API_KEY")]))
    try:
        with contextlib.closing(listen(config.host, config.port)) as taken:
            server = make_server(make_app(study, config, keys), 5)
            out = console()
            out.print(f"{len(items)} items; answers are kept in {database}")
            out.print(f"  open  http://localhost:{taken.getsockname()[1]}/", soft_wrap=True)
            out.print("Ctrl-C ends it; the same command goes on.")
            asyncio.run(server.serve(sockets=[taken]))
        if config.export is not None:
            with atomic_write(config.export) as file:
                for row in study.export():
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return {**study.result(), "db": str(database)}
    finally:
        study.close()


def make_app(study: Study, config: AnnotateConfig, keys: tuple[str, ...] = ()) -> Guard:
    async def about(_: Request) -> Any:
        return {
            "kind": study.kind,
            "labels": study.labels,
            "question": config.question,
            "guideline": config.guideline,
        }

    async def following(http: Request) -> Any:
        return study.next(_rater(http))

    async def answer(http: Request) -> Any:
        asked = await _read(Answer, http)
        study.answer(asked.rater.strip(), asked.item, asked.value, asked.seconds)
        return study.next(asked.rater.strip())

    async def undo(http: Request) -> Any:
        rater = (await _read(Rater, http)).rater.strip()
        item = study.undo(rater)
        return {**study.next(rater), "undone": item}

    async def result(_: Request) -> Any:
        return study.result()

    async def export(_: Request) -> Response:
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in study.export())
        named = {"content-disposition": 'attachment; filename="annotations.jsonl"'}
        return Response(rows, media_type="application/jsonl", headers=named)

    routes = [
        Route("/api/study", _json(about)),
        Route("/api/next", _json(following)),
        Route("/api/answer", _json(answer), methods=["POST"]),
        Route("/api/undo", _json(undo), methods=["POST"]),
        Route("/api/result", _json(result)),
        Route("/api/export", export),
        *page_routes(PAGE),
    ]
    handlers: dict[Any, Any] = {HttpError: _refuse, HTTPException: _not_here}
    return Guard(
        Starlette(routes=routes, exception_handlers=handlers),
        limits=Limits(body_bytes=2**20, seconds=60),
        keys=keys,
        hosts=[config.host],
        open_paths=("/", "/static/", "/shared/"),
    )


def _rater(http: Request) -> str:
    name = http.query_params.get("rater", "").strip()
    if not 0 < len(name) <= 100:
        raise HttpError(400, "say who rates: ?rater=NAME", param="rater")
    return name


async def _read(cls: Any, http: Request) -> Any:
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HttpError(415, "send JSON, with the header Content-Type: application/json")
    try:
        return cls.model_validate_json(await http.body())
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise HttpError(400, f"{place}: {fault['msg']}", param=place[:100] or None) from None


def _json(answer: Callable[[Request], Any]) -> Callable[[Request], Any]:
    async def handle(http: Request) -> Response:
        try:
            return JSONResponse(await answer(http), headers={"cache-control": "no-store"})
        except UserError as error:
            raise HttpError(400, f"{error.message}: {error.remedy}") from None

    return handle


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return error.response()


async def _not_here(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return HttpError(error.status_code, f"there is nothing at {http.url.path[:200]}").response()
