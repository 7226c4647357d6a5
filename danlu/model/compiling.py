"""torch.compile: whether it pays for a run, and how a model's layers are compiled from outside.

Only what comes before and after attention in a layer is compiled, once for all layers: chains of products
and element-wise operations, which are fused. Embedding, attention, head and optimiser run as they are, so
that a cold start takes seconds, and the embedding's gradient keeps its fixed order of additions.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from danlu.core.errors import UserError
from danlu.core.host import has_compiler
from danlu.model.config import LoraConfig, ModelConfig
from danlu.model.count import flops_per_token
from danlu.model.transformer import Layer, Transformer

WORTHWHILE = 3e13
"""FLOPs of a run from which on compiling pays: a minute or two on a small CPU, against some ten seconds."""


def should_compile(
    mode: str, config: ModelConfig, tokens: int, sequence_length: int, lora: LoraConfig | None = None
) -> bool:
    """Resolves auto, on or off for a run over `tokens` tokens; auto doesn't compile adapters.

    The answer hangs on the config and on the compiler, never on a measured time: a resumed run has to
    compute what the first one did. Raises UserError for `on` without a compiler.
    """
    if mode == "on" and not has_compiler():
        raise UserError("compile is on, and no C++ compiler is found", "install g++, or set compile=auto")
    if mode != "auto":
        return mode == "on"
    return lora is None and has_compiler() and tokens * flops_per_token(config, sequence_length) >= WORTHWHILE


@functools.cache
def _compiled(method: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(method, dynamic=False)


@contextmanager
def compiled_layers(model: Transformer) -> Iterator[None]:
    """Compiled layers within the block; outside they stay as they are."""
    methods = {"before": _compiled(Layer.before), "after": _compiled(Layer.after)}
    for layer in model.layers:
        for name, method in methods.items():
            layer.__dict__[name] = functools.partial(method, layer)
    try:
        yield
    finally:
        for layer in model.layers:
            for name in methods:
                del layer.__dict__[name]
