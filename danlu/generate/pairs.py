"""Products of bfloat16 by the processor's own instruction, which multiplies pairs and adds both to a float32.

A matrix (rows, D) lies as (rows / 16, D / 2, 32): of sixteen rows two numbers each, then the next two. So a
vector holds sixteen rows' next pair, and no sum goes across its lanes. 8 bits are widened as they are read;
there the first numbers of sixteen rows' pairs lie together, and then their second ones.

The activations of N tokens (N, D) are rounded to bfloat16 and lie pair by pair too: within eight tokens, or
the four, two and one that are left, first the pairs (0, 1) of each token, then (2, 3) …. Each sum is taken in
one order, whatever the number of tokens.
"""

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from danlu.generate.numbers import narrow
from danlu.generate.vectors import (
    FLOAT,
    FLOATS,
    INT,
    INTS,
    LANES,
    LINE,
    _arrays,
    _at,
    _load,
    _splat,
    _wide,
    _word,
    fetch,
    stream,
)

AVAILABLE = bool(binding.get_host_cpu_features().get("avx512bf16"))
"""Whether this processor has the instruction."""
TILE = 8
"""Tokens that are multiplied with a vector of the matrix once it is loaded."""
CHAINS = 2
"""Sums of a number that run side by side: an addition takes several cycles."""


class _BFloat16(ir.Type):
    """LLVM's type, which llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


PAIRS = ir.VectorType(_BFloat16(), 2 * LANES)


def _weights(builder: ir.IRBuilder, array: Any, dtype: Any, index: Any) -> Any:
    """The next pair of sixteen rows; whole numbers below 128 are exact in bfloat16."""
    if dtype == types.uint16:
        address = _at(builder, array, ir.IntType(16), index)
        return builder.load(builder.bitcast(address, PAIRS.as_pointer()), align=2, typ=PAIRS)
    first, second = (
        builder.bitcast(_wide(builder, array, dtype, at), INTS)
        for at in (index, builder.add(index, _word(LANES)))
    )
    # The lower half of such a float32 is 0, the upper one is the bfloat16. The processor's own instruction
    # rounds, and takes several times as long.
    return builder.bitcast(builder.or_(builder.lshr(first, ir.Constant(INTS, [16] * LANES)), second), PAIRS)


def _tile(n_tokens: int) -> Any:
    """tile(w, factors, group, x, t, y): y[t + i, 16 group + lane] = w's row · x[t + i] for `n_tokens` i."""

    def typing(_: Any, w: Any, factors: Any, group: Any, x: Any, t: Any, y: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w_, factors_, group_, x_, t_, y_ = _arrays(context, builder, signature, arguments)
            half = cgutils.unpack_tuple(builder, w_.shape)[1]
            n_rows = cgutils.unpack_tuple(builder, y_.shape)[1]
            width = builder.mul(half, _word(2))
            kind = ir.FunctionType(FLOATS, [FLOATS, PAIRS, PAIRS])
            name = "llvm.x86.avx512bf16.dpbf16ps.512"
            multiply_add = cgutils.get_or_insert_function(builder.module, kind, name)
            sums = [cgutils.alloca_once(builder, FLOATS) for _ in range(n_tokens * CHAINS)]
            for place in sums:
                builder.store(ir.Constant(FLOATS, [0.0] * LANES), place)
            stored = ir.IntType(16 if w.dtype == types.uint16 else 8)
            line = builder.mul(group_, builder.mul(half, _word(2 * LANES)))
            tokens = builder.mul(t_, width)

            def pair(number: Any, chain: int) -> None:
                index = builder.add(line, builder.mul(number, _word(2 * LANES)))
                weights = _weights(builder, w_, w.dtype, index)
                if n_tokens == TILE:  # the next sixteen rows come while this tile is computed
                    ahead = builder.add(index, builder.mul(half, _word(2 * LANES)))
                    fetch(builder, _at(builder, w_, stored, ahead))
                else:
                    stream(builder, _at(builder, w_, stored, index), LINE)
                first = builder.add(tokens, builder.mul(number, _word(2 * n_tokens)))
                for i in range(n_tokens):
                    address = _at(builder, x_, ir.IntType(16), builder.add(first, _word(2 * i)))
                    both = builder.load(builder.bitcast(address, INT.as_pointer()), align=2, typ=INT)
                    numbers = builder.bitcast(_splat(builder, both, INTS), PAIRS)
                    place = sums[i * CHAINS + chain]
                    builder.store(builder.call(multiply_add, [builder.load(place), weights, numbers]), place)

            whole = builder.sdiv(half, _word(CHAINS))
            with cgutils.for_range(builder, whole) as loop:
                for chain in range(CHAINS):
                    pair(builder.add(builder.mul(loop.index, _word(CHAINS)), _word(chain)), chain)
            done = builder.mul(whole, _word(CHAINS))
            with builder.if_then(builder.icmp_signed("<", done, half)):
                pair(done, 0)
            row = builder.mul(group_, _word(LANES))
            for i in range(n_tokens):
                total = builder.load(sums[i * CHAINS])
                for chain in range(1, CHAINS):
                    total = builder.fadd(total, builder.load(sums[i * CHAINS + chain]))
                if w.dtype == types.int8:
                    total = builder.fmul(total, _load(builder, _at(builder, factors_, FLOAT, row), FLOAT, 4))
                place = builder.add(builder.mul(builder.add(t_, _word(i)), n_rows), row)
                address = builder.bitcast(_at(builder, y_, FLOAT, place), FLOATS.as_pointer())
                builder.store(total, address, align=4)
            return context.get_dummy_value()

        return types.void(w, factors, types.int64, x, types.int64, y), build

    return typing


_tile1: Any = intrinsic(_tile(1))
_tile2: Any = intrinsic(_tile(2))
_tile4: Any = intrinsic(_tile(4))
_tile8: Any = intrinsic(_tile(8))


@register_jitable
def times_pairs(w: Any, factors: Any, begin: int, end: int, x: Any, y: Any) -> None:
    """y (N, rows)[:, begin:end] = x (N, D), as `put_pairs` lays it, times these rows: whole sixteens."""
    n = len(x)
    whole = n & ~(TILE - 1)
    for group in range(begin // LANES, end // LANES):
        for t in range(0, whole, TILE):
            _tile8(w, factors, group, x, t, y)
        t = whole
        if n & 4:
            _tile4(w, factors, group, x, t, y)
            t += 4
        if n & 2:
            _tile2(w, factors, group, x, t, y)
            t += 2
        if n & 1:
            _tile1(w, factors, group, x, t, y)


@register_jitable
def put_pairs(x: Any, t: int, begin: int, line: Any) -> None:
    """x[t, begin:] = line, where x (N, D) lies pair by pair; begin is even."""
    n, width = x.shape
    first, size = t & ~(TILE - 1), TILE
    if first + TILE > n:  # among those that are left
        size = 4 if n & 4 else 2 if n & 2 else 1
        while t >= first + size:
            first += size
            size = (2 if n & 2 else 1) if size == 4 else 1
    flat = x.reshape(-1)
    at = first * width + begin * size + 2 * (t - first)
    for i in range(0, len(line), 2):
        flat[at + i * size] = narrow(line[i], x)
        flat[at + i * size + 1] = narrow(line[i + 1], x)
