"""Answers in the making, on the event loop's side: several choices together, watched and counted."""

import asyncio
import codecs
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from starlette.types import Receive

from danlu.core.errors import UserError
from danlu.generate.engine import Completion, PromptTooLong
from danlu.generate.sampling import SamplingParams
from danlu.serve import schema
from danlu.serve.metrics import Metrics
from danlu.serve.served import Catalogue, Served
from danlu.serve.worker import Failed, Ticket, Update, Worker
from danlu.tokens.tokenizer import Tokenizer
from danlu.web.errors import HttpError

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


@dataclass
class Kitchen:
    """What all endpoints share."""

    catalogue: Catalogue
    worker: Worker
    metrics: Metrics
    most_pending: int = 256
    """Answers that may be unfinished at a time; more are refused."""
    default_tokens: int | None = None
    """Longest answer of a chat where the request names none; None = what the context leaves."""
    pending: int = 0
    ending: bool = False

    def count(self, n: int) -> None:
        """So many more are unfinished."""
        self.pending += n
        self.metrics.pending.set(self.pending)

    def admit(self, n: int) -> None:
        """Raises HttpError where too much is unfinished."""
        if self.ending:
            raise HttpError(503, "the server is ending", headers={"retry-after": "30"})
        if not self.worker.alive:
            raise HttpError(503, "the server's engine has failed: it must be started again")
        if n > self.most_pending:
            raise HttpError(400, f"{n} answers at once, and at most {self.most_pending} are given")
        if self.pending + n > self.most_pending:
            raise HttpError(
                429,
                f"{self.pending} answers are unfinished, and {self.most_pending} may be: try again soon",
                code="queue_full",
                headers={"retry-after": "1"},
            )


@dataclass(frozen=True)
class Order:
    """One answer that is wanted."""

    ids: list[int]
    params: SamplingParams


@dataclass
class Choice:
    """What has come of one answer."""

    order: Order
    completion: Completion = field(default_factory=Completion)
    text: str = ""
    n_tokens: int = 0
    done: bool = False
    first: float = 0.0
    last: float = 0.0


class Batch:
    """Several answers to one request: `async with` submits them, and cancels what it leaves unfinished."""

    def __init__(
        self, kitchen: Kitchen, served: Served, orders: list[Order], *, is_reply: bool, salt: str
    ) -> None:
        self.kitchen, self.served, self.is_reply, self.salt = kitchen, served, is_reply, salt
        self.choices = [Choice(order) for order in orders]
        self.begin = time.monotonic()
        self._tickets: list[Ticket] = []
        self._updates: asyncio.Queue[tuple[Ticket, Update]] = asyncio.Queue()

    async def __aenter__(self) -> "Batch":
        self.kitchen.admit(len(self.choices))
        self.kitchen.count(len(self.choices))
        engine = self.served.engine
        for choice in self.choices:
            ticket = Ticket(engine, self._updates)
            order, adapter = choice.order, self.served.adapter

            def make(order: Order = order, adapter: str | None = adapter) -> Any:
                return engine.submit(order.ids, order.params, adapter, is_reply=self.is_reply, salt=self.salt)

            self.kitchen.worker.submit(ticket, make)
            self._tickets.append(ticket)
        return self

    async def __aexit__(self, *_: object) -> None:
        for ticket, choice in zip(self._tickets, self.choices, strict=True):
            if not choice.done:
                self.kitchen.worker.cancel(ticket)
                self._end(choice, "cancelled")

    def _end(self, choice: Choice, reason: str) -> None:
        choice.done = True
        self.kitchen.count(-1)
        metrics = self.kitchen.metrics
        metrics.answers.labels(reason).inc()
        metrics.prompt_tokens.inc(len(choice.order.ids))
        metrics.generated_tokens.inc(choice.n_tokens)
        if choice.first and reason != "cancelled":
            metrics.whole.observe(time.monotonic() - self.begin)
            if choice.n_tokens > 1:
                metrics.per_token.observe((choice.last - choice.first) / (choice.n_tokens - 1))

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """(number of the choice, what is new) until all are whole. Raises UserError, HttpError."""
        left = len(self.choices)
        while left:
            ticket, update = await self._updates.get()
            number = self._tickets.index(ticket)
            choice = self.choices[number]
            if update.error is not None:
                self._end(choice, "error")
                raise _as_http(update.error)
            choice.completion = ticket.completion
            if update.n_tokens and not choice.first:
                choice.first = time.monotonic()
                self.kitchen.metrics.first_token.observe(choice.first - self.begin)
            if update.n_tokens > choice.n_tokens:
                choice.last = time.monotonic()
            choice.text += update.text
            choice.n_tokens = update.n_tokens
            if update.done:
                self._end(choice, ticket.completion.finish_reason)
                left -= 1
            yield number, update

    async def whole(self) -> list[Choice]:
        async for _ in self.updates():
            pass
        return self.choices

    def usage(self, n_prompts: int = 1) -> schema.Usage:
        """Where the choices are those of `n_prompts` prompts, in their order: each prompt counts once."""
        per_prompt = len(self.choices) // n_prompts
        prompts = sum(len(choice.order.ids) for choice in self.choices[::per_prompt])
        answers = sum(choice.n_tokens for choice in self.choices)
        return schema.Usage(prompt_tokens=prompts, completion_tokens=answers, total_tokens=prompts + answers)


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


async def run_program(kitchen: Kitchen, served: Served, program: Callable[[Any], Any]) -> Any:
    """What a program of the engine returns."""
    kitchen.admit(1)
    ticket = Ticket(served.engine)
    kitchen.count(1)
    kitchen.worker.run(ticket, program)
    try:
        while True:
            _, update = await ticket.updates.get()
            if update.error is not None:
                raise _as_http(update.error)
            if update.done:
                return ticket.result
    finally:
        kitchen.count(-1)
        kitchen.worker.cancel(ticket)


def _as_http(error: Exception) -> HttpError:
    if isinstance(error, UserError):
        return user_error(error)
    return HttpError(500, str(error) if isinstance(error, Failed) else "the server failed on this request")


def user_error(error: UserError) -> HttpError:
    """A fault of the request that the engine or a renderer found."""
    told = f"{error.message}: {error.remedy}" if error.remedy else error.message
    too_long = isinstance(error, PromptTooLong)
    return HttpError(400, told, code="context_length_exceeded" if too_long else None)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T] | Awaitable[T]) -> T:
    """The result of `work`; it is cancelled as soon as the client is gone. Raises ClientGone then."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# Tokens as texts


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as it is shown: a special one by its name, part of a character by its bytes."""
    if name := _special_names(tokenizer).get(token):
        return name
    data = tokenizer.token_bytes[token] if token < len(tokenizer.token_bytes) else b""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@lru_cache(maxsize=8)
def _special_names(tokenizer: Tokenizer) -> dict[int, str]:
    return {number: name for name, number in tokenizer.special_ids.items()}


def offsets(tokenizer: Tokenizer, tokens: list[int], begin: int = 0) -> list[int]:
    """Where in the text each token begins, in characters."""
    decoder, found, at = codecs.getincrementaldecoder("utf-8")("replace"), [], begin
    for token in tokens:
        found.append(at)
        at += len(decoder.decode(tokenizer.decode_bytes([token])))
    return found
