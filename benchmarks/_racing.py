"""What the benchmarks have in common: contestants in processes of their own, and what is said of a race."""

import multiprocessing
import sys
import time
from collections.abc import Callable
from math import comb
from multiprocessing.connection import Connection
from typing import Any

import psutil

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
