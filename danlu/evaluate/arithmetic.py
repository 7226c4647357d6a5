"""An arithmetic coder on integer frequency tables (Rissanen 1976; range form of Martin 1979).

A stream's state is an interval [low, low + range) of 64-bit fractions. Coding a symbol narrows it to the
symbol's share; the leading bytes that are settled are written, and a carry runs back into what was written.
Everything is integer arithmetic, so that the decoder retraces it exactly.
"""

import numba
import numpy as np

TOTAL_BITS = 24
TOTAL = 1 << TOTAL_BITS
"""Sum of each frequency table."""

_SMALL = np.uint64(1 << 48)
_TOP = np.uint64(56)
_BYTE = np.uint64(8)
_SHIFT = np.uint64(TOTAL_BITS)
_LAST = np.uint64(TOTAL - 1)


@numba.njit(cache=True)
def quantise(probabilities: np.ndarray, table: np.ndarray) -> None:
    """probabilities (V,) float32 → table (V,) int64 that sums to TOTAL, every entry at least 1.

    What rounding leaves over goes to the first most probable symbol. NaN counts as 0: a broken model codes
    badly, never wrongly.
    """
    scale = np.float64(TOTAL - len(table))
    total, best = np.int64(0), 0
    for symbol in range(len(table)):
        share = np.int64(1)
        if probabilities[symbol] > 0:
            share += np.int64(np.float64(probabilities[symbol]) * scale)
        table[symbol] = share
        total += share
        if probabilities[symbol] > probabilities[best]:
            best = symbol
    table[best] += TOTAL - total


@numba.njit(cache=True)
def new_state(n_streams: int) -> np.ndarray:
    """(n, 3) uint64: low (encoder) or code (decoder), range, bytes written or read."""
    state = np.zeros((n_streams, 3), np.uint64)
    state[:, 1] = ~np.uint64(0)
    return state


@numba.njit(cache=True)
def _encode_symbol(state: np.ndarray, out: np.ndarray, table: np.ndarray, symbol: int) -> None:
    below = np.uint64(0)
    for other in range(symbol):
        below += np.uint64(table[other])
    unit = state[1] >> _SHIFT
    low = state[0] + unit * below
    if low < state[0]:  # a carry: into the bytes already written
        at = np.int64(state[2]) - 1
        while out[at] == 255:
            out[at] = 0
            at -= 1
        out[at] += 1
    state[0] = low
    state[1] = unit * np.uint64(table[symbol])
    while state[1] < _SMALL:
        out[np.int64(state[2])] = np.uint8(state[0] >> _TOP)
        state[0] <<= _BYTE
        state[1] <<= _BYTE
        state[2] += np.uint64(1)


@numba.njit(cache=True, parallel=True)
def encode_step(
    state: np.ndarray, out: np.ndarray, probabilities: np.ndarray, symbols: np.ndarray, active: np.ndarray
) -> None:
    """One symbol of each active stream. state (N, 3), out (N, bytes), probabilities (N, V), symbols (N,)."""
    for stream in numba.prange(len(symbols)):
        if active[stream]:
            table = np.empty(probabilities.shape[1], np.int64)
            quantise(probabilities[stream], table)
            _encode_symbol(state[stream], out[stream], table, symbols[stream])


@numba.njit(cache=True)
def finish(state: np.ndarray, out: np.ndarray) -> int:
    """Writes the two bytes that single out a number in the last interval; returns the stream's length."""
    low = state[0] + (_SMALL - np.uint64(1))
    length = np.int64(state[2])
    if low < state[0]:
        at = length - 1
        while out[at] == 255:
            out[at] = 0
            at -= 1
        out[at] += 1
    out[length] = np.uint8(low >> _TOP)
    out[length + 1] = np.uint8((low >> np.uint64(48)) & np.uint64(255))
    return int(length + 2)


@numba.njit(cache=True)
def _next_byte(state: np.ndarray, raw: np.ndarray, end: int) -> np.uint64:
    at = np.int64(state[2])
    state[2] += np.uint64(1)
    return np.uint64(raw[at]) if at < end else np.uint64(0)


@numba.njit(cache=True)
def start_decoding(state: np.ndarray, raw: np.ndarray, lengths: np.ndarray) -> None:
    """Reads the first eight bytes of each stream. raw (N, bytes), lengths (N,)."""
    for stream in range(len(state)):
        for _ in range(8):
            state[stream, 0] = (state[stream, 0] << _BYTE) | _next_byte(
                state[stream], raw[stream], lengths[stream]
            )


@numba.njit(cache=True)
def _decode_symbol(state: np.ndarray, raw: np.ndarray, end: int, table: np.ndarray) -> int:
    unit = state[1] >> _SHIFT
    slot = np.int64(min(state[0] // unit, _LAST))
    symbol, below = 0, np.int64(0)
    while below + table[symbol] <= slot:
        below += table[symbol]
        symbol += 1
    state[0] -= unit * np.uint64(below)
    state[1] = unit * np.uint64(table[symbol])
    while state[1] < _SMALL:
        state[0] = (state[0] << _BYTE) | _next_byte(state, raw, end)
        state[1] <<= _BYTE
    return symbol


@numba.njit(cache=True, parallel=True)
def decode_step(
    state: np.ndarray, raw: np.ndarray, lengths: np.ndarray, probabilities: np.ndarray,
    symbols: np.ndarray, active: np.ndarray,
) -> None:  # fmt: skip
    """The inverse of `encode_step`: fills `symbols` (N,) of the active streams."""
    for stream in numba.prange(len(symbols)):
        if active[stream]:
            table = np.empty(probabilities.shape[1], np.int64)
            quantise(probabilities[stream], table)
            symbols[stream] = _decode_symbol(state[stream], raw[stream], lengths[stream], table)
