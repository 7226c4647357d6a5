"""Answers that come piece by piece, as server-sent events."""

import logging
from collections.abc import AsyncGenerator

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from danlu.serve.answers import ClientGone, unless_gone
from danlu.web.errors import HttpError

log = logging.getLogger("danlu.serve")


class EventStream(Response):
    """Sends chunks as they come, and ends the work behind them when the client goes.

    An error after the first chunk is an event too: the status has been sent by then.
    """

    def __init__(self, first: BaseModel, rest: AsyncGenerator[BaseModel, None]) -> None:
        self.status_code, self.background = 200, None
        self.first, self.rest = first, rest
        self.init_headers({"cache-control": "no-store", "content-type": "text/event-stream; charset=utf-8"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send_all(send))
        except ClientGone:
            log.info("the client of a stream has gone")
        finally:
            await self.rest.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await send(_event(_json(self.first)))
            async for chunk in self.rest:
                await send(_event(_json(chunk)))
            await send(_event("[DONE]"))
        except HttpError as error:
            await send(_event(bytes(error.response().body).decode()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _json(chunk: BaseModel) -> str:
    return chunk.model_dump_json(exclude_none=True)


def _event(data: str) -> dict[str, object]:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}
