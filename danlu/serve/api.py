"""The API's endpoints in one table, and what `/openapi.json` says of them."""

import base64
import hashlib
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import numpy as np
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from danlu import __version__
from danlu.core.config import nearest
from danlu.core.errors import UserError
from danlu.generate.engine import embedding
from danlu.serve import chat, completions, params, schema
from danlu.serve.answers import ClientGone, Kitchen, run_program, token_text, unless_gone, user_error
from danlu.serve.served import Served
from danlu.serve.streams import EventStream
from danlu.web.errors import HttpError

R = TypeVar("R", bound=BaseModel)

MOST_FAULTS = 1000
"""Of one request that are looked at: pydantic makes a report of each."""


@dataclass(frozen=True)
class Endpoint:
    """A row of the API."""

    method: str
    path: str
    answer: Callable[..., Awaitable[Any]]
    """(what is asked, kitchen, HTTP request) -> a response's model, or a Response."""
    asks: type[BaseModel] | None
    answers: type[BaseModel] | None
    chunk: type[BaseModel] | None = None
    """Where it can stream: what each event holds."""


async def _chat(asked: schema.ChatRequest, kitchen: Kitchen, http: Request) -> Any:
    served = kitchen.catalogue.find(asked.model)
    kitchen.admit(asked.n or 1)
    understood = await _in_thread(chat.understand, asked, served, kitchen)
    batch = chat.batch_of(understood, kitchen, _salt(asked, http))
    if asked.stream:
        return await _stream(chat.pieces(understood, batch), http)
    return await unless_gone(http.receive, chat.whole(understood, batch))


async def _complete(asked: schema.CompletionRequest, kitchen: Kitchen, http: Request) -> Any:
    served = kitchen.catalogue.find(asked.model)
    kitchen.admit(completions.count(asked))
    understood = await _in_thread(completions.understand, asked, served)
    batch = completions.batch_of(understood, kitchen, _salt(asked, http))
    if asked.stream:
        return await _stream(completions.pieces(understood, batch), http)
    return await unless_gone(http.receive, completions.whole(understood, batch))


async def _stream(pieces: Any, http: Request) -> EventStream:
    """Waits for the first piece, so that what can't be answered still gets a status of its own."""
    try:
        first = await unless_gone(http.receive, anext(pieces))
    except BaseException:
        await pieces.aclose()
        raise
    return EventStream(first, pieces)


async def _embed(asked: schema.EmbeddingRequest, kitchen: Kitchen, http: Request) -> schema.EmbeddingResponse:
    served = kitchen.catalogue.find(asked.model)
    width = served.engine.model.config.width
    if asked.dimensions not in (None, width):
        raise HttpError(400, f"dimensions: the model's vectors have {width}", param="dimensions")
    if served.adapter is not None:
        raise HttpError(400, "embeddings come from the base model only", param="model")
    inputs: list[Any] = asked.input  # type: ignore[assignment]
    if isinstance(inputs, str) or isinstance(inputs[0], int):
        inputs = [inputs]

    def tokenise() -> list[list[int]]:
        found = [served.engine.prompt_ids(one) for one in inputs]
        for ids in found:
            served.engine.check_prompt(ids, room=0)
        return found

    ids = await _in_thread(tokenise)
    rows = []

    async def compute() -> None:
        for tokens in ids:
            rows.append(await run_program(kitchen, served, embedding(tokens)))

    await unless_gone(http.receive, compute())
    n_tokens = sum(map(len, ids))
    as_text = asked.encoding_format == "base64"
    return schema.EmbeddingResponse(
        data=[
            schema.Embedding(index=index, embedding=_base64(row.numpy()) if as_text else row.tolist())
            for index, row in enumerate(rows)
        ],
        model=served.name,
        usage=schema.Usage(prompt_tokens=n_tokens, total_tokens=n_tokens),
    )


def _base64(row: np.ndarray) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


async def _models(_: None, kitchen: Kitchen, __: Request) -> schema.ModelList:
    return schema.ModelList(data=[_card(served) for served in kitchen.catalogue.models])


def _card(served: Served) -> schema.ModelCard:
    return schema.ModelCard(
        id=served.name,
        created=served.created,
        root=served.ref,
        parent=served.parent,
        max_model_len=served.context,
        chats=bool(served.tokenizer.chat_template),
    )


async def _tokenize(asked: schema.TokenizeRequest, kitchen: Kitchen, _: Request) -> schema.TokenizeResponse:
    served = kitchen.catalogue.find(asked.model)
    tokenizer = served.tokenizer

    def find_ids() -> list[int]:
        if asked.prompt is not None:
            return (
                served.engine.prompt_ids(asked.prompt)
                if asked.add_special_tokens
                else tokenizer.encode(asked.prompt)
            )
        ids, _ = params.render(asked.messages or [], params.plain_tools(asked.tools or []), tokenizer)
        return ids

    def tokenise() -> schema.TokenizeResponse:
        ids = find_ids()
        texts = [token_text(tokenizer, token) for token in ids] if asked.return_token_strs else None
        return schema.TokenizeResponse(
            count=len(ids), max_model_len=served.context, tokens=ids, token_strs=texts
        )

    return await _in_thread(tokenise)


async def _detokenize(
    asked: schema.DetokenizeRequest, kitchen: Kitchen, _: Request
) -> schema.DetokenizeResponse:
    served = kitchen.catalogue.find(asked.model)
    size = served.engine.model.config.vocab_size
    if wrong := [token for token in asked.tokens if token >= size]:
        raise HttpError(400, f"tokens: {wrong[0]} is no token, 0 to {size - 1}", param="tokens")
    return schema.DetokenizeResponse(prompt=await _in_thread(served.tokenizer.decode, asked.tokens))


async def _health(_: None, kitchen: Kitchen, __: Request) -> Response:
    status: Any = "ok" if kitchen.worker.alive else "failed"
    status = "ending" if kitchen.ending else status
    return _json(schema.Health(status=status), 200 if status == "ok" else 503)


ENDPOINTS = (
    Endpoint(
        "POST", "/v1/chat/completions", _chat, schema.ChatRequest, schema.ChatResponse, schema.ChatChunk
    ),
    Endpoint(
        "POST",
        "/v1/completions",
        _complete,
        schema.CompletionRequest,
        schema.CompletionResponse,
        schema.CompletionResponse,
    ),
    Endpoint("POST", "/v1/embeddings", _embed, schema.EmbeddingRequest, schema.EmbeddingResponse),
    Endpoint("GET", "/v1/models", _models, None, schema.ModelList),
    Endpoint("POST", "/tokenize", _tokenize, schema.TokenizeRequest, schema.TokenizeResponse),
    Endpoint("POST", "/detokenize", _detokenize, schema.DetokenizeRequest, schema.DetokenizeResponse),
    Endpoint("GET", "/health", _health, None, schema.Health),
)


def routes(kitchen: Kitchen, endpoints: tuple[Endpoint, ...] = ENDPOINTS) -> list[Route]:
    return [Route(row.path, _handler(row, kitchen), methods=[row.method]) for row in endpoints]


def _handler(row: Endpoint, kitchen: Kitchen) -> Callable[[Request], Awaitable[Response]]:
    async def handle(http: Request) -> Response:
        try:
            asked = await _read(row.asks, http) if row.asks else None
            found = await row.answer(asked, kitchen, http)
        except UserError as error:
            raise user_error(error) from None
        except (ClientGone, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it
        return found if isinstance(found, Response) else _json(found)

    return handle


async def _read(cls: type[R], http: Request) -> R:
    """What is asked. Raises HttpError for what isn't that."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Anything else a page on the web could send without asking first.
        raise HttpError(415, "send JSON, with the header Content-Type: application/json")
    body = await http.body()
    try:
        return cls.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error, cls) from None


def _invalid(error: ValidationError, cls: type[BaseModel]) -> HttpError:
    """The first faults, each with its place, unless there are too many to be listed by anybody."""
    if error.error_count() > MOST_FAULTS:
        return HttpError(400, f"this is no request: {error.error_count():,} faults")
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    told = []
    for fault in faults[:5]:
        place = ".".join(str(part) for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            known = cls.model_fields if len(fault["loc"]) == 1 else None
            message = "is not known here" + (nearest(place, known) if known else "")
        told.append(f"{place}: {message}" if place else message)
    first = faults[0]["loc"]
    return HttpError(400, "; ".join(told)[:2000], param=str(first[0])[:100] if first else None)


def _json(found: BaseModel, status: int = 200) -> Response:
    return Response(found.model_dump_json(), status, media_type="application/json")


def _salt(asked: schema.Sampling, http: Request) -> str:
    """Who may use whose computed prefixes: those with the same key and salt."""
    key = http.scope.get("client_key", "")
    if not key and not asked.cache_salt:
        return ""
    return hashlib.sha256(repr((key, asked.cache_salt)).encode()).hexdigest()


_threads = anyio.CapacityLimiter(2)


async def _in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Tokenising a long text would hold up everybody else."""
    return await anyio.to_thread.run_sync(function, *arguments, limiter=_threads)


def openapi(endpoints: tuple[Endpoint, ...] = ENDPOINTS) -> dict[str, Any]:
    """OpenAPI 3.1, made of the types that requests are checked with."""
    inputs: list[Any] = [(row.asks, "validation") for row in endpoints if row.asks]
    outputs: list[Any] = [
        (cls, "serialization")
        for row in endpoints
        for cls in (row.answers, row.chunk, schema.ErrorResponse)
        if cls
    ]
    names, definitions = models_json_schema([*inputs, *outputs], ref_template="#/components/schemas/{model}")
    names = dict(names)
    fault = {"application/json": {"schema": names[schema.ErrorResponse, "serialization"]}}
    paths: dict[str, Any] = {}
    for row in endpoints:
        content: dict[str, Any] = {}
        if row.answers:
            content["application/json"] = {"schema": names[row.answers, "serialization"]}
        if row.chunk:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        about: dict[str, Any] = {
            "operationId": row.answer.__name__.strip("_"),
            "responses": {
                "200": {"description": "the answer", "content": content},
                "4XX": {"description": "what is wrong with the request", "content": fault},
                "5XX": {"description": "what is wrong with the server", "content": fault},
            },
        }
        if row.asks:
            about["summary"] = inspect.getdoc(row.asks)
            about["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": names[row.asks, "validation"]}},
            }
        paths.setdefault(row.path, {})[row.method.lower()] = about
    return {
        "openapi": "3.1.0",
        "info": {"title": "danlu", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }
