"""Attention of single tokens over the cache on a GPU, in Triton, which comes with PyTorch there.

Keys and values are read once, where they lie, for all heads that share them (Dao et al. 2022,
FlashAttention, algorithm 1: a running maximum, and sums that are scaled to it). A long sequence is read by
several programs, each a part of its positions, whose sums another kernel scales to the largest maximum and
adds (Dao et al. 2023, Flash-Decoding): one sequence alone would keep a few of a hundred processors busy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from danlu.generate.kernels import POSITIONS
from danlu.model.attention import Scores
from danlu.model.positions import alibi_slopes

TILE = 64
"""Positions that are read at a time."""
ROWS = 16
"""Least rows of a product; heads that share keys are filled up to it."""
PROGRAMS = 2
"""For each processor, at most, when sequences are split."""


def fits(q: Tensor, keys: Tensor) -> bool:
    """Whether the kernel can read such heads."""
    return 16 <= q.shape[2] <= 256 and q.dtype == keys.dtype


def attend(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, positions: Tensor, scores: Scores
) -> Tensor:
    """As `paged.gathered_attention`."""
    n, n_heads, width = q.shape
    groups = keys.shape[1]
    n_splits = splits(n * groups, tables.shape[1] * POSITIONS, q.device)
    out = torch.empty_like(q)
    parts = torch.empty(n, n_heads, n_splits, width, dtype=torch.float32, device=q.device)
    peaks, totals = torch.empty(2, n, n_heads, n_splits, dtype=torch.float32, device=q.device)
    slopes = alibi_slopes(n_heads, q.device) if scores.alibi else q
    _attend[(n, groups, n_splits)](
        q,
        keys,
        values,
        tables,
        tables.stride(0),
        positions,
        positions.stride(0),
        slopes,
        parts,
        peaks,
        totals,
        scores.scale,
        scores.softcap,
        scores.window,
        shared=n_heads // groups,
        rows=max(ROWS, triton.next_power_of_2(n_heads // groups)),
        width=width,
        columns=triton.next_power_of_2(width),
        slots=POSITIONS,
        tile=TILE,
        has_softcap=scores.softcap > 0,
        has_window=scores.window > 0,
        has_alibi=scores.alibi,
    )
    columns = triton.next_power_of_2(width)
    _combine[(n, n_heads)](parts, peaks, totals, out, n_splits=n_splits, width=width, columns=columns)
    return out


def splits(n_rows: int, capacity: int, device: torch.device) -> int:
    """Parts of each of `n_rows`: a power of two, a tile or more each, and no more than run at once."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    most = max(1, min(triton.cdiv(capacity, TILE), PROGRAMS * processors // n_rows))
    return 1 << (most.bit_length() - 1)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]  # Triton reads annotations as its own
    q,
    keys,
    values,
    tables,
    table_stride,
    positions,
    position_stride,
    slopes,
    parts,
    peaks,
    totals,
    scale,
    softcap,
    window,
    shared: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
    columns: tl.constexpr,
    slots: tl.constexpr,
    tile: tl.constexpr,
    has_softcap: tl.constexpr,
    has_window: tl.constexpr,
    has_alibi: tl.constexpr,
):
    token, group, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + token * position_stride)
    head = tl.arange(0, rows)
    mine = head < shared
    entries = tl.arange(0, columns)
    inside = entries < width
    row = (token * tl.num_programs(1) + group) * shared + head
    queries = tl.load(
        q + row[:, None] * width + entries[None, :], mask=mine[:, None] & inside[None, :], other=0.0
    )
    if has_alibi:
        slope = tl.load(slopes + group * shared + head, mask=mine, other=0.0)
    highest = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    mixed = tl.zeros([rows, columns], tl.float32)
    begin = 0
    if has_window:
        begin = tl.maximum(position + 1 - window, 0) // tile * tile
    part = tl.cdiv(tl.cdiv(position + 1 - begin, tile), tl.num_programs(2)) * tile
    begin += split * part
    for first in range(begin, tl.minimum(begin + part, position + 1), tile):
        index = first + tl.arange(0, tile)
        seen = index <= position
        if has_window:
            seen = seen & (index > position - window)
        block = tl.load(tables + token * table_stride + index // slots, mask=seen, other=0)
        base = (block * tl.num_programs(1) + group) * (slots * width)
        slot = index % slots
        k = tl.load(
            keys + base[None, :] + entries[:, None] * slots + slot[None, :],
            mask=seen[None, :] & inside[:, None],
            other=0.0,
        )
        s = tl.dot(queries, k, input_precision="ieee") * scale
        if has_softcap:
            bent = s / softcap
            s = softcap * (2.0 / (1.0 + tl.exp(-2.0 * bent)) - 1.0)
        if has_alibi:
            s = s - slope[:, None] * (position - index)[None, :].to(tl.float32)
        s = tl.where(seen[None, :], s, float("-inf"))
        higher = tl.maximum(highest, tl.max(s, 1))
        p = tl.exp(s - higher[:, None])
        kept = tl.exp(highest - higher)
        v = tl.load(
            values + base[:, None] + slot[:, None] * width + entries[None, :],
            mask=seen[:, None] & inside[None, :],
            other=0.0,
        )
        total = total * kept + tl.sum(p, 1)
        mixed = mixed * kept[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        highest = higher
    place = row * tl.num_programs(2) + split
    tl.store(peaks + place, highest, mask=mine)
    tl.store(totals + place, total, mask=mine)
    tl.store(parts + place[:, None] * width + entries[None, :], mixed, mask=mine[:, None] & inside[None, :])


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    parts, peaks, totals, out, n_splits: tl.constexpr, width: tl.constexpr, columns: tl.constexpr
):
    """The weighted mean of the parts; an empty one has a peak of minus infinity, which makes its weight 0."""
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    place, entries = row * n_splits + tl.arange(0, n_splits), tl.arange(0, columns)
    inside = entries < width
    peak = tl.load(peaks + place)
    weight = tl.exp(peak - tl.max(peak, 0))
    mixed = tl.load(parts + place[:, None] * width + entries[None, :], mask=inside[None, :], other=0.0)
    total = tl.sum(weight * tl.load(totals + place), 0)
    found = tl.sum(weight[:, None] * mixed, 0) / total
    tl.store(out + row * width + entries, found.to(out.dtype.element_ty), mask=inside)
