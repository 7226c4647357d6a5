"""Progress with an ETA: a live line on a terminal, a plain line per interval elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

T = TypeVar("T")

_PLAIN_INTERVAL = 10.0
_LIVE_INTERVAL = 0.1


class Progress:
    """Reports how far a long job is, on stderr.

    Use as a context manager; call `update(done, loss=…)` as often as you like.
    `total` is in `unit`s; None where it is not known.
    """

    def __init__(self, label: str, total: int | None, unit: str = "steps") -> None:
        self.label, self.total, self.unit = label, total, unit
        self.live = sys.stderr.isatty()
        self.start = self.last = time.monotonic()
        self.first = self.done = 0
        self.fields: dict[str, Any] = {}

    def __enter__(self) -> "Progress":
        return self

    def begin_at(self, done: int) -> None:
        """Starts counting at `done` (a resumed run), so that the ETA is right."""
        self.first = self.done = done

    def update(self, done: int, **fields: Any) -> None:
        self.done, self.fields = done, fields
        now = time.monotonic()
        if now - self.last >= (_LIVE_INTERVAL if self.live else _PLAIN_INTERVAL):
            self.last = now
            self._print(end="\r" if self.live else "\n")

    def say(self, text: str) -> None:
        """Prints a line without breaking the live one."""
        clear = "\r\x1b[K" if self.live else ""
        print(f"{clear}{text}", file=sys.stderr, flush=True)

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            self._print(end="\n")
        elif self.live:
            print(file=sys.stderr)

    def _print(self, end: str) -> None:
        elapsed = time.monotonic() - self.start
        rate = (self.done - self.first) / elapsed if elapsed > 0 else 0.0
        parts = [f"{self.label}  {self.done:,}"]
        if self.total is not None:
            parts[0] += f"/{self.total:,}"
        parts[0] += f" {self.unit}"
        parts += [f"{name} {_short(value)}" for name, value in self.fields.items()]
        parts.append(f"{rate:,.1f} {self.unit}/s" if rate < 100 else f"{rate:,.0f} {self.unit}/s")
        if self.total is not None and rate > 0 and self.done < self.total:
            parts.append(f"ETA {clock((self.total - self.done) / rate)}")
        else:
            over = self.total is None or self.done >= self.total
            parts.append(f"took {clock(elapsed)}" if over else f"{clock(elapsed)} so far")
        print("\r\x1b[K" * self.live + " · ".join(parts), file=sys.stderr, end=end, flush=True)


def track(items: Iterable[T], label: str, total: int | None = None, unit: str = "items") -> Iterator[T]:
    """Yields the items, reporting progress."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(label, total, unit) as progress:
        for count, item in enumerate(items, 1):
            yield item
            progress.update(count)


def clock(seconds: float) -> str:
    """ "3:07" or "1:02:45"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
