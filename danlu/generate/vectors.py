"""Vector instructions for numba: sixteen numbers at a time, in an order of sums that is written down here.

LLVM turns a vector of sixteen floats into whatever the processor has. What numba's own loops are compiled to
hangs on what stands around them; these are the same wherever they are called, so that a sum's bits are too.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
UNROLL = 4
"""Sums that run side by side: an addition takes several cycles."""
LINE = 64
"""Bytes of a cache line."""
AMD = bool(binding.get_host_cpu_features().get("sse4a"))
STREAM_AHEAD = (6 if AMD else 32) * LINE
"""Between what is read of a matrix and what is fetched of it."""
STREAM_LOCALITY = 0 if AMD else 3
"""Into which caches: 0 = the nearest alone, and out of it soon, which is fastest on AMD's processors. Intel's
then fetch nothing by themselves, and read at half to a quarter of the rate."""

FLOAT, INT, WORD = ir.FloatType(), ir.IntType(32), ir.IntType(64)
FLOATS, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)


def _at(builder: ir.IRBuilder, array: Any, kind: ir.Type, index: Any) -> Any:
    """The address of a number of a contiguous array."""
    return builder.gep(array.data, [index], source_etype=kind)


def _load(builder: ir.IRBuilder, address: Any, kind: ir.Type, size: int) -> Any:
    return builder.load(address, align=size, typ=ir.VectorType(kind, LANES))


def _splat(builder: ir.IRBuilder, value: Any, vector: ir.VectorType = FLOATS) -> Any:
    """A number in all lanes."""
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(INT, 0))
    return builder.shuffle_vector(single, single, ir.Constant(INTS, [0] * LANES))


def _multiply_add(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


def _wide(builder: ir.IRBuilder, array: Any, dtype: Any, index: Any) -> Any:
    """Sixteen numbers as float32; uint16 holds bfloat16."""
    if dtype == types.float32:
        return _load(builder, _at(builder, array, FLOAT, index), FLOAT, 4)
    if dtype == types.uint16:
        kind = ir.IntType(16)
        bits = builder.zext(_load(builder, _at(builder, array, kind, index), kind, 2), INTS)
        return builder.bitcast(builder.shl(bits, ir.Constant(INTS, [16] * LANES)), FLOATS)
    assert dtype == types.int8, dtype
    kind = ir.IntType(8)
    return builder.sitofp(
        builder.sext(_load(builder, _at(builder, array, kind, index), kind, 1), INTS), FLOATS
    )


def _halves(builder: ir.IRBuilder, array: Any, index: Any) -> tuple[Any, Any]:
    """Sixteen bytes with two numbers of 4 bits each: the low halves and the high ones."""
    kind = ir.IntType(8)
    data = builder.zext(_load(builder, _at(builder, array, kind, index), kind, 1), INTS)
    low = builder.and_(data, ir.Constant(INTS, [15] * LANES))
    high = builder.lshr(data, ir.Constant(INTS, [4] * LANES))
    return tuple(builder.sitofp(half, FLOATS) for half in (low, high))


def _sum_of_lanes(builder: ir.IRBuilder, vector: Any) -> Any:
    """Halves added, until one is left."""
    width = LANES
    while width > 1:
        width //= 2
        half = ir.VectorType(INT, width)
        low, high = (ir.Constant(half, [*range(begin, begin + width)]) for begin in (0, width))
        vector = builder.fadd(
            builder.shuffle_vector(vector, vector, low), builder.shuffle_vector(vector, vector, high)
        )
    return builder.extract_element(vector, ir.Constant(INT, 0))


def _word(value: int) -> ir.Constant:
    return ir.Constant(WORD, value)


class _Sums:
    """Vectors that are summed into, in registers once LLVM has seen that nobody takes their address."""

    def __init__(self, builder: ir.IRBuilder, count: int) -> None:
        self.builder = builder
        self.places = [cgutils.alloca_once(builder, FLOATS) for _ in range(count)]
        for place in self.places:
            builder.store(ir.Constant(FLOATS, [0.0] * LANES), place)

    def add(self, number: int, a: Any, b: Any) -> None:
        place = self.places[number]
        self.builder.store(_multiply_add(self.builder, a, b, self.builder.load(place)), place)

    def total(self, numbers: range) -> Any:
        first, *others = (self.builder.load(self.places[number]) for number in numbers)
        for other in others:
            first = self.builder.fadd(first, other)
        return first


def _arrays(context: Any, builder: Any, signature: Any, arguments: Any) -> list[Any]:
    """Arguments, arrays among them opened."""
    return [
        context.make_array(kind)(context, builder, value) if isinstance(kind, types.Array) else value
        for kind, value in zip(signature.args, arguments, strict=True)
    ]


def fetch(builder: ir.IRBuilder, address: Any, locality: int = 3) -> None:
    """Has a cache line brought from memory, and doesn't wait for it. `locality`: as LLVM's prefetch."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, INT, INT, INT])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    to_read, caches, data = (ir.Constant(INT, flag) for flag in (0, locality, 1))
    builder.call(function, [builder.bitcast(address, byte), to_read, caches, data])


def stream(builder: ir.IRBuilder, address: Any, n_bytes: int) -> None:
    """Before `n_bytes` are read from here: fetches what is read a little later."""
    begin = builder.bitcast(address, ir.IntType(8).as_pointer())
    for offset in range(STREAM_AHEAD, STREAM_AHEAD + n_bytes, LINE):
        line = builder.gep(begin, [_word(offset)], source_etype=ir.IntType(8))
        fetch(builder, line, STREAM_LOCALITY)


def _dots(n_tokens: int) -> Any:
    """dots(w, factors, row, x, t, y): y[t + i, row] = w[row] · x[t + i] for the next `n_tokens` rows i of x.

    w (rows, D) of float32, bfloat16, int8 or, two in a byte, 4 bits; factors (rows, 1 or D / 16). Of plain
    numbers only the first multiple of 16 are summed.
    """

    def typing(_: Any, w: Any, factors: Any, row: Any, x: Any, t: Any, y: Any) -> Any:
        packed = w.dtype == types.uint8

        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w_, factors_, row_, x_, t_, y_ = _arrays(context, builder, signature, arguments)
            width = cgutils.unpack_tuple(builder, x_.shape)[1]
            bytes_ = cgutils.unpack_tuple(builder, w_.shape)[1]
            groups = builder.sdiv(width, _word(2 * LANES))
            n_rows = cgutils.unpack_tuple(builder, y_.shape)[1]
            line = builder.mul(row_, bytes_)
            sums = _Sums(builder, n_tokens * UNROLL)

            def column(index: Any, value: Any, unroll: int) -> None:
                for i in range(n_tokens):
                    at = builder.add(builder.mul(builder.add(t_, _word(i)), width), index)
                    sums.add(i * UNROLL + unroll, value, _wide(builder, x_, types.float32, at))

            def vectors(begin: Any, count: int) -> None:
                """`count` vectors of the row, from number `begin` on."""
                first = builder.add(line, builder.mul(begin, _word(LANES)))
                size = w.dtype.bitwidth // 8
                kind = FLOAT if size == 4 else ir.IntType(8 * size)
                stream(builder, _at(builder, w_, kind, first), count * LANES * size)
                for unroll in range(count):
                    index = builder.mul(builder.add(begin, _word(unroll)), _word(LANES))
                    column(index, _wide(builder, w_, w.dtype, builder.add(line, index)), unroll)

            def group(number: Any, unroll: int) -> None:
                """The 32 numbers of a group of 4 bits."""
                at = builder.add(line, builder.mul(number, _word(LANES)))
                stream(builder, _at(builder, w_, ir.IntType(8), at), LANES)
                place = builder.mul(builder.add(builder.mul(row_, groups), number), _word(2))
                step, low = (
                    _splat(builder, builder.load(_at(builder, factors_, FLOAT, at_), typ=FLOAT))
                    for at_ in (place, builder.add(place, _word(1)))
                )
                for half, codes in enumerate(_halves(builder, w_, at)):
                    index = builder.mul(builder.add(builder.mul(number, _word(2)), _word(half)), _word(LANES))
                    column(index, _multiply_add(builder, codes, step, low), unroll + half)

            if packed:
                with cgutils.for_range(builder, builder.sdiv(groups, _word(2))) as loop:
                    first = builder.mul(loop.index, _word(2))
                    group(first, 0)
                    group(builder.add(first, _word(1)), 2)
                odd = builder.icmp_signed("!=", builder.srem(groups, _word(2)), _word(0))
                with builder.if_then(odd):
                    group(builder.sub(groups, _word(1)), 0)
            else:
                n_vectors = builder.sdiv(width, _word(LANES))
                whole = builder.sdiv(n_vectors, _word(UNROLL))
                with cgutils.for_range(builder, whole) as loop:
                    vectors(builder.mul(loop.index, _word(UNROLL)), UNROLL)
                done = builder.mul(whole, _word(UNROLL))
                with cgutils.for_range(builder, builder.sub(n_vectors, done)) as loop:
                    vectors(builder.add(done, loop.index), 1)
            for i in range(n_tokens):
                total = _sum_of_lanes(builder, sums.total(range(i * UNROLL, (i + 1) * UNROLL)))
                if w.dtype == types.int8:
                    total = builder.fmul(total, builder.load(_at(builder, factors_, FLOAT, row_), typ=FLOAT))
                place = builder.add(builder.mul(builder.add(t_, _word(i)), n_rows), row_)
                builder.store(total, _at(builder, y_, FLOAT, place))
            return context.get_dummy_value()

        return types.void(w, factors, types.int64, x, types.int64, y), build

    return typing


def _product_of_rows(n_lines: int) -> Callable[..., Any]:
    """add_rows(a, a_at, m, n, y, y_at, line): y[h, y_at:] += Σ a[h, a_at + k] · m[k] over k < n.

    h: the next `n_lines` lines from `line` on; m (K, 16 C) is as wide as what is added to.
    """

    def typing(_: Any, a: Any, a_at: Any, m: Any, n: Any, y: Any, y_at: Any, line: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a_, a_at_, m_, n_, y_, y_at_, line_ = _arrays(context, builder, signature, arguments)
            width = cgutils.unpack_tuple(builder, m_.shape)[1]
            strides = [cgutils.unpack_tuple(builder, array.shape)[1] for array in (a_, y_)]

            def start(array: Any, stride: Any, at: Any, line: int) -> Any:
                """The address of number `at` of a line."""
                index = builder.add(builder.mul(builder.add(line_, _word(line)), stride), at)
                return _at(builder, array, FLOAT, index)

            factors = [start(a_, strides[0], a_at_, line) for line in range(n_lines)]
            results = [start(y_, strides[1], y_at_, line) for line in range(n_lines)]
            with cgutils.for_range(builder, builder.sdiv(width, _word(LANES))) as chunk:
                column = builder.mul(chunk.index, _word(LANES))
                sums = _Sums(builder, n_lines * UNROLL)

                def row(number: Any, unroll: int, column: Any = column, sums: _Sums = sums) -> None:
                    values = _wide(builder, m_, m.dtype, builder.add(builder.mul(number, width), column))
                    for line, start in enumerate(factors):
                        place = builder.gep(start, [number], source_etype=FLOAT)
                        factor = _splat(builder, builder.load(place, typ=FLOAT))
                        sums.add(line * UNROLL + unroll, factor, values)

                whole = builder.sdiv(n_, _word(UNROLL))
                with cgutils.for_range(builder, whole) as loop:
                    first = builder.mul(loop.index, _word(UNROLL))
                    for unroll in range(UNROLL):
                        row(builder.add(first, _word(unroll)), unroll)
                done = builder.mul(whole, _word(UNROLL))
                with cgutils.for_range(builder, builder.sub(n_, done)) as loop:
                    row(builder.add(done, loop.index), 0)
                for line, start in enumerate(results):
                    place = builder.gep(start, [column], source_etype=FLOAT)
                    total = sums.total(range(line * UNROLL, (line + 1) * UNROLL))
                    total = builder.fadd(total, _load(builder, place, FLOAT, 4))
                    builder.store(total, builder.bitcast(place, FLOATS.as_pointer()), align=4)
            return context.get_dummy_value()

        words = types.int64
        return types.void(a, words, m, words, y, words, words), build

    return typing


def _fetch(_: Any, array: Any) -> Any:
    """prefetch(array): its cache lines are on their way while something else is computed."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (array_,) = _arrays(context, builder, signature, arguments)
        size = builder.mul(array_.nitems, array_.itemsize)
        begin = builder.bitcast(array_.data, ir.IntType(8).as_pointer())
        with cgutils.for_range(builder, builder.sdiv(builder.add(size, _word(63)), _word(64))) as loop:
            offset = builder.mul(loop.index, _word(64))
            fetch(builder, builder.gep(begin, [offset], source_etype=ir.IntType(8)))
        return context.get_dummy_value()

    return types.void(array), build


prefetch: Any = intrinsic(_fetch)
dots1: Any = intrinsic(_dots(1))
dots2: Any = intrinsic(_dots(2))
dots4: Any = intrinsic(_dots(4))
add_rows1: Any = intrinsic(_product_of_rows(1))
add_rows2: Any = intrinsic(_product_of_rows(2))
add_rows3: Any = intrinsic(_product_of_rows(3))
add_rows4: Any = intrinsic(_product_of_rows(4))
