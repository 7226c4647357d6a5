"""How numbers are stored, for numba: bfloat16 in uint16."""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload


def _bitcast(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    kind = ir.FloatType() if signature.return_type == types.float32 else ir.IntType(32)
    return builder.bitcast(arguments[0], kind)


def _to_float(_: Any, bits: Any) -> Any:
    return types.float32(types.uint32), _bitcast


def _to_bits(_: Any, value: Any) -> Any:
    return types.uint32(types.float32), _bitcast


float_of_bits: Any = intrinsic(_to_float)
bits_of_float: Any = intrinsic(_to_bits)


def wide(value: Any) -> Any:
    """float32 of a stored number; uint16 holds bfloat16."""
    return np.float32(value)


@overload(wide, strict=False)
def _wide(value: Any) -> Callable[..., Any]:
    if value == types.uint16:
        return lambda value: float_of_bits(np.uint32(value) << np.uint32(16))
    return lambda value: np.float32(value)


def narrow(value: Any, like: Any) -> Any:
    """A float32 as it is stored in `like`: rounded to the nearest bfloat16 (ties to even), or as it is."""
    return like.dtype.type(value)


@overload(narrow, strict=False)
def _narrow(value: Any, like: Any) -> Callable[..., Any]:
    if like.dtype == types.uint16:

        def rounded(value: Any, like: Any) -> Any:
            bits = bits_of_float(np.float32(value))
            if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):  # NaN stays NaN
                return np.uint16(0x7FC0)
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))

        return rounded
    return lambda value, like: np.float32(value)
