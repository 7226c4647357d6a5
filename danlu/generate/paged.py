"""The key-value cache in blocks, and attention over it for a row of tokens of many sequences."""

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from danlu.generate import kernels
from danlu.generate.blocks import Piece
from danlu.generate.kernels import POSITIONS
from danlu.generate.memory import room
from danlu.model.attention import BLOCK, Block, Scores, alibi, block_probabilities, fused_attention
from danlu.model.config import ModelConfig
from danlu.model.positions import alibi_slopes

try:
    from danlu.generate import gpu_kernels
except ModuleNotFoundError:  # Triton comes with PyTorch for GPUs only
    gpu_kernels = None  # type: ignore[assignment]

SHORT = 8
"""Most tokens of a piece whose attention the processor's kernel computes; longer ones are matrix products."""


class PagedCache:
    """Keys (L, blocks, G, E, P) and values (L, blocks, G, P, E) of all sequences; P tokens in a block."""

    def __init__(
        self, config: ModelConfig, n_blocks: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (config.n_layers, n_blocks, config.n_kv_heads)
        self.keys = room((*shape, config.head_width, POSITIONS), dtype, device)
        self.values = room((*shape, POSITIONS, config.head_width), dtype, device)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks, in order: from, to."""
        for old, new in pairs:
            self.keys[:, new] = self.keys[:, old]
            self.values[:, new] = self.values[:, old]

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Both as numpy arrays; bfloat16 as uint16."""
        return as_array(self.keys), as_array(self.values)


def as_array(tensor: Tensor) -> np.ndarray:
    """The same memory; bfloat16 as uint16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.detach().numpy()


def bytes_per_block(config: ModelConfig, dtype: torch.dtype) -> int:
    return 2 * config.n_layers * config.n_kv_heads * config.head_width * POSITIONS * dtype.itemsize


class Step:
    """One pass of the model over pieces of several sequences, one after the other in one row.

    It is the `cache` of `Transformer.hidden`. `exact`: every sum in one order, whatever else is in the step.
    """

    def __init__(self, cache: PagedCache, pieces: Sequence[Piece], exact: bool = False) -> None:
        self.cache, self.pieces, self.exact = cache, pieces, exact
        counts = [len(piece.tokens) for piece in pieces]
        self.ends = [*accumulate(counts)]
        self.rows = np.array([row for row, count in enumerate(counts) for _ in range(count)], dtype=np.int32)
        """Each token's piece."""
        begins = (piece.begin for piece in pieces)
        self.positions = np.array(
            [
                position
                for begin, n in zip(begins, counts, strict=True)
                for position in range(begin, begin + n)
            ]
        )
        longest = max(len(piece.blocks) for piece in pieces)
        self.tables = np.zeros((len(pieces), longest), np.int32)
        for row, piece in enumerate(pieces):
            self.tables[row, : len(piece.blocks)] = piece.blocks
        self.device = cache.keys.device

    def _is_short(self, piece: Piece) -> bool:
        return self.exact or len(piece.tokens) <= SHORT

    @cached_property
    def short(self) -> np.ndarray:
        """The tokens of short pieces."""
        return np.flatnonzero(np.array([self._is_short(piece) for piece in self.pieces])[self.rows])

    @cached_property
    def long(self) -> list[int]:
        """The long pieces."""
        return [number for number, piece in enumerate(self.pieces) if not self._is_short(piece)]

    def next_positions(self, n_tokens: int) -> Tensor:
        """(1, N), as `KVCache.next_positions`."""
        return torch.from_numpy(self.positions)[None].to(self.device)

    def advance(self, n_tokens: int) -> None:
        """The tables count what they hold."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scores: Scores
    ) -> Tensor:
        """Writes k, v (1, G, N, E) and returns the attention of q (1, H, N, E): (1, N, H, E)."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        blocks, slots = self._places
        keys[blocks, :, :, slots] = k[0].transpose(0, 1).to(keys.dtype)
        values[blocks, :, slots] = v[0].transpose(0, 1).to(values.dtype)
        return self.read(layer, q[0].transpose(0, 1), scores, q.dtype)[None]

    def read(self, layer: int, q: Tensor, scores: Scores, dtype: torch.dtype) -> Tensor:
        """The attention of q (N, H, E) over what the cache holds: (N, H, E) in `dtype`."""
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
        if len(self.short):
            self._read_short(layer, q, scores, out)
        for number in self.long:
            if scores.plain and self.device.type != "cpu":
                self._read_whole(number, layer, q, scores, out)
            else:
                self._read_long(number, layer, q, scores, out)
        return out

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        blocks = torch.from_numpy(self.tables[self.rows, self.positions // POSITIONS])
        slots = torch.from_numpy(self.positions % POSITIONS)
        return blocks.long().to(self.device), slots.to(self.device)

    def _read_short(self, layer: int, q: Tensor, scores: Scores, out: Tensor) -> None:
        """The tokens of all short pieces together."""
        if self.device.type != "cpu":
            self._gathered(layer, q, scores, out)
            return
        keys, values = self.cache.arrays
        everything = len(self.short) == len(self.rows)
        mine: Any = slice(None) if everything else torch.from_numpy(self.short)
        queries = q[mine].float().contiguous().numpy()
        found = np.empty_like(queries)
        kernels.attend(
            queries,
            keys[layer],
            values[layer],
            self.tables,
            self.rows[self.short],
            self.positions[self.short],
            scores.window,
            np.float32(scores.scale),
            np.float32(scores.softcap),
            alibi_slopes(q.shape[1]).numpy() if scores.alibi else np.zeros(0, np.float32),
            found,
        )
        out[mine] = torch.from_numpy(found).to(out.dtype)

    def _read_long(self, number: int, layer: int, q: Tensor, scores: Scores, out: Tensor) -> None:
        """One piece, by blocks of queries."""
        piece, end = self.pieces[number], int(self.ends[number])
        begin, total = end - len(piece.tokens), piece.begin + len(piece.tokens)
        first = max(0, piece.begin + 1 - scores.window) // POSITIONS if scores.window else 0
        table = torch.tensor(piece.blocks[first : -(-total // POSITIONS)], device=self.device)
        shift = first * POSITIONS
        k = self.cache.keys[layer][table].permute(1, 0, 3, 2).flatten(1, 2)[:, : total - shift]
        v = self.cache.values[layer][table].permute(1, 0, 2, 3).flatten(1, 2)[:, : total - shift]
        k, v = k.to(out.dtype), v.to(out.dtype)
        for at in range(begin, end, BLOCK):
            rows = q[at : min(at + BLOCK, end)].transpose(0, 1).to(out.dtype) * scores.scale
            n_rows = rows.shape[1]
            last = piece.begin - shift + at - begin + n_rows
            low = max(0, last - n_rows + 1 - scores.window) if scores.window else 0
            index = torch.arange(last - n_rows, last, device=self.device)[:, None]
            seen = torch.arange(low, last, device=self.device)
            hidden = index < seen
            if scores.window:
                hidden |= seen <= index - scores.window
            mask = torch.zeros(hidden.shape, dtype=out.dtype, device=self.device)
            block = Block(last - n_rows, last, low, mask.masked_fill_(hidden, -math.inf)[None, None])
            p, _ = block_probabilities(rows.reshape(len(k), -1, q.shape[2]), k, block, 1, scores)
            y = p @ v[:, low:last]
            out[at : at + n_rows] = y.view(q.shape[1], n_rows, -1).transpose(0, 1)

    def _read_whole(self, number: int, layer: int, q: Tensor, scores: Scores, out: Tensor) -> None:
        """As `_read_long`, by PyTorch's kernels: the fast way on a GPU."""
        piece, end = self.pieces[number], int(self.ends[number])
        rows, total = slice(end - len(piece.tokens), end), piece.begin + len(piece.tokens)
        table = torch.tensor(piece.blocks[: -(-total // POSITIONS)], device=self.device)
        k = self.cache.keys[layer][table].permute(1, 0, 3, 2).flatten(1, 2)[:, :total]
        v = self.cache.values[layer][table].permute(1, 0, 2, 3).flatten(1, 2)[:, :total]
        queries, mask = q[rows].transpose(0, 1)[None].to(out.dtype), None
        if piece.begin:
            index = torch.arange(total, device=self.device)
            mask = (index <= index[piece.begin :, None])[None, None]
        k, v = k[None].to(out.dtype), v[None].to(out.dtype)
        out[rows] = fused_attention(queries, k, v, mask, scores.scale)[0]

    def _gathered(self, layer: int, q: Tensor, scores: Scores, out: Tensor) -> None:
        """As the processor's kernel."""
        index, rows, positions = self._short_tensors
        tables = torch.from_numpy(self.tables).long().to(self.device)[rows]
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        out[index] = token_attention(q[index].to(out.dtype), keys, values, tables, positions, scores)

    @cached_property
    def _short_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.from_numpy(self.short)
        rows, positions = torch.from_numpy(self.rows).long(), torch.from_numpy(self.positions)
        return index.to(self.device), rows[index].to(self.device), positions[index].to(self.device)


def token_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, positions: Tensor, scores: Scores
) -> Tensor:
    """Attention of one token of each of N sequences over a layer of the cache: (N, H, E).

    q (N, H, E); tables (N, S): the blocks that hold a token's sequence; positions (N,).
    """
    if q.is_cuda and gpu_kernels is not None and gpu_kernels.fits(q, keys):
        return gpu_kernels.attend(q, keys, values, tables, positions, scores)
    return gathered_attention(q, keys, values, tables, positions, scores)


def gathered_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, positions: Tensor, scores: Scores
) -> Tensor:
    """`token_attention` by PyTorch: keys and values are copied into a row of a batch."""
    k = keys[tables].permute(0, 2, 1, 4, 3).flatten(2, 3).to(q.dtype)  # (N, G, S P, E)
    v = values[tables].permute(0, 2, 1, 3, 4).flatten(2, 3).to(q.dtype)
    slots = torch.arange(k.shape[2], device=q.device)
    hidden = slots > positions[:, None]
    if scores.window:
        hidden |= slots <= positions[:, None] - scores.window
    grouped = q.view(len(q), k.shape[1], -1, k.shape[3]) * scores.scale
    s = (grouped @ k.mT).float().flatten(1, 2)
    if scores.softcap:
        s = (s / scores.softcap).tanh() * scores.softcap
    if scores.alibi:
        s = s + alibi(q.shape[1], positions, slots).transpose(0, 1)
    p = s.masked_fill(hidden[:, None], -math.inf).softmax(-1).to(q.dtype)
    return (p.view(*grouped.shape[:3], -1) @ v).flatten(1, 2)
