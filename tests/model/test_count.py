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
from danlu.model.sizes import SIZES, fields_of
from danlu.model.transformer import Transformer

SMALL = ModelConfig(vocab_size=300, width=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_width=96)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters(tied: bool) -> None:
    sizes = SMALL.model_copy(update={"tied_embeddings": tied})
    assert count.parameters(sizes) == sum(p.numel() for p in Transformer(sizes).parameters())


def test_flops() -> None:
    """torch counts every product that runs; blocks of queries compute a little more than half a square."""
    n_tokens = 1024
    with FlopCounterMode(display=False) as counter:
        Transformer(SMALL)(torch.zeros(1, n_tokens, dtype=torch.int64))
    blocks = n_tokens // 128
    extra = 2 * SMALL.n_layers * SMALL.width * n_tokens / blocks
    want = count.flops_per_token(SMALL, n_tokens, backward=False) + extra
    assert counter.get_total_flops() / n_tokens == pytest.approx(want)
    assert count.flops_per_token(SMALL, n_tokens) == 3 * count.flops_per_token(SMALL, n_tokens, False)


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
    product = 2 * SMALL.width  # for each key
    further = 64 * product * (2 * SMALL.n_layers + 5 * layers_backward)
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
    sizes = ModelConfig.model_validate({**SMALL.model_dump(exclude={"head_width"}), **more})
    model, lora = Transformer(sizes), None
    if targets is not None:
        lora = LoraConfig(rank=4, targets=targets)
        add_adapter(model, lora)
    n_tokens = 256
    want = count.flops_per_token(sizes, n_tokens, lora=lora)
    want += blocks_beyond_the_count(n_tokens, layers_backward)
    assert step_flops(model, n_tokens) == pytest.approx(want, rel=1e-9)


def test_cache_bytes() -> None:
    cache = KVCache(SMALL, 3, 50, torch.bfloat16)
    assert count.kv_cache_bytes(SMALL, 3, 50) == 2 * cache.keys.nbytes


@pytest.mark.parametrize("experts", [True, False])
def test_flops_of_experts_and_windows(experts: bool) -> None:
    """torch's count of a forward pass; a window of whole blocks is computed a block wider than it is."""
    more = {"n_experts": 4, "n_active": 2, "expert_width": 48, "moe_layers": (True, False)} if experts else {}
    sizes = ModelConfig(**{**SMALL.model_dump(exclude={"head_width"}), **more})
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
    sizes = ModelConfig(**{**SMALL.model_dump(exclude={"head_width"}), **more})
    lora = LoraConfig(rank=4, targets=targets, dora=True)
    model = Transformer(sizes)
    trained = add_adapter(model, lora)
    assert count.adapter_parameters(sizes, lora) == sum(p.numel() for p in trained)


UNITS = {"M": 1e6, "B": 1e9, "T": 1e12}
ODD = {
    "opt-350m": 0.06,  # the paper rounds; the released model has 331 million
    "glam-0.1b": 0.061,
    "glam-0.1b-64e": 0.051,
    "glam-1.7b-32e": 0.31,
    "glam": 0.04,  # printed with one digit after the point
}
"""How far the papers' own figures are from the sizes in their tables, where that is more than 2 %."""


def stated(figure: str) -> float:
    return float(figure[:-1]) * UNITS[figure[-1]]


@pytest.mark.parametrize("name", SIZES)
def test_named_sizes_have_the_papers_parameters(name: str) -> None:
    size, sizes = SIZES[name], ModelConfig(**fields_of(name))
    within = ODD.get(name, 0.02)
    assert count.parameters(sizes) + size.without == pytest.approx(stated(size.stated), rel=within)
    assert name not in ODD or name == "opt-350m" or name == "glam" or size.note
    if size.stated_active:
        want = stated(size.stated_active)
        assert count.active_parameters(sizes) == pytest.approx(want, rel=within if "0.1b" in name else 0.002)


def test_named_sizes_count_what_torch_counts() -> None:
    """Also the released models' exact counts, as their makers print them."""
    exact = {"gpt2": 124_439_808, "bloomberggpt": 50_558_868_480, "llama-7b": 6_738_415_616}
    for name in ("gpt", "gpt3-xl", "opt-350m", "chinchilla", "glam-0.1b-64e", *exact):
        sizes = ModelConfig(size=name)
        with torch.device("meta"):
            model = Transformer(sizes)
        assert sum(p.numel() for p in model.parameters()) == count.parameters(sizes)
        assert name not in exact or exact[name] == count.parameters(sizes)


def test_a_size_is_where_other_fields_are_laid_over() -> None:
    small = ModelConfig(size="gpt2", n_layers=2, vocab_size=100)
    assert (small.width, small.n_layers, small.vocab_size, small.positions) == (768, 2, 100, "learned")
    assert small == ModelConfig(**{**fields_of("gpt2"), "n_layers": 2, "vocab_size": 100})
    assert "size" not in small.model_dump()
    with pytest.raises(ValueError, match='no size is called "gpt5"'):
        ModelConfig(size="gpt5")
