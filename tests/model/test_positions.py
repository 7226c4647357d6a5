"""Rotary frequencies and slopes against transformers, and what they are for."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

from danlu.model.config import ModelConfig, RopeScaling
from danlu.model.positions import alibi_slopes, rope_frequencies, rotary, rotate

LENGTHS = [100, 5000]
SCALINGS = [
    RopeScaling(kind="linear", factor=3.0),
    RopeScaling(kind="dynamic", factor=4.0, original=2048),
    RopeScaling(kind="llama3", factor=8.0, original=8192, low=1.0, high=4.0),
    RopeScaling(kind="yarn", factor=16.0, original=4096),
    RopeScaling(kind="yarn", factor=4.0, original=4096, low=2.0, high=20.0, attention=1.3, truncate=False),
]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_are_those_of_transformers(scaling: RopeScaling, theta: float, length: int) -> None:
    rope = {
        "rope_type": scaling.kind,
        "rope_theta": theta,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original,
    }
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
    if scaling.kind == "yarn":
        rope |= {"beta_slow": scaling.low, "beta_fast": scaling.high, "truncate": scaling.truncate}
        rope |= {"attention_factor": scaling.attention} if scaling.attention else {}
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=2048, rope_parameters=rope
    )
    want, factor = ROPE_INIT_FUNCTIONS[scaling.kind](config, "cpu", seq_len=length)
    got, ours = rope_frequencies(theta, 128, scaling, length)
    torch.testing.assert_close(got.float(), want, rtol=2e-5, atol=0)
    assert ours == pytest.approx(factor)


@pytest.mark.parametrize("n_heads", [1, 2, 3, 8, 12, 16, 20, 112])
def test_slopes_are_those_of_transformers(n_heads: int) -> None:
    torch.testing.assert_close(alibi_slopes(n_heads), _get_alibi_slopes(n_heads, torch.device("cpu")))


@pytest.mark.parametrize("rotated", [8, 16])
def test_scores_hang_on_the_distance_only(rotated: int) -> None:
    """Su et al. 2021, equation 16; to offsets of 100,000."""
    config = ModelConfig(width=32, n_heads=2, n_kv_heads=2, rope_width=rotated, max_positions=200_000)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def score(at: int) -> torch.Tensor:
        a, b = (rotate(x, rotary(config, 0, torch.tensor([[p]]))) for x, p in ((q, at + 7), (k, at)))
        return (a * b).sum()

    for offset in (1, 1000, 100_000):
        torch.testing.assert_close(score(offset), score(0), atol=1e-5, rtol=0)
    assert (score(0) - (q * k).sum()).abs() > 1e-3
