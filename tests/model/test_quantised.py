"""Packed matrices against the published table, brute force, and a model with the unpacked weights."""

import copy

import pytest
import torch

from danlu.model.config import LoraConfig, ModelConfig
from danlu.model.count import BITS
from danlu.model.layers import Linear
from danlu.model.lora import adapted_layers, add_adapter
from danlu.model.quantised import QuantisedLinear, nf4_values, quantise, unpack
from danlu.model.transformer import Transformer

# QLoRA (Dettmers et al. 2023), appendix E; to all digits as in bitsandbytes 0.50.2 by the paper's authors
# (bitsandbytes/backends/utils.py, _NF4_QUANT_TABLE).
PUBLISHED = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
]
SIZES = ModelConfig(
    vocab_size=50,
    width=48,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_width=80,
    max_positions=64,
    qkv_bias=True,
)
IDS = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(1))


def test_the_sixteen_values_are_the_published_ones() -> None:
    torch.testing.assert_close(nf4_values(), torch.tensor(PUBLISHED), atol=1e-6, rtol=0)


def linear(n_out: int, n_in: int) -> Linear:
    torch.manual_seed(0)
    layer = Linear(n_in, n_out)
    torch.nn.init.normal_(layer.weight, std=0.02)
    layer.weight.data[0] *= 30  # a row that stands out
    return layer


@pytest.mark.parametrize(("n_out", "n_in"), [(300, 192), (7, 9)])
def test_nf4_takes_the_nearest_value_of_each_block(n_out: int, n_in: int) -> None:
    """Block by block, to what the second quantisation does to the factor: 2⁻⁴ of its distance to the mean."""
    layer = linear(n_out, n_in)
    weight, got = layer.weight.detach().flatten(), QuantisedLinear(layer, "nf4").weight.flatten()
    blocks = weight.split(64)
    largest = torch.stack([block.abs().max() for block in blocks])
    off = (largest - largest.mean()).abs()
    for number, (block, packed) in enumerate(zip(blocks, got.split(64), strict=True)):
        group = off[number // 256 * 256 :][:256].max()
        values = largest[number] * torch.tensor(PUBLISHED)
        best = (block[:, None] - values).abs().min(1).values
        slack = off[number] / 16 + group / 448
        assert ((packed - block).abs() <= best + 1.01 * slack + 1e-6).all()


def test_int8_is_within_half_a_step() -> None:
    layer = linear(40, 30)
    steps = layer.weight.detach().abs().amax(1, keepdim=True) / 127
    assert ((QuantisedLinear(layer, "int8").weight - layer.weight).abs() <= 0.501 * steps).all()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_bytes_are_what_the_paper_says(kind: str) -> None:
    layer = linear(512, 512)
    packed = QuantisedLinear(layer, kind)  # type: ignore[arg-type]
    held = sum(p.numel() * p.element_size() for p in packed.parameters())
    assert 8 * held / 512**2 == pytest.approx(BITS[kind], rel=0.01)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_gradients_are_those_on_the_unpacked_weights(kind: str) -> None:
    """And nothing of a matrix' size is kept for the backward pass."""
    torch.manual_seed(0)
    packed = Transformer(SIZES).eval()
    quantise(packed, kind)  # type: ignore[arg-type]
    plain = copy.deepcopy(packed)
    unpack(plain)
    assert not any(isinstance(module, QuantisedLinear) for module in plain.modules())
    lora = LoraConfig(rank=3, targets=("attention.*", "ffn.up"))
    for model in (packed, plain):
        torch.manual_seed(1)
        for p in add_adapter(model, lora):
            p.data.normal_(std=0.2)
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.add(t.shape), t)[1], lambda t: t):
        logits = packed(IDS)
    assert torch.equal(logits, plain(IDS))
    weight = torch.randn_like(logits)
    (logits * weight).sum().backward()
    (plain(IDS) * weight).sum().backward()
    others = adapted_layers(plain)
    assert len(others) == SIZES.n_layers * 5
    for name, layer in adapted_layers(packed).items():
        for mine, theirs in zip(layer.adapters.parameters(), others[name].adapters.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-5)
            assert mine.grad.abs().max() > 0
    matrices = {layer.base.weight.shape for layer in adapted_layers(packed).values()}
    assert not kept & (matrices | {shape[::-1] for shape in matrices})


def test_moving_to_another_dtype_keeps_what_is_packed() -> None:
    packed = QuantisedLinear(linear(64, 64), "nf4")
    before = packed.weight
    assert torch.equal(packed.to(torch.bfloat16).weight, before)
