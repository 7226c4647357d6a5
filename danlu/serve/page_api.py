"""What only the page asks for: Markdown as safe HTML, and where its thumbs go."""

from pathlib import Path
from typing import Any

import anyio
from pydantic import Field, JsonValue
from starlette.requests import Request

from danlu.data.preferences import append_preference
from danlu.serve import schema
from danlu.serve.answers import Kitchen
from danlu.serve.api import Endpoint
from danlu.web import markdown


class MarkdownRequest(schema.Request):
    """POST /page/markdown"""

    text: str = Field(max_length=500_000)


class MarkdownResponse(schema.Response):
    html: str


class PreferenceRequest(schema.Request):
    """POST /page/preference: a row in one of the forms of `danlu/data/preferences.py`."""

    row: dict[str, JsonValue]


class PreferenceResponse(schema.Response):
    saved: str = Field(description="the file that has it now")


async def _markdown(asked: MarkdownRequest, _: Kitchen, __: Request) -> MarkdownResponse:
    return MarkdownResponse(html=await anyio.to_thread.run_sync(markdown.render, asked.text))


def endpoints(preferences: Path) -> tuple[Endpoint, ...]:
    """`preferences`: the file that rows are appended to."""
    lock = anyio.Lock()

    async def prefer(asked: PreferenceRequest, _: Kitchen, __: Request) -> PreferenceResponse:
        row: dict[str, Any] = asked.row
        async with lock:
            await anyio.to_thread.run_sync(append_preference, preferences, row)
        return PreferenceResponse(saved=preferences.name)

    return (
        Endpoint("POST", "/page/markdown", _markdown, MarkdownRequest, MarkdownResponse),
        Endpoint("POST", "/page/preference", prefer, PreferenceRequest, PreferenceResponse),
    )
