"""Python values as text that nothing can hide in, to pass between a candidate and what examines it.

Unlike pickle's, decoding it runs nobody's code. None, truth values, numbers, texts, bytes, lists, tuples,
sets and dictionaries come out as they went in; a subclass comes out as its base, so that no `__eq__` of its
own is ever asked. Everything else stays where it is, and a handle of it travels.
"""

import json
from collections.abc import Callable
from typing import Any

MAX_BYTES = 16 << 20
"""Of one message."""

ToHandle = Callable[[Any], dict[str, Any]]
FromHandle = Callable[[dict[str, Any]], Any]


def no_handles(value: Any) -> Any:
    """For values that must be plain. Raises TypeError."""
    raise TypeError(f"{type(value).__name__} is no plain value")


def encode(value: Any, handle: ToHandle) -> bytes:
    """Raises ValueError where it is too large, and RecursionError where it is too deep or holds itself."""
    text = json.dumps(_plain(value, handle), separators=(",", ":")).encode()
    if len(text) > MAX_BYTES:
        raise ValueError(f"{len(text)} bytes are more than may pass ({MAX_BYTES})")
    return text


def decode(data: bytes, handle: FromHandle) -> Any:
    """Raises ValueError for what `encode` has not made."""
    try:
        return _value(json.loads(data), handle)
    except (TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a value: {error}") from None


def _plain(value: Any, handle: ToHandle) -> Any:
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if issubclass(kind, int):
        number = int.__int__(value)
        # Long ones in base 16: base 10 takes quadratic time, and Python refuses it.
        return number if -(1 << 63) < number < 1 << 63 else {"i": hex(number)}
    if issubclass(kind, float):
        real = float.__float__(value)
        return real if real - real == 0 else {"f": repr(real)}
    if issubclass(kind, str):
        return str.__str__(value)
    if issubclass(kind, list):
        return [_plain(one, handle) for one in list.__iter__(value)]
    if issubclass(kind, tuple):
        return {"t": [_plain(one, handle) for one in tuple.__iter__(value)]}
    if issubclass(kind, dict):
        items = dict.items(value)
        return {"d": [[_plain(key, handle), _plain(one, handle)] for key, one in items]}
    if issubclass(kind, set):
        return {"s": [_plain(one, handle) for one in set.__iter__(value)]}
    if issubclass(kind, frozenset):
        return {"z": [_plain(one, handle) for one in frozenset.__iter__(value)]}
    if kind is complex:
        return {"c": [_plain(value.real, handle), _plain(value.imag, handle)]}
    if kind is bytes:
        return {"b": value.hex()}
    if kind.__module__ == "numpy" and hasattr(value, "item") and getattr(value, "shape", None) == ():
        return _plain(value.item(), handle)
    return handle(value)


def _value(found: Any, handle: FromHandle) -> Any:
    if not isinstance(found, list | dict):
        return found
    if isinstance(found, list):
        return [_value(one, handle) for one in found]
    if "o" in found:
        return handle(found)
    ((mark, inner),) = found.items()
    match mark:
        case "i":
            return int(inner, 16)
        case "f":
            return float(inner)
        case "t":
            return tuple(_value(one, handle) for one in inner)
        case "d":
            return {_value(key, handle): _value(one, handle) for key, one in inner}
        case "s":
            return {_value(one, handle) for one in inner}
        case "z":
            return frozenset(_value(one, handle) for one in inner)
        case "c":
            return complex(*(_value(one, handle) for one in inner))
        case "b":
            return bytes.fromhex(inner)
    raise ValueError(f"unknown mark {mark!r}")
