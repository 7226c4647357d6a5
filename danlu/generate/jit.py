"""How the kernels are compiled: by numba, when they are first called. What it has made is kept.

numba keeps it until the function's own file changes. A kernel is made of several files here, so it is kept
under what all of them say; else a new version would go on with parts of the old one.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import config, njit

from danlu.core.device import cache_folder

# `kernels.decode` needs each part on a thread of its own. TBB may give one two, which would wait for ever.
config.THREADING_LAYER_PRIORITY = ["omp", "workqueue", "tbb"]  # type: ignore[attr-defined]

PARTS = ("jit", "kernels", "numbers", "pairs", "products", "threads", "vectors")


def _folder() -> str:
    """$NUMBA_CACHE_DIR, or a folder of this version in the user's cache."""
    found = hashlib.sha256()
    for part in PARTS:
        found.update(Path(__file__).with_name(f"{part}.py").read_bytes())
    return os.environ.get("NUMBA_CACHE_DIR") or str(cache_folder() / f"kernels-{found.hexdigest()[:16]}")


FOLDER = _folder()


def kernel(**options: Any) -> Callable[[Any], Any]:
    """A function of parallel loops, compiled."""

    def compiled(function: Any) -> Any:
        before, config.CACHE_DIR = config.CACHE_DIR, FOLDER  # type: ignore[attr-defined]
        try:
            return njit(cache=True, parallel=True, **options)(function)
        finally:
            config.CACHE_DIR = before  # type: ignore[attr-defined]

    return compiled
