"""Files of a page: HTML, scripts, styles. What pages share lies in `web/static`."""

from pathlib import Path

from starlette.responses import FileResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

SHARED = Path(__file__).with_name("static")


class _Fresh(StaticFiles):
    """Asked again each time: after an update no browser goes on with an old script."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_fresh(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"cache-control", b"no-cache")]
            await send(message)

        await super().__call__(scope, receive, send_fresh)


def page_routes(folder: Path, index: str = "index.html") -> list[Route | Mount]:
    """The page at "/", its own files below /static, the shared ones below /shared."""

    async def page(_: object) -> FileResponse:
        return FileResponse(folder / index, headers={"cache-control": "no-cache"})

    return [
        Route("/", page),
        Mount("/static", _Fresh(directory=folder)),
        Mount("/shared", _Fresh(directory=SHARED)),
    ]
