"""Causal attention, by blocks of queries: memory linear in the length, forward and backward.

A block of queries is multiplied with the keys that some row of it can see only, which at least halves the
work of a masked square. Its probabilities are computed again in the backward pass (Dao et al. 2022,
FlashAttention, section 3.1), from whole rows of scores: on a CPU a block of them fits the cache, and no
running maximum is needed. Sliding windows, ALiBi and soft-capped scores are computed the same way.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.model.positions import alibi_slopes

BLOCK = 128


@dataclass(frozen=True)
class Scores:
    """How the scores of a layer are made of q · k."""

    scale: float
    """Factor of q · k."""
    window: int = 0
    """Tokens that a query sees, itself included; 0 = all."""
    alibi: bool = False
    """Whether a head's score falls with the distance (`positions.alibi_slopes`)."""
    softcap: float = 0.0
    """c: scores become c tanh(score / c), before ALiBi; 0 = none (Gemma 2)."""

    @property
    def plain(self) -> bool:
        """Whether PyTorch's own attention computes them."""
        return not (self.window or self.alibi or self.softcap)


@dataclass(frozen=True)
class Block:
    """Queries `begin` … `end` against the keys `first` … `end`.

    `mask` (B or 1, 1, rows, m) is added to the scores of the last m keys: 0 = seen, -inf = hidden.
    """

    begin: int
    end: int
    first: int
    mask: Tensor


def plan_blocks(ids: Tensor, segments: Tensor | None, dtype: torch.dtype, window: int = 0) -> list[Block]:
    """How the queries of a batch are cut into blocks. `ids` (B, T) gives the shape and the device.

    A segment is a run of equal numbers in a row of `segments` (B, T). Blocks whose rows all begin before
    it get the causal mask of their own square only.
    """
    n_tokens = ids.shape[1]
    index = torch.arange(n_tokens, device=ids.device)
    starts = None if segments is None else segment_starts(segments)
    if window:
        edge = (index - (window - 1)).clamp(min=0)[None]
        starts = edge if starts is None else starts.maximum(edge)
    earliest = [0] * n_tokens if starts is None else starts.amin(0).tolist()
    latest = [0] * n_tokens if starts is None else starts.amax(0).tolist()
    blocks = []
    for begin in range(0, n_tokens, BLOCK):
        end = min(begin + BLOCK, n_tokens)
        first = earliest[begin]
        if starts is None or latest[end - 1] <= first:
            hidden = (index[begin:end, None] < index[begin:end])[None]
        else:
            keys = index[first:end]
            hidden = (index[begin:end, None] < keys) | (keys < starts[:, begin:end, None])
        mask = torch.zeros(hidden.shape, dtype=dtype, device=ids.device)
        blocks.append(Block(begin, end, first, mask.masked_fill_(hidden, -math.inf)[:, None]))
    return blocks


def segment_starts(segments: Tensor) -> Tensor:
    """The index at which each token's segment begins: (B, T) -> (B, T)."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return index.where(begins, 0).cummax(1).values


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: list[Block], scores: Scores | None = None
) -> Tensor:
    """softmax(scores of q kᵀ) v over the earlier tokens of the same segment and window.

    q (B, H, T, head); k, v (B, H_kv, T, head), each shared by H / H_kv query heads. `scores`: default
    q kᵀ / √head. Returns (B, T, H, head).
    """
    return _CausalAttention.apply(q, k, v, blocks, scores or Scores(q.shape[-1] ** -0.5))


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: list[Block], scores: Scores) -> Tensor:
        b, h, t, head = q.shape
        q, k, v = q * scores.scale, k.flatten(0, 1), v.flatten(0, 1)
        out = q.new_empty(b, t, h, head)
        for block in blocks:
            p, _ = block_probabilities(_rows(q, k, block), k, block, b, scores)
            y = p @ v[:, block.first : block.end]
            out[:, block.begin : block.end] = y.view(b, h, -1, head).transpose(1, 2)
        ctx.save_for_backward(q, k, v)
        ctx.blocks, ctx.scores = blocks, scores
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        b, h, _, head = q.shape
        dout = grads[0].transpose(1, 2)
        dq = torch.empty_like(q)
        precise = torch.promote_types(k.dtype, torch.float32)
        dk, dv = torch.zeros_like(k, dtype=precise), torch.zeros_like(v, dtype=precise)
        for block in ctx.blocks:
            rows, keys = slice(block.begin, block.end), slice(block.first, block.end)
            q_rows, d = _rows(q, k, block), _rows(dout, k, block)
            p, slope = block_probabilities(q_rows, k, block, b, ctx.scores)
            dv[:, keys] += p.mT @ d
            dp = d @ v[:, keys].mT
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            if slope is not None:
                ds = ds * slope
            dq[:, :, rows] = (ds @ k[:, keys]).view(b, h, -1, head)
            dk[:, keys] += ds.mT @ q_rows
        heads = (b, -1)
        return (
            dq.mul_(ctx.scores.scale),
            dk.to(k.dtype).unflatten(0, heads),
            dv.to(v.dtype).unflatten(0, heads),
            None,
            None,
        )


def _rows(x: Tensor, k: Tensor, block: Block) -> Tensor:
    """A block of (B, H, T, head) as (B · H_kv, H / H_kv · rows, head): heads that share keys are rows."""
    return x[:, :, block.begin : block.end].reshape(k.shape[0], -1, x.shape[3])


def block_probabilities(
    q_rows: Tensor, k: Tensor, block: Block, batch_size: int, how: Scores
) -> tuple[Tensor, Tensor | None]:
    """(B · H_kv, H / H_kv · rows, keys), each row summing to one; and the soft cap's derivative, if any.

    q_rows (B · H_kv, H / H_kv · rows, head), scaled; k (B · H_kv, T, head).
    """
    scores, slope = q_rows @ k[:, block.first : block.end].mT, None
    if how.softcap or how.alibi:
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if how.softcap:
        bent = (scores / how.softcap).tanh_()
        slope, scores = (1 - bent.square()).to(k.dtype), bent * how.softcap
    each_head = scores.view(batch_size, -1, block.end - block.begin, scores.shape[2])
    if how.alibi:
        queries = torch.arange(block.begin, block.end, device=k.device)
        each_head += alibi(each_head.shape[1], queries, torch.arange(block.first, block.end, device=k.device))
    each_head[..., -block.mask.shape[3] :] += block.mask
    return scores.softmax(-1).to(k.dtype), slope


def alibi(n_heads: int, queries: Tensor, keys: Tensor) -> Tensor:
    """What ALiBi adds to the scores: (H, *queries, keys) float32, minus slope · distance."""
    distance = queries[..., None] - keys
    slopes = alibi_slopes(n_heads, keys.device)
    return -slopes.view(-1, *[1] * distance.ndim) * distance


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As `causal_attention`, by PyTorch's kernels: the fast way on a GPU. `mask`: see `square_mask`."""
    causal = mask is None
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)
    return y.transpose(1, 2)


def square_mask(segments: Tensor | None) -> Tensor | None:
    """(B, 1, T, T), True = seen; None where every row is one segment."""
    if segments is None or bool((segments == segments[:, :1]).all()):
        return None
    starts = segment_starts(segments)
    index = torch.arange(segments.shape[1], device=segments.device)
    return ((index <= index[:, None]) & (index >= starts[..., None]))[:, None]


def cached_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, how: Scores) -> Tensor:
    """Attention of new tokens over a cache: a query at position p sees the slots up to p, in its window.

    q (B, H, T, head); k, v (B, H_kv, S, head); positions (B or 1, T). Returns (B, T, H, head).
    """
    slots = torch.arange(k.shape[2], device=q.device)
    seen = slots <= positions[:, None, :, None]
    if how.window:
        seen &= slots > positions[:, None, :, None] - how.window
    bias = alibi(q.shape[1], positions, slots).transpose(0, 1) if how.alibi else None
    if q.shape[2] > 1 and not how.softcap:
        mask = seen if bias is None else bias.masked_fill(~seen, -math.inf).to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=how.scale, enable_gqa=True)
        return y.transpose(1, 2)
    # One token: memory decides the time, and each key and value is read once for all heads that share it.
    b, h, t, head = q.shape
    rows = q.reshape(b, k.shape[1], -1, head) * how.scale
    scores = (rows @ k.mT).view(b, h, t, -1)
    if how.softcap:
        scores = (scores.float() / how.softcap).tanh() * how.softcap
    if bias is not None:
        scores = scores + bias
    p = scores.masked_fill(~seen, -math.inf).softmax(-1).to(q.dtype)
    return (p.view(b, k.shape[1], -1, p.shape[-1]) @ v).view(b, h, t, head).transpose(1, 2)
