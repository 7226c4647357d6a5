"""Counts against torch's own."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from danlu.model import count
from danlu.model.cache import KVCache
from danlu.model.config import LoraConfig, ModelConfig
from danlu.model.cross_entropy import linear_cross_entropy
from danlu.model.lora import add_adapter
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


def step_flops(model: Transformer, n_tokens: int) -> float:
    """For one token, by torch's count of the products that a training step really runs."""
    ids = torch.randint(0, model.config.vocab_size, (1, n_tokens))
    with FlopCounterMode(display=False) as counter:
        hidden = model.hidden(ids).flatten(0, 1)
        loss = linear_cross_entropy(
            hidden, model.head_weight, ids.flatten(), torch.ones(n_tokens), model.head_bias
        )
        loss.backward()
    return counter.get_total_flops() / n_tokens


def blocks_beyond_the_count(n_tokens: int, layers_backward: int) -> float:
    """What attention by blocks of 128 runs beyond `flops_per_token`, for one token.

    Each of its products (2 forward, 5 backward, of which QKᵀ is the second time) goes to the end of the
    query's block, 64 keys further on average; and the second QKᵀ isn't counted at all.
    """
    product = 2 * SIZES.width  # for each key
    further = 64 * product * (2 * SIZES.n_layers + 5 * layers_backward)
    return further + n_tokens / 2 * product * layers_backward


MOE = {"n_experts": 4, "n_active": 2, "expert_width": 48, "moe_layers": (True, False)}
PARALLEL = {"parallel_residual": True, "one_norm": True, "ffn": "gelu"}
NARROW = {"embedding_width": 32, "tied_embeddings": False}


@pytest.mark.parametrize(
    "more", [{}, *(pytest.param(m, marks=pytest.mark.slow) for m in (MOE, PARALLEL, NARROW))]
)
@pytest.mark.parametrize(
    ("targets", "layers_backward"),
    [
        (None, 2),  # all weights are trained
        (("attention.*", "ffn.*"), 2),
        (("attention.[qv]",), 2),
        (("attention.out",), 1),
        (("ffn.*down",), 1),
        (("ffn.*gate", "ffn.*up"), 1),
    ],
)
def test_flops_of_a_training_step(
    targets: tuple[str, ...] | None, layers_backward: int, more: dict[str, Any]
) -> None:
    sizes = ModelConfig.model_validate({**SIZES.model_dump(exclude={"head_width"}), **more})
    model, lora = Transformer(sizes), None
    if targets is not None:
        lora = LoraConfig(rank=4, targets=targets)
        add_adapter(model, lora)
    n_tokens = 256
    want = count.flops_per_token(sizes, n_tokens, lora=lora)
    want += blocks_beyond_the_count(n_tokens, layers_backward)
    assert step_flops(model, n_tokens) == pytest.approx(want, rel=1e-9)


def test_cache_bytes() -> None:
    cache = KVCache(SIZES, 3, 50, torch.bfloat16)
    assert count.kv_cache_bytes(SIZES, 3, 50) == 2 * cache.keys.nbytes


@pytest.mark.parametrize("experts", [True, False])
def test_flops_of_experts_and_windows(experts: bool) -> None:
    """torch's count of a forward pass; a window of whole blocks is computed a block wider than it is."""
    more = {"n_experts": 4, "n_active": 2, "expert_width": 48, "moe_layers": (True, False)} if experts else {}
    sizes = ModelConfig(**{**SIZES.model_dump(exclude={"head_width"}), **more})
    n_tokens = 1024
    with FlopCounterMode(display=False) as counter:
        Transformer(sizes)(torch.randint(0, 300, (1, n_tokens)))
    extra = 2 * sizes.n_layers * sizes.width * n_tokens / (n_tokens // 128)
    want = count.flops_per_token(sizes, n_tokens, backward=False) + extra
    assert counter.get_total_flops() / n_tokens == pytest.approx(want)
    window = sizes.model_copy(update={"window": 256})
    seen = sum(min(i + 1, 256) for i in range(n_tokens)) / n_tokens
    attention = count.flops_per_token(window, n_tokens, False) - 2 * count.matmul_parameters(window)
    assert attention == pytest.approx(4 * sizes.n_layers * sizes.width * seen, rel=0.01)


def test_active_parameters_are_those_that_a_token_touches() -> None:
    sizes = ModelConfig(
        vocab_size=300, width=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_width=96, ffn_bias=True,
        n_experts=6, n_active=2, expert_width=48,
    )  # fmt: skip
    model = Transformer(sizes)
    experts = [expert for layer in model.layers for expert in layer.ffn.experts[2:]]
    idle = sum(p.numel() for expert in experts for p in expert.parameters())
    assert count.parameters(sizes) == sum(p.numel() for p in model.parameters())
    assert count.active_parameters(sizes) == count.parameters(sizes) - idle


@pytest.mark.parametrize("targets", [("attention.*", "ffn.*"), ("attention.[qv]", "ffn.*down")])
@pytest.mark.parametrize("experts", [True, False])
def test_trained_numbers_of_an_adapter(targets: tuple[str, ...], experts: bool) -> None:
    more = {"n_experts": 4, "n_active": 2, "expert_width": 48, "moe_layers": (True, False)} if experts else {}
    sizes = ModelConfig(**{**SIZES.model_dump(exclude={"head_width"}), **more})
    lora = LoraConfig(rank=4, targets=targets, dora=True)
    model = Transformer(sizes)
    trained = add_adapter(model, lora)
    assert count.adapter_parameters(sizes, lora) == sum(p.numel() for p in trained)
