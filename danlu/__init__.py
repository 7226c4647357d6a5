"""danlu (丹炉): training, evaluation and application of large language models."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Engine", "load"]

_LAZY = {"load": "danlu.model.checkpoint", "Engine": "danlu.generate.engine"}


def __getattr__(name: str) -> Any:
    """Resolves `danlu.load` and `danlu.Engine` when they are first used, so that `import danlu` is quick."""
    if name not in _LAZY:
        raise AttributeError(f"module 'danlu' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
