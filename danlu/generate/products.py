"""Products with few tokens, bound by memory: each weight is read once, and multiplied with all of them.

A matrix (rows, D) lies as it is, or, with one more axis, as `pairs` says; so do the activations that are
multiplied with it. All sums have one order, whatever else is computed in the same call.

Functions that raise NotImplementedError are names only: numba compiles what `overload` says for each layout.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import prange, types
from numba.extending import overload, register_jitable

from danlu.generate.jit import kernel
from danlu.generate.numbers import wide
from danlu.generate.pairs import put_pairs, times_pairs
from danlu.generate.vectors import LANES, dots1, dots2, dots4

ROWS = 8
"""Of a matrix, that stay in the nearest cache while all tokens are multiplied with them."""


@register_jitable
def times_rows(w: Any, factors: Any, begin: int, end: int, x: Any, y: Any) -> None:
    """y (N, rows)[:, begin:end] = x (N, D) times these rows; a number's bits are the same for every N."""
    n, width = x.shape
    rest = width & (LANES - 1)  # numbers that fill no vector; of 4 bits there are none
    for low in range(begin, end, ROWS):
        high = min(low + ROWS, end)
        for t in range(0, n - 3, 4):
            for row in range(low, high):
                dots4(w, factors, row, x, t, y)
        if n & 2:
            for row in range(low, high):
                dots2(w, factors, row, x, n & ~3, y)
        if n & 1:
            for row in range(low, high):
                dots1(w, factors, row, x, n - 1, y)
        if rest:
            for row in range(low, high):
                factor = factors[row, 0] if factors.shape[0] > 1 else np.float32(1)
                for t in range(n):
                    for i in range(width - rest, width):
                        y[t, row] += wide(w[row, i]) * factor * x[t, i]


def rows_of(w: Any) -> int:
    """How many rows a matrix has."""
    return len(w) * (LANES if w.ndim == 3 else 1)


@overload(rows_of, strict=False)
def _rows_of(w: Any) -> Callable[..., Any]:
    return (lambda w: len(w) * LANES) if w.ndim == 3 else (lambda w: len(w))


def share(w: Any, n_rows: int, part: int, parts: int) -> tuple[int, int]:
    """Which of `n_rows` rows of a matrix a part computes."""
    raise NotImplementedError


@overload(share, strict=False)
def _share(w: Any, n_rows: Any, part: Any, parts: Any) -> Callable[..., Any]:
    step = LANES if w.ndim == 3 else 1

    def found(w: Any, n_rows: int, part: int, parts: int) -> tuple[int, int]:
        return part * (n_rows // step) // parts * step, (part + 1) * (n_rows // step) // parts * step

    return found


def times(w: Any, factors: Any, begin: int, end: int, x: Any, y: Any) -> None:
    """y (N, rows)[:, begin:end] = x (N, D) times these rows."""
    raise NotImplementedError


@overload(times, strict=False)
def _times(w: Any, factors: Any, begin: Any, end: Any, x: Any, y: Any) -> Callable[..., Any]:
    if w.ndim == 3:
        return lambda w, factors, begin, end, x, y: times_pairs(w, factors, begin, end, x, y)
    return lambda w, factors, begin, end, x, y: times_rows(w, factors, begin, end, x, y)


def room(w: Any, n: int, width: int) -> Any:
    """What is multiplied with w: (n, width)."""
    raise NotImplementedError


@overload(room, strict=False)
def _room(w: Any, n: Any, width: Any) -> Callable[..., Any]:
    if w.ndim == 3:
        return lambda w, n, width: np.empty((n, width), np.uint16)
    return lambda w, n, width: np.empty((n, width), np.float32)


def put(x: Any, t: int, begin: int, line: Any) -> None:
    """x[t, begin:] = line, in the order that x lies in."""
    raise NotImplementedError


@overload(put, strict=False)
def _put(x: Any, t: Any, begin: Any, line: Any) -> Callable[..., Any]:
    if x.dtype == types.uint16:
        return lambda x, t, begin, line: put_pairs(x, t, begin, line)

    def as_it_is(x: Any, t: int, begin: int, line: Any) -> None:
        for i in range(len(line)):
            x[t, begin + i] = line[i]

    return as_it_is


@kernel()
def product(w: Any, factors: Any, x: Any, y: Any, parts: int) -> None:
    """y (N, rows) = x (N, D) Wᵀ, in `parts` parallel parts."""
    n_rows = rows_of(w)
    taken = room(w, len(x), x.shape[1])
    for t in range(len(x)):
        put(taken, t, 0, x[t])
    for part in prange(parts):
        begin, end = share(w, n_rows, part, parts)
        times(w, factors, begin, end, taken, y)
