"""Counts against torch's own."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from danlu.model import count
from danlu.model.cache import KVCache
from danlu.model.config import ModelConfig
from danlu.model.transformer import Transformer

SIZES = ModelConfig(vocab_size=300, width=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_width=96)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters(tied: bool) -> None:
    sizes = SIZES.model_copy(update={"tied_embeddings": tied})
    assert count.parameters(sizes) == sum(p.numel() for p in Transformer(sizes).parameters())


def test_flops() -> None:
    """torch counts every product that runs; blocks of queries compute a little more than half a square."""
    n_tokens = 1024
    with FlopCounterMode(display=False) as counter:
        Transformer(SIZES)(torch.zeros(1, n_tokens, dtype=torch.int64))
    blocks = n_tokens // 128
    extra = 2 * SIZES.n_layers * SIZES.width * n_tokens / blocks
    want = count.flops_per_token(SIZES, n_tokens, backward=False) + extra
    assert counter.get_total_flops() / n_tokens == pytest.approx(want)
    assert count.flops_per_token(SIZES, n_tokens) == 3 * count.flops_per_token(SIZES, n_tokens, False)


def test_cache_bytes() -> None:
    cache = KVCache(SIZES, 3, 50, torch.bfloat16)
    assert count.kv_cache_bytes(SIZES, 3, 50) == 2 * cache.keys.nbytes
