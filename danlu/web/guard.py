"""What stands before every request: who may ask, how much, how long; and what every answer carries."""

import asyncio
import contextlib
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from danlu.web.errors import HttpError

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
"""No script or style but our own files, and no request to anywhere else, whatever a text says."""

HEADERS = {
    "content-security-policy": PAGE_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
"""Of every answer."""
_LOCAL = {"localhost", "127.0.0.1", "::1"}
_LINGER_SECONDS = 5.0
"""That a body is still read for which the answer doesn't need."""


@dataclass(frozen=True)
class Limits:
    """What one request may take."""

    body_bytes: int = 4 * 2**20
    body_seconds: float = 30
    """To send its body."""
    seconds: float = 600
    """From its first line to the last byte of its answer."""


class Guard:
    """An ASGI application around another.

    Names of hosts are checked, else any page on the web could reach a server on the visitor's own machine by
    a name of its own that means 127.0.0.1 (DNS rebinding). Numeric addresses can't be used so.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        keys: Sequence[str] = (),
        hosts: Sequence[str] = (),
        origins: Sequence[str] = (),
        open_paths: Sequence[str] = (),
    ) -> None:
        """`keys`: one of them must be sent, except for `open_paths` and what is below those that end in "/";
        "/" itself is the page there, and opens nothing else.

        `hosts`: names beside localhost that this server answers to, "*" = any. `origins`: pages elsewhere
        whose scripts may ask, "*" = any.
        """
        self.app, self.limits, self.keys = app, limits, [key.encode() for key in keys]
        self.hosts = {*_LOCAL, *(host.lower() for host in hosts)}
        self.origins, self.open_paths = set(origins), open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._origin(scope), self.limits)
        limit = asyncio.timeout(self.limits.seconds)
        try:
            async with limit:
                await self._answer(exchange, scope)
        except TimeoutError:
            if not limit.expired():
                raise
            seconds = f"{self.limits.seconds:g}"
            await exchange.refuse(HttpError(504, f"the request took more than {seconds} seconds"))

    async def _answer(self, exchange: "_Exchange", scope: Scope) -> None:
        try:
            self._check(scope)
            if self._is_preflight(scope):
                await exchange.answer_preflight()
            else:
                await self.app(scope, exchange.receive, exchange.send)
        except HttpError as error:
            await exchange.refuse(error)

    def _check(self, scope: Scope) -> None:
        if scope.get("crowded"):  # `server.py` counts connections
            raise HttpError(503, "too many connections: try again soon", headers={"retry-after": "1"})
        headers = Headers(scope=scope)
        if not self._knows(headers.get("host", "")):
            raise HttpError(
                421, "this server does not answer to that name", code="unknown_host", param="Host"
            )
        path = scope["path"]
        # "/" is the page alone: all paths are below it.
        below = tuple(one for one in self.open_paths if one.endswith("/") and one != "/")
        is_open = path in self.open_paths or path.startswith(below)
        if not self.keys or is_open or self._is_preflight(scope):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        matches = [hmac.compare_digest(key, given.strip().encode()) for key in self.keys]
        if scheme.lower() != "bearer" or not any(matches):
            told = "wrong API key" if given else "an API key is needed: Authorization: Bearer KEY"
            raise HttpError(401, told, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        scope["client_key"] = given.strip()

    def _knows(self, host: str) -> bool:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        name = name.strip("[]").lower()
        if "*" in self.hosts or name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _origin(self, scope: Scope) -> str | None:
        """The page elsewhere that asks, where it may."""
        origin = Headers(scope=scope).get("origin")
        return origin if origin and ("*" in self.origins or origin in self.origins) else None

    def _is_preflight(self, scope: Scope) -> bool:
        asks = "access-control-request-method" in Headers(scope=scope)
        return scope["method"] == "OPTIONS" and asks


class _Exchange:
    """One request and its answer."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, origin: str | None, limits: Limits
    ) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self.origin, self.limits = origin, limits
        self.started = self.whole = self.late = False
        self.n_bytes = 0
        self.deadline = asyncio.get_running_loop().time() + limits.body_seconds
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        self.announced = int(length[:20]) if length.isascii() and length.isdigit() else 0
        self.has_body = self.announced > 0 or "transfer-encoding" in headers
        self.waits = headers.get("expect", "").lower() == "100-continue"
        """The client sends its body only once it is asked for."""

    async def receive(self) -> Message:
        if self.whole:
            return await self._receive()  # only that the client has gone
        if self.announced > self.limits.body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self._read()
        except TimeoutError:
            self.late = True
            seconds = f"{self.limits.body_seconds:g}"
            raise HttpError(408, f"the body did not come within {seconds} seconds") from None
        if self.n_bytes > self.limits.body_bytes:
            raise self._too_large()
        return message

    async def _read(self) -> Message:
        self.waits = False
        message = await self._receive()
        self.n_bytes += len(message.get("body", b""))
        self.whole = not message.get("more_body", False)
        return message

    def _too_large(self) -> HttpError:
        told = f"the body is larger than {self.limits.body_bytes:,} bytes"
        return HttpError(413, told, code="too_large")

    async def _linger(self) -> None:
        """Reads on for a while: a client that still sends would not see the answer."""
        with contextlib.suppress(TimeoutError):  # it is told then, and cut off
            async with asyncio.timeout(_LINGER_SECONDS):
                while not self.whole and self.n_bytes < 16 * self.limits.body_bytes:
                    await self._read()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self.has_body and not self.whole and not self.late and not self.waits:
                await self._linger()
            self.started = True
            headers = MutableHeaders(scope=message)
            if self.has_body and not self.whole:
                headers["connection"] = "close"  # else it could go on sending for ever
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            if self.origin:
                headers["access-control-allow-origin"] = self.origin
                headers["cross-origin-resource-policy"] = "cross-origin"
                headers.add_vary_header("origin")
        await self._send(message)

    async def answer_preflight(self) -> None:
        if self.origin is None:
            raise HttpError(403, "scripts of that page may not ask here", code="unknown_origin")
        headers = [
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", b"authorization, content-type"),
            (b"access-control-max-age", b"600"),
        ]
        await self.send({"type": "http.response.start", "status": 204, "headers": headers})
        await self.send({"type": "http.response.body"})

    async def refuse(self, error: HttpError) -> None:
        """Says so where nothing has been said yet; else, or where nobody listens, cuts the connection."""
        if not self.started:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2 * _LINGER_SECONDS):
                    await error.response()(self._scope, self._receive, self.send)
                return
        abort: Any = self._scope.get("abort")
        if abort is not None:
            abort()
