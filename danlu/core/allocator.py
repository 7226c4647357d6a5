"""The C library's allocator, told to keep what is freed, and to give it back."""

import ctypes
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for the next allocation instead of handing it back to the system.

    A training step allocates and frees the same megabytes again and again, and without this each time the
    system clears and maps them afresh, page by page (docs/performance.md has the figures). Holds for the
    process. Returns whether the C library has the setting.
    """
    mallopt = _glibc("mallopt")
    return mallopt is not None and all(
        [mallopt(_MMAP_THRESHOLD, _LARGEST), mallopt(_TRIM_THRESHOLD, _LARGEST)]
    )


def give_back_freed_memory() -> None:
    """Hands what is freed and kept back to the system, once."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Any:
    """A function of glibc; None where the C library is another one."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
