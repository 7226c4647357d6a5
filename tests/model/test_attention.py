"""Attention by blocks against one masked square, over random packings."""

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from danlu.model.attention import (
    BLOCK,
    Scores,
    cached_attention,
    causal_attention,
    fused_attention,
    plan_blocks,
    segment_starts,
    square_mask,
)
from danlu.model.positions import alibi_slopes


def square(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, how: Scores | None = None) -> Tensor:
    """The definition, with the whole matrix of scores; returns (B, T, H, head)."""
    how = how or Scores(q.shape[3] ** -0.5)
    n_tokens, groups = q.shape[2], q.shape[1] // k.shape[1]
    seen = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()[None]
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None, :])
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.mT * how.scale
    index = torch.arange(n_tokens)
    if how.window:
        seen = seen & (index[:, None] - index < how.window)
    if how.softcap:
        scores = how.softcap * (scores / how.softcap).tanh()
    if how.alibi:
        scores = scores - alibi_slopes(q.shape[1])[:, None, None] * (index[:, None] - index)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def inputs(b: int, h: int, n_kv: int, t: int, head: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(b + h + t)
    shapes = [(b, h, t, head), (b, n_kv, t, head), (b, n_kv, t, head)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def packing(lengths: list[list[int]]) -> Tensor:
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])


@st.composite
def packings(draw: st.DrawFn) -> Tensor:
    """Segments (B, T) of random lengths; T often crosses a block."""
    t = draw(st.integers(1, 2 * BLOCK + 20))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = draw(st.lists(st.integers(1, t), max_size=8, unique=True))
        edges = sorted({0, t, *cuts})
        rows.append([end - begin for begin, end in itertools.pairwise(edges)])
    return packing(rows)


@settings(max_examples=25, deadline=None)
@given(segments=packings(), groups=st.sampled_from([1, 2]))
def test_output_and_gradient_of_random_packings(segments: Tensor, groups: int) -> None:
    q, k, v = inputs(len(segments), 2 * groups, 2, segments.shape[1], 4, torch.float64)
    blocks = plan_blocks(segments, segments, torch.float64)
    got, want = causal_attention(q, k, v, blocks), square(q, k, v, segments)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    expected = torch.autograd.grad((want * weight).sum(), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad((got * weight).sum(), (q, k, v)), expected)


HOW = [
    Scores(0.3, window=1),
    Scores(0.5, window=40),
    Scores(0.5, window=200),
    Scores(0.5, alibi=True),
    Scores(0.5, softcap=1.5),
    Scores(0.5, window=70, alibi=True, softcap=2.0),
]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("segments", [None, packing([[150, 150], [20, 280]])])
def test_windows_alibi_and_soft_caps(how: Scores, segments: Tensor | None) -> None:
    q, k, v = inputs(2, 6, 2, 300, 4, torch.float64)
    blocks = plan_blocks(q[:, 0, :, 0], segments, torch.float64, how.window)
    got, want = causal_attention(q, k, v, blocks, how), square(q, k, v, segments, how)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    weight = torch.randn_like(want)
    expected = torch.autograd.grad((want * weight).sum(), (q, k, v))
    found = torch.autograd.grad((got * weight).sum(), (q, k, v))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if how.window:  # no key that no query of the block sees is multiplied with
        assert all(block.end - block.first < how.window + BLOCK for block in blocks)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("new", [1, 5])
def test_new_tokens_over_a_cache(how: Scores, new: int) -> None:
    q, k, v = inputs(2, 6, 2, 90, 4, torch.float32)
    positions = torch.arange(90 - new, 90)[None]
    with torch.no_grad():
        got = cached_attention(q[:, :, -new:], k, v, positions, how)
        torch.testing.assert_close(got, square(q, k, v, None, how)[:, -new:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("segments", [None, packing([[50, 13], [1, 62]]), packing([[63]])])
def test_the_gpu_path_is_the_same_attention(segments: Tensor | None) -> None:
    q, k, v = inputs(2 if segments is None else len(segments), 4, 2, 63, 8, torch.float64)
    got = fused_attention(q, k, v, square_mask(segments), q.shape[-1] ** -0.5)
    torch.testing.assert_close(got, square(q, k, v, segments))


def test_gradient_by_finite_differences() -> None:
    q, k, v = inputs(1, 2, 1, 5, 4, torch.float64)
    segments = packing([[2, 3]])
    blocks = plan_blocks(segments, segments, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: causal_attention(*x, blocks), (q, k, v))


def test_bfloat16_is_as_near_as_its_rounding() -> None:
    q, k, v = inputs(2, 4, 4, 300, 32, torch.float32)
    low = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    got = causal_attention(*low, plan_blocks(q[:, 0, :, 0], None, torch.bfloat16))
    want = square(q, k, v, None)
    got.sum().backward()
    want.sum().backward()
    for a, b in [(got, want), *((x.grad, y.grad) for x, y in zip(low, (q, k, v), strict=True))]:
        assert (a.float() - b).norm() / b.norm() < 0.02


def test_blocks_without_a_boundary_pay_for_no_mask() -> None:
    segments = packing([[2 * BLOCK, BLOCK]])
    blocks = plan_blocks(segments, segments, torch.float32)
    assert [(b.begin, b.end, b.first) for b in blocks] == [
        (0, BLOCK, 0),
        (BLOCK, 2 * BLOCK, 0),
        (2 * BLOCK, 3 * BLOCK, 2 * BLOCK),  # the keys of the segment before are not read at all
    ]
    assert all(b.mask.shape == (1, 1, BLOCK, BLOCK) for b in blocks)


def test_segment_starts() -> None:
    segments = torch.tensor([[0, 0, 1, 1, -1], [3, 3, 3, 3, 3]])
    assert segment_starts(segments).tolist() == [[0, 0, 2, 2, 4], [0, 0, 0, 0, 0]]


LONG = """
import torch
from danlu.core.host import peak_rss_bytes
from danlu.model.attention import causal_attention, plan_blocks
q, k, v = (torch.randn(1, 1, 16384, 16, requires_grad=True) for _ in range(3))
before = peak_rss_bytes()
causal_attention(q, k, v, plan_blocks(q[:, 0, :, 0], None, torch.float32)).sum().backward()
print(peak_rss_bytes() - before)
"""


@pytest.mark.slow
def test_memory_is_linear_in_the_length() -> None:
    """At 16,384 tokens the square of scores of one head is 1 GiB, and the backward pass needs three."""
    result = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 200e6
