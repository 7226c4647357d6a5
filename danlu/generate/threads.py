"""Threads of one loop that wait for one another, for numba."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable


def _counter_address(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return array.data


def _add_one(_: Any, counter: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _counter_address(context, builder, signature, arguments)
        return builder.atomic_rmw("add", address, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(counter), build


def _read(_: Any, counter: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _counter_address(context, builder, signature, arguments)
        return builder.load_atomic(address, "seq_cst", 8, typ=ir.IntType(64))

    return types.int64(counter), build


def _give_way(_: Any) -> Any:
    def build(__: Any, builder: Any, ___: Any, ____: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        function = cgutils.get_or_insert_function(builder.module, kind, "sched_yield")
        return builder.call(function, [])

    return types.int32(), build


_atomic_add_one: Any = intrinsic(_add_one)
_atomic_read: Any = intrinsic(_read)
_sched_yield: Any = intrinsic(_give_way)


@register_jitable
def wait_for_all(counter: Any, target: int) -> None:
    """A barrier: goes on once `target` threads, over all barriers so far, have come here."""
    _atomic_add_one(counter)
    spins = 0
    while _atomic_read(counter) < target:
        spins += 1
        if spins > 20000:  # somebody else has our cores
            _sched_yield()
