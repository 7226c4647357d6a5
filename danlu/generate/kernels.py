"""The loops of decoding on a processor, compiled by numba when they are first called, without a compiler.

All sums have one order, whatever else is computed in the same call: that is the deterministic mode.

Shapes: N tokens, D width, H query heads, G key-value heads, E width of a head, P positions in a block (16).
The cache is keys (blocks, G, E, P) and values (blocks, G, P, E), so that no product needs a sum across a
vector's lanes.
"""

import math
from typing import Any

import numpy as np
from numba import prange
from numba.extending import register_jitable

from danlu.generate.jit import kernel
from danlu.generate.numbers import float_of_bits, narrow, wide
from danlu.generate.products import put, room, rows_of, share, times
from danlu.generate.threads import wait_for_all
from danlu.generate.vectors import (
    LANES,
    add_rows1,
    add_rows2,
    add_rows3,
    add_rows4,
    prefetch,
)

POSITIONS = LANES
"""In a block of the cache: a vector of them."""
AHEAD = 2
"""Blocks between the one that attention reads and the one that it fetches."""

# Sums may be taken in the order of a vector's lanes; NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}


@register_jitable(fastmath=FAST)
def exp(x: Any) -> Any:
    """e^x in float32 to 2 units in the last place, for x ≤ 0: a polynomial that vectorises."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(0.5)
    y = y * r * r + r + np.float32(1.0)
    return y * float_of_bits(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@register_jitable(fastmath=FAST)
def silu(x: Any) -> Any:
    """x / (1 + e^-x)."""
    e = exp(-abs(x))
    return x / (np.float32(1.0) + e) if x >= 0 else x * e / (np.float32(1.0) + e)


# Attention


@register_jitable(fastmath=FAST | {"nnan"})
def highest(x: Any, begin: int, end: int) -> Any:
    """The largest of x[begin:end]; where NaN is among them any number, and what is made with it is NaN."""
    top = np.float32(-np.inf)
    for i in range(begin, end):
        top = max(top, x[i])
    return top


@register_jitable
def add_rows(a: Any, a_at: int, m: Any, n: int, y: Any, y_at: int) -> None:
    """y[h, y_at:] += Σ a[h, a_at + k] · m[k] over the first n rows of m, for each line h."""
    lines = len(a)
    for h in range(0, lines - 3, 4):
        add_rows4(a, a_at, m, n, y, y_at, h)
    rest = lines & 3
    if rest == 3:
        add_rows3(a, a_at, m, n, y, y_at, lines - 3)
    elif rest == 2:
        add_rows2(a, a_at, m, n, y, y_at, lines - 2)
    elif rest == 1:
        add_rows1(a, a_at, m, n, y, y_at, lines - 1)


@register_jitable(fastmath=FAST)
def attend_one(
    q: Any,
    keys: Any,
    values: Any,
    table: Any,
    last: int,
    first: int,
    scale: Any,
    softcap: Any,
    slopes: Any,
    group: int,
    scores: Any,
    out: Any,
) -> None:
    """Heads q (heads, E) of one token, which share keys and values, over the positions first … last.

    `scores` (heads, ≥ positions) is scratch; `slopes` (heads,): ALiBi's, or none. Writes out (heads, E).
    """
    heads, e = q.shape
    begin, end = first // POSITIONS, last // POSITIONS + 1
    n, skipped, seen = (end - begin) * POSITIONS, first - begin * POSITIONS, last + 1 - begin * POSITIONS
    for h in range(heads):
        for j in range(n):
            scores[h, j] = 0
    for b in range(begin, end):
        # Blocks lie anywhere in memory: those that come next are fetched while this one is read.
        ahead = b + AHEAD
        if ahead < end:
            prefetch(keys[table[ahead], group])
        elif ahead - end + begin < end:
            prefetch(values[table[ahead - end + begin], group])
        add_rows(q, 0, keys[table[b], group], e, scores, (b - begin) * POSITIONS)
    for h in range(heads):
        line = scores[h]
        if softcap > 0:
            for j in range(n):
                line[j] = np.float32(math.tanh(line[j] * scale / softcap)) * softcap
        else:
            for j in range(n):
                line[j] *= scale
        if len(slopes):
            for j in range(n):
                line[j] -= slopes[h] * np.float32(seen - 1 - j)
        top = highest(line, skipped, seen)
        for j in range(n):
            line[j] = exp(line[j] - top)
        # What lies before the window doesn't count; what lies behind the last token was never written.
        for j in range(skipped):
            line[j] = 0
        total = np.float32(0)
        for j in range(seen):
            total += line[j]
        factor = np.float32(1) / total
        for j in range(seen):
            line[j] *= factor
        for i in range(e):
            out[h, i] = 0
    whole = e & ~(LANES - 1)
    for b in range(begin, end):
        at = (b - begin) * POSITIONS
        count = min(POSITIONS, seen - at)
        v = values[table[b], group]
        if b + AHEAD < end:
            prefetch(values[table[b + AHEAD], group])
        add_rows(scores, at, v, count, out, 0)
        for i in range(whole, e):  # numbers that fill no vector
            for h in range(heads):
                for j in range(count):
                    out[h, i] += scores[h, at + j] * wide(v[j, i])


@kernel()
def attend(
    q: Any,
    keys: Any,
    values: Any,
    tables: Any,
    rows: Any,
    positions: Any,
    window: int,
    scale: Any,
    softcap: Any,
    slopes: Any,
    out: Any,
) -> None:
    """Attention of q (N, H, E) float32 over a paged cache.

    tables (sequences, blocks) int32; rows (N,): each token's sequence; positions (N,). A query sees the
    positions up to its own, `window` of them (0 = all). slopes (H,) or none. Writes out (N, H, E) float32.
    """
    n_groups = keys.shape[1]
    heads = q.shape[1] // n_groups
    for task in prange(len(q) * n_groups):
        t, group = task // n_groups, task % n_groups
        last = positions[t]
        first = max(0, last + 1 - window) if window else 0
        begin, end = group * heads, (group + 1) * heads
        attend_one(
            q[t, begin:end],
            keys,
            values,
            tables[rows[t]],
            last,
            first,
            scale,
            softcap,
            slopes[begin:end] if len(slopes) else slopes,
            group,
            np.empty((heads, last - first + 2 * POSITIONS), np.float32),
            out[t, begin:end],
        )


# Numbers by numbers, and rows by rows: the same whatever stands beside them


@kernel(fastmath=FAST)
def log_sums(x: Any, y: Any) -> None:
    """y (N,) float64 = log Σ exp of each row of x (N, V) float32."""
    n, width = x.shape
    for t in prange(n):
        top = highest(x[t], 0, width)
        total: Any = np.float64(0)
        for begin in range(0, width, 256):
            part = np.float32(0)
            for i in range(begin, min(begin + 256, width)):
                part += exp(x[t, i] - top)
            total += np.float64(part)
        y[t] = top + math.log(total) if top > -np.inf and top < np.inf else top * 0.0


GELU, GELU_TANH, SILU, RELU, TANH = range(5)


@kernel()
def activate(kind: int, x: Any) -> None:
    """An activation of x (N,) float32, in place."""
    for i in prange(len(x)):
        v = x[i]
        if kind == GELU:
            x[i] = np.float32(0.5) * v * (np.float32(1) + np.float32(math.erf(v * np.float32(0.70710678))))
        elif kind == GELU_TANH:
            inner = np.float32(0.79788456) * (v + np.float32(0.044715) * v * v * v)
            x[i] = np.float32(0.5) * v * (np.float32(1) + np.float32(math.tanh(inner)))
        elif kind == SILU:
            x[i] = v / (np.float32(1) + np.float32(math.exp(-v)))
        elif kind == RELU:
            x[i] = max(v, np.float32(0))
        else:
            x[i] = np.float32(math.tanh(v))


# A whole pass of a model of LLaMA's kind, for few tokens


@register_jitable(fastmath=FAST)
def rms_norm(x: Any, w: Any, eps: Any, y: Any) -> None:
    """y = x / √(mean(x²) + ε) · w."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    factor = np.float32(1) / np.sqrt(total / np.float32(len(x)) + eps)
    for i in range(len(x)):
        y[i] = x[i] * factor * w[i]


@register_jitable(fastmath=FAST)
def turn(x: Any, cos: Any, sin: Any) -> None:
    """Rotates the pairs (x_i, x_{i + n}) in place."""
    n = len(cos)
    for i in range(n):
        a, b = x[i], x[i + n]
        x[i] = a * cos[i] - b * sin[i]
        x[i + n] = b * cos[i] + a * sin[i]


@register_jitable
def turn_and_write(
    line: Any,
    group: int,
    heads: int,
    head_norms: Any,
    eps: Any,
    cos: Any,
    sin: Any,
    turns: bool,
    keys: Any,
    values: Any,
    slot: int,
) -> None:
    """Norms and rotates a group's queries and key in line ((H + 2 G) E,), in place.

    The key and the value go to `slot` of a block: keys (E, P), values (P, E).
    """
    e = len(keys)
    n_groups = len(line) // e // (heads + 2)
    for head in range(group * heads, (group + 1) * heads):
        q = line[head * e : (head + 1) * e]
        if head_norms.shape[0]:
            rms_norm(q, head_norms[0], eps, q)
        if turns:
            turn(q, cos, sin)
    k = line[(n_groups * heads + group) * e : (n_groups * heads + group + 1) * e]
    v = line[(n_groups * (heads + 1) + group) * e : (n_groups * (heads + 1) + group + 1) * e]
    if head_norms.shape[0]:
        rms_norm(k, head_norms[1], eps, k)
    if turns:
        turn(k, cos, sin)
    for i in range(e):
        keys[i, slot] = narrow(k[i], keys)
        values[slot, i] = narrow(v[i], values)


@kernel()
def decode(
    x: Any,
    norms: Any,
    eps: Any,
    qkv: Any,
    qkv_scale: Any,
    qkv_bias: Any,
    out: Any,
    out_scale: Any,
    gate_up: Any,
    gate_up_scale: Any,
    down: Any,
    down_scale: Any,
    head_norms: Any,
    last_norm: Any,
    cos: Any,
    sin: Any,
    angles: Any,
    windows: Any,
    keys: Any,
    values: Any,
    tables: Any,
    rows: Any,
    positions: Any,
    scale: Any,
    counter: Any,
    n_threads: int,
) -> None:
    """x (N, D) float32, embedded tokens, becomes what the output matrix takes; keys and values are written.

    norms (L, 2, D), last_norm (D,); matrices, all as they are or all in pairs: qkv (L, (H + 2 G) E, D),
    out (L, D, H E), gate_up (L, 2 F, D), down (L, D, F), with their scales; qkv_bias (L, rows) or (L, 0);
    head_norms (L, 2, E) or (L, 0, 0): of queries and keys; cos, sin (kinds, N, rotated / 2), angles (L,): the
    kind of each layer, -1 = none; windows (L,); counter (1,) int64, zero; n_threads: all of numba's, since
    they wait for one another.
    """
    n_tokens, width = x.shape
    n_layers, n_groups, e = len(qkv), keys.shape[2], keys.shape[3]
    n_rows, ffn = rows_of(qkv[0]), rows_of(gate_up[0]) // 2
    q_width = n_rows - 2 * n_groups * e
    heads = q_width // e // n_groups
    h = room(qkv[0], n_tokens, width)
    mixed = np.empty((n_tokens, n_rows), np.float32)
    read = room(qkv[0], n_tokens, q_width)
    both = np.empty((n_tokens, 2 * ffn), np.float32)
    inner = room(qkv[0], n_tokens, ffn)
    added = np.zeros((n_tokens, width), np.float32)
    zero, none = np.float32(0), np.empty(0, np.float32)
    for part in prange(n_threads):
        target = 0
        longest = 0
        for t in range(n_tokens):
            longest = max(longest, positions[t])
        scores = np.empty((heads, longest + 2 * POSITIONS), np.float32)
        mix = np.empty((heads, e), np.float32)
        line = np.empty(max(width, ffn), np.float32)
        for layer in range(n_layers):
            for t in range(part, n_tokens, n_threads):
                add_and_put(x[t], added[t], norms[layer, 0], eps, h, t, line[:width])
            target += n_threads
            wait_for_all(counter, target)

            begin, end = share(qkv[layer], n_rows, part, n_threads)
            times(qkv[layer], qkv_scale[layer], begin, end, h, mixed)
            if qkv_bias.shape[1]:
                for t in range(n_tokens):
                    for row in range(begin, end):
                        mixed[t, row] += qkv_bias[layer, row]
            target += n_threads
            wait_for_all(counter, target)

            for task in range(part, n_tokens * n_groups, n_threads):
                t, group = task // n_groups, task % n_groups
                kind = angles[layer]
                turn_and_write(
                    mixed[t],
                    group,
                    heads,
                    head_norms[layer],
                    eps,
                    cos[max(kind, 0), t],
                    sin[max(kind, 0), t],
                    kind >= 0,
                    keys[layer, tables[rows[t], positions[t] // POSITIONS], group],
                    values[layer, tables[rows[t], positions[t] // POSITIONS], group],
                    positions[t] % POSITIONS,
                )
            target += n_threads
            wait_for_all(counter, target)

            # One head at a time where there are few, so that no thread has more to do than the others.
            together = heads if n_tokens * n_groups >= 4 * n_threads else 1
            for task in range(part, n_tokens * n_groups * heads // together, n_threads):
                t, head = (
                    task // (n_groups * heads // together),
                    task % (n_groups * heads // together) * together,
                )
                last = positions[t]
                attend_one(
                    mixed[t, head * e : (head + together) * e].reshape(together, e),
                    keys[layer],
                    values[layer],
                    tables[rows[t]],
                    last,
                    max(0, last + 1 - windows[layer]) if windows[layer] else 0,
                    scale,
                    zero,
                    none,
                    head // heads,
                    scores[:together],
                    mix[:together],
                )
                put(read, t, head * e, mix[:together].reshape(-1))
            target += n_threads
            wait_for_all(counter, target)

            begin, end = share(out[layer], width, part, n_threads)
            times(out[layer], out_scale[layer], begin, end, read, added)
            target += n_threads
            wait_for_all(counter, target)

            for t in range(part, n_tokens, n_threads):
                add_and_put(x[t], added[t], norms[layer, 1], eps, h, t, line[:width])
            target += n_threads
            wait_for_all(counter, target)

            begin, end = share(gate_up[layer], ffn, part, n_threads)
            times(gate_up[layer], gate_up_scale[layer], begin, end, h, both)
            times(gate_up[layer], gate_up_scale[layer], ffn + begin, ffn + end, h, both)
            for t in range(n_tokens):
                for i in range(begin, end):
                    line[i - begin] = silu(both[t, i]) * both[t, ffn + i]
                put(inner, t, begin, line[: end - begin])
            target += n_threads
            wait_for_all(counter, target)

            begin, end = share(down[layer], width, part, n_threads)
            times(down[layer], down_scale[layer], begin, end, inner, added)
            target += n_threads
            wait_for_all(counter, target)

        for t in range(part, n_tokens, n_threads):
            for i in range(width):
                x[t, i] += added[t, i]
            rms_norm(x[t], last_norm, eps, x[t])


@register_jitable(fastmath=FAST)
def add_and_put(x: Any, added: Any, w: Any, eps: Any, h: Any, t: int, line: Any) -> None:
    """x += added (D,); h[t] = the norm of x, by way of `line` (D,)."""
    for i in range(len(x)):
        x[i] += added[i]
    rms_norm(x, w, eps, line)
    put(h, t, 0, line)


# Between the products of a pass over many tokens


@kernel()
def add_and_norm(x: Any, y: Any, w: Any, eps: Any, h: Any) -> None:
    """x += y (N, D); h = the norm of x, in the dtype of h."""
    width = x.shape[1]
    for t in prange(len(x)):
        line = np.empty(width, np.float32)
        for i in range(width):
            x[t, i] += wide(y[t, i])
        rms_norm(x[t], w, eps, line)
        for i in range(width):
            h[t, i] = narrow(line[i], h)


@kernel()
def heads_of(
    mixed: Any,
    bias: Any,
    head_norms: Any,
    eps: Any,
    cos: Any,
    sin: Any,
    turns: bool,
    keys: Any,
    values: Any,
    tables: Any,
    rows: Any,
    positions: Any,
    q: Any,
) -> None:
    """Queries q (N, H, E) float32 out of mixed (N, (H + 2 G) E); keys and values go into the cache."""
    n_groups, n_heads, e = keys.shape[1], q.shape[1], q.shape[2]
    heads = n_heads // n_groups
    for t in prange(len(mixed)):
        line = np.empty(mixed.shape[1], np.float32)
        for i in range(len(line)):
            line[i] = wide(mixed[t, i])
        for i in range(len(bias)):
            line[i] += bias[i]
        block, slot = tables[rows[t], positions[t] // POSITIONS], positions[t] % POSITIONS
        for group in range(n_groups):
            k, v = keys[block, group], values[block, group]
            turn_and_write(line, group, heads, head_norms, eps, cos[t], sin[t], turns, k, v, slot)
        for head in range(n_heads):
            for i in range(e):
                q[t, head, i] = line[head * e + i]


@kernel()
def gated(gate_up: Any, inner: Any, parts: int) -> None:
    """inner (N, F) = silu(gate) · up of gate_up (N, 2 F), in `parts` parallel parts."""
    n, ffn = inner.shape
    for part in prange(parts):
        begin, end = part * ffn // parts, (part + 1) * ffn // parts
        for t in range(n):
            for i in range(begin, end):
                inner[t, i] = narrow(silu(wide(gate_up[t, i])) * wide(gate_up[t, ffn + i]), inner)
