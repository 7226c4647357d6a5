"""Sampling against transformers' processors, and drawn frequencies against the exact distribution."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from danlu.core.errors import UserError
from danlu.generate.sampling import SamplingParams, choose, top_k, top_p, warp


@st.composite
def logits(draw: st.DrawFn) -> Tensor:
    """(rows, vocabulary); every other one is rounded, so that many are equal."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    values = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.1, 1.0, 10.0]))
    return values.round() if draw(st.booleans()) else values


@given(logits(), st.integers(1, 50))
def test_top_k_is_that_of_transformers(values: Tensor, k: int) -> None:
    assert torch.equal(top_k(values, k), TopKLogitsWarper(k)(None, values))


@given(logits())
def test_zero_top_k_and_full_top_p_keep_everything(values: Tensor) -> None:
    assert torch.equal(top_k(values, 0), values)
    assert torch.equal(top_p(values, 1.0), values)


@given(logits(), st.floats(0.001, 0.999))
@settings(max_examples=300)
def test_top_p_is_that_of_transformers(values: Tensor, p: float) -> None:
    """Which of several equal tokens stays is free, so that their logits are compared."""
    sums = values.double().softmax(-1).sort(descending=True).values.cumsum(-1)
    assume(float((sums - p).abs().min()) > 1e-5)  # a sum that rounding moves across p
    ours, other = top_p(values, p), TopPLogitsWarper(p)(None, values)
    assert torch.equal(ours.sort().values, other.sort().values)
    kept = ours > -math.inf
    assert torch.equal(ours[kept], values[kept])


@given(logits(), st.floats(0.05, 20), st.integers(0, 50), st.floats(0.01, 1))
def test_the_three_together_are_those_of_transformers(values: Tensor, t: float, k: int, p: float) -> None:
    theirs = TemperatureLogitsWarper(t)(None, values)
    theirs = TopKLogitsWarper(k)(None, theirs) if k else theirs
    sums = theirs.double().softmax(-1).sort(descending=True).values.cumsum(-1)
    assume(p == 1 or float((sums - p).abs().min()) > 1e-5)
    theirs = TopPLogitsWarper(p)(None, theirs) if p < 1 else theirs
    ours = warp(values, SamplingParams(temperature=t, top_k=k, top_p=p))
    torch.testing.assert_close(
        ours.softmax(-1).sort().values, theirs.softmax(-1).sort().values, atol=1e-5, rtol=1e-4
    )


@given(logits(), st.floats(1e-320, 1e-6))
def test_a_temperature_near_zero_draws_the_most_probable(values: Tensor, temperature: float) -> None:
    generators = [torch.Generator().manual_seed(row) for row in range(len(values))]
    tokens = choose(values, SamplingParams(temperature=temperature), generators)
    gaps = values.amax(-1) - values[torch.arange(len(values)), tokens]
    assert float(gaps.max()) <= 1e-4


@given(logits())
def test_temperature_zero_is_greedy(values: Tensor) -> None:
    tokens = choose(values, SamplingParams(temperature=0), [])
    assert torch.equal(tokens, values.argmax(-1))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=6),
        SamplingParams(temperature=1.5, top_p=0.8),
        SamplingParams(temperature=1.2, top_k=8, top_p=0.9),
    ],
)
def test_frequencies_are_the_distribution(params: SamplingParams) -> None:
    """Pearson's chi-square, expected and variance of its distribution known: (k - 1) and 2 (k - 1)."""
    n, row = 20_000, torch.randn(12, generator=torch.Generator().manual_seed(5)) * 1.5
    scores = TemperatureLogitsWarper(params.temperature)(None, row[None])
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    expected = n * scores.double().softmax(-1)[0]
    generator = torch.Generator().manual_seed(0)
    counts = choose(row.expand(n, -1), params, [generator] * n).bincount(minlength=12)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    freedom = int(possible.sum()) - 1
    statistic = float(((counts - expected).square() / expected)[possible].sum())
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


@given(logits(), st.integers(0, 1000), st.floats(0.1, 2), st.floats(0.1, 1))
def test_a_draw_depends_on_its_own_row_only(values: Tensor, seed: int, t: float, p: float) -> None:
    params = SamplingParams(temperature=t, top_p=p)
    rows = range(len(values))
    together = choose(values, params, [torch.Generator().manual_seed(seed + row) for row in rows])
    for row in rows:
        alone = choose(values[[row]], params, [torch.Generator().manual_seed(seed + row)])
        assert alone.item() == together[row]


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_a_number_out_of_range_is_named(wrong: dict[str, float]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(UserError, match=f"{name} is {value}"):
        SamplingParams(**wrong)
