"""What the benchmarks have in common: contestants in processes of their own, and what is said of a race."""

import multiprocessing
import sys
import time
from collections.abc import Callable
from math import comb
from multiprocessing.connection import Connection
from typing import Any

import psutil

from danlu.core.host import peak_rss_bytes

Work = Callable[..., Any]
"""What a contestant does with what it is asked."""


class Absent(SystemExit):
    """Why a contestant can't take part; where nobody catches it, the benchmark ends with it."""


class Contestant:
    """A process that sleeps until it is asked, seen from outside.

    `make(*arguments)` is called there and returns its work; both are sent there, so `make` stands at the top
    of its file. Raises Absent, with the reason, where that fails.
    """

    def __init__(self, name: str, make: Callable[..., Work], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_answer, args=(make, arguments, theirs), daemon=True)
        self.process.start()
        theirs.close()
        try:
            reason = self.connection.recv()
        except EOFError:
            reason = "its process died"
        if reason is not None:
            self.process.join()
            raise Absent(f"{name} can't take part: {reason}")

    def ask(self, *asked: Any) -> tuple[float, Any]:
        """The seconds that its work took, and what came of it."""
        self.connection.send(asked)
        seconds, answer = self.connection.recv()
        return seconds, answer

    def stop(self) -> None:
        self.connection.send(None)
        self.connection.close()
        self.process.join()


def _answer(make: Callable[..., Work], arguments: tuple[Any, ...], connection: Connection) -> None:
    """The main function of a contestant's process."""
    sys.stdout = sys.stderr
    try:
        work = make(*arguments)
    except Exception as error:  # a program that isn't here, or can't do this, is named by the controller
        connection.send(f"{type(error).__name__}: {error}".splitlines()[0])
        return
    connection.send(None)
    while (asked := connection.recv()) is not None:
        start = time.perf_counter()
        answer = work(*asked)
        connection.send((time.perf_counter() - start, answer))


class Turn:
    """A training loop's side of the pipe: called before each step, it waits until steps are asked for.

    The loop says when its imports are done, `imported()`: memory is counted from there.
    """

    def __init__(self, connection: Connection, device: str) -> None:
        self.connection, self.device = connection, device
        self.left = self.resident = 0
        self.start: float | None = None
        self.said: list[Any] = []

    def imported(self) -> None:
        self.resident = psutil.Process().memory_info().rss

    def __call__(self, said: Any = None) -> bool:
        """`said`: of the step before. Returns False where the loop is to end."""
        if said is not None:
            self.said.append(said)
        if self.left == 0:
            if self.device == "cuda":
                import torch

                torch.cuda.synchronize()
                if self.start is None:
                    torch.cuda.reset_peak_memory_stats()
            if self.start is not None:
                self.connection.send((time.perf_counter() - self.start, self.said, self._memory()))
            self.said = []
            self.left = self.connection.recv()
            self.start = time.perf_counter()
        self.left -= 1
        return self.left >= 0

    def _memory(self) -> int:
        """The peak, above the resident size after imports; on a GPU the most that was allocated."""
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated()
        return peak_rss_bytes() - self.resident


class Loop:
    """A training loop in a process of its own, that sleeps until steps are asked for, seen from outside.

    `run(*arguments, turn)` is called there and calls `turn` before each step; it stands at its file's top.
    """

    def __init__(self, name: str, device: str, run: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.connection, theirs = context.Pipe()
        # Not daemonic: torch.compile starts processes of its own.
        self.process = context.Process(target=_loop, args=(run, arguments, theirs, device))
        self.process.start()
        theirs.close()

    def steps(self, n: int) -> tuple[float, list[Any], int]:
        """Runs `n` steps: their seconds, what each said, and the peak of memory in bytes."""
        try:
            self.connection.send(n)
            seconds, said, memory = self.connection.recv()
        except (EOFError, ConnectionError):
            raise Absent(f"{self.name} can't take part: its process died") from None
        return seconds, said, memory

    def stop(self) -> None:
        self.connection.send(0)
        self.connection.close()
        self.process.join()


def _loop(run: Callable[..., None], arguments: tuple[Any, ...], connection: Connection, device: str) -> None:
    """The main function of a loop's process."""
    sys.stdout = sys.stderr
    try:
        run(*arguments, Turn(connection, device))
    except EOFError:  # the controller has gone
        return


class Quietness:
    """Share of the processor's time that went to processes other than this run's."""

    def __init__(self) -> None:
        self.begin = self._now()

    def _now(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        me = psutil.Process()
        own = sum(t.user + t.system for p in [me, *me.children(recursive=True)] for t in [p.cpu_times()])
        return sum(times), sum(times) - times.idle - times.iowait, own

    def others(self) -> float:
        total, busy, own = (now - then for now, then in zip(self._now(), self.begin, strict=True))
        return max(0.0, busy - own) / total


def median_interval(values: list[float]) -> tuple[float, float]:
    """Order statistics that hold the median with a probability of at least 95 % (sign test).

    With 7 values these are the smallest and the largest (98.4 %); with fewer than 6 they hold it less often.
    """
    values, n, drop = sorted(values), len(values), 0
    while 2 * sum(comb(n, k) for k in range(drop + 2)) / 2**n <= 0.05:
        drop += 1
    return values[drop], values[n - 1 - drop]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
