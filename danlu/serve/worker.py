"""The one thread that steps the engines, and what the event loop hears of it.

Requests come from the loop as calls that are made between two steps; after each step everything new goes back
in one message. Nothing but this thread touches an engine.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from danlu.core.errors import UserError
from danlu.generate.engine import Completion, Engine, Request
from danlu.generate.scheduler import Job, Owned

log = logging.getLogger("danlu.serve")


class Failed(Exception):
    """A fault of ours while a request was answered; the log has it."""


@dataclass
class Update:
    """What is new of an answer: `completion` up to `n_tokens` tokens, and more certain text."""

    text: str
    n_tokens: int
    done: bool = False
    error: Exception | None = None


@dataclass(eq=False)
class Ticket:
    """One answer, or the result of one program, as the event loop sees it."""

    engine: Engine
    updates: "asyncio.Queue[tuple[Ticket, Update]]" = field(default_factory=asyncio.Queue)
    """Several tickets may share one."""
    completion: Completion = field(default_factory=Completion)
    result: Any = None
    # The worker's own
    request: Request | None = None
    job: Job | None = None
    n_told: int = 0
    failure: Exception | None = None
    cancelled: bool = False


class Worker:
    """Start it, hand it work, close it. All methods but `_…` are for the event loop's thread."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = engines
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._active: list[Ticket] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="danlu-engine", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def close(self) -> None:
        """Ends the thread once its calls are made; what still runs is cancelled."""
        self._calls.put(None)
        self._thread.join()

    def submit(self, ticket: Ticket, make: Callable[[], Request]) -> None:
        """`make` submits a request to the ticket's engine; it is called by the thread."""

        def begin() -> None:
            ticket.request = make()
            ticket.completion, ticket.job = ticket.request.completion, ticket.request.job

        self._put(ticket, begin)

    def run(self, ticket: Ticket, program: Callable[[Any], Any]) -> None:
        """Runs a program of sequences; the ticket's `result` is what it returns."""

        def begin() -> None:
            sequences = Owned(ticket.engine.scheduler.lanes)
            ticket.job = Job(program(sequences), owned=sequences.owned)
            ticket.engine.scheduler.submit(ticket.job)

        self._put(ticket, begin)

    def cancel(self, ticket: Ticket) -> None:
        """Nothing happens where it has ended."""
        ticket.cancelled = True
        self._calls.put(lambda: self._cancel(ticket))

    def _put(self, ticket: Ticket, begin: Callable[[], None]) -> None:
        def call() -> None:
            if ticket.cancelled:
                return
            try:
                begin()
            except Exception as error:
                self._send([(ticket, Update("", 0, done=True, error=_told(error)))])
            else:
                self._active.append(ticket)

        self._calls.put(call)

    # The thread's side

    def _run(self) -> None:
        try:
            while self._make_calls():
                for engine in self.engines:
                    if not engine.scheduler.idle:
                        self._step(engine)
                self._tell()
            for ticket in [*self._active]:
                self._cancel(ticket)
        except Exception as error:
            # What an engine holds can't be known now: better none than a wrong answer.
            log.critical("the thread that steps the engines has failed: start the server again")
            self._send([(ticket, Update("", 0, done=True, error=_told(error))) for ticket in self._active])

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _make_calls(self) -> bool:
        """Makes the calls that wait; waits for one where there is nothing else to do. False at the end."""
        while True:
            idle = all(engine.scheduler.idle for engine in self.engines)
            try:
                call = self._calls.get(block=idle)
            except queue.Empty:
                return True
            if call is None:
                return False
            call()

    def _step(self, engine: Engine) -> None:
        try:
            engine.step()
        except Exception as error:
            log.exception("a step of the engine failed")
            own = [(ticket, ticket.job) for ticket in self._active if ticket.engine is engine and ticket.job]
            # A job whose program failed has been ended without a result; else it may be the fault of any.
            failed = [pair for pair in own if pair[1].done and not pair[1].error and pair[1].result is None]
            for ticket, job in failed or own:
                if not job.done:
                    engine.scheduler.cancel(job)
                ticket.failure = error

    def _tell(self) -> None:
        """Sends on what is new of each answer."""
        news, left = [], []
        for ticket in self._active:
            assert ticket.job is not None
            done = ticket.job.done
            n_tokens = len(ticket.completion.ids)
            text = ticket.request.take() if ticket.request is not None else ""
            if done or text or n_tokens > ticket.n_told:
                ticket.n_told = n_tokens
                ticket.result = ticket.job.result
                error = ticket.failure or ticket.job.error
                news.append((ticket, Update(text, n_tokens, done, _told(error) if error else None)))
            if not done:
                left.append(ticket)
        self._active = left
        self._send(news)

    def _cancel(self, ticket: Ticket) -> None:
        if ticket in self._active and ticket.job is not None:
            self._active.remove(ticket)
            if not ticket.job.done:
                ticket.engine.scheduler.cancel(ticket.job)

    def _send(self, news: list[tuple[Ticket, Update]]) -> None:
        if news and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, news)


def _deliver(news: list[tuple[Ticket, Update]]) -> None:
    for ticket, update in news:
        ticket.updates.put_nowait((ticket, update))


def _told(error: Exception) -> Exception:
    """What the client may hear of it."""
    if isinstance(error, UserError):
        return error
    if not isinstance(error, Failed):
        log.error("a request could not be answered", exc_info=error)
    return Failed("the server failed on this request; its log says more")
