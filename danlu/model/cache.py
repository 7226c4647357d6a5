"""The key-value cache of incremental decoding."""

from typing import Protocol

import torch
from torch import Tensor

from danlu.core.errors import UserError
from danlu.model.attention import Scores, cached_attention
from danlu.model.config import ModelConfig


class Cache(Protocol):
    """What the model asks of a cache."""

    def next_positions(self, n_tokens: int) -> Tensor:
        """Positions (B, n_tokens) of the tokens of this call."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scores: Scores
    ) -> Tensor:
        """Keeps k and v (B, H_kv, T, head), and reads with q (B, H, T, head): (B, T, H, head)."""

    def advance(self, n_tokens: int) -> None:
        """Called after the last layer."""


class KVCache:
    """Keys and values of the tokens read so far, for a batch of rows that may differ in length.

    A call `model(ids, cache=cache)` appends `ids` (B, T) to every row and advances every row by T.
    Rows of different lengths are read as one right-padded batch; then `set_lengths` takes the padding
    back, and the next tokens overwrite it. A query sees the slots up to its own position only, so that
    what lies beyond a row's length is never seen.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """`length` is the largest number of tokens in a row."""
        if length > config.max_positions:
            raise UserError(
                f"a cache of {length} tokens: the model has {config.max_positions} positions",
                "shorten the prompt or generate fewer tokens",
            )
        shape = (config.n_layers, batch_size, config.n_kv_heads, length, config.head_width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * batch_size

    @property
    def batch_size(self) -> int:
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def set_lengths(self, lengths: list[int]) -> None:
        """Cuts row i to its first `lengths[i]` tokens."""
        self.lengths = list(lengths)

    def select(self, rows: list[int]) -> None:
        """Keeps `rows` in this order (a row may repeat): for beams, and for dropping finished rows."""
        index = torch.tensor(rows, device=self.keys.device)
        self.keys = self.keys.index_select(1, index)
        self.values = self.values.index_select(1, index)
        self.lengths = [self.lengths[row] for row in rows]

    def next_positions(self, n_tokens: int) -> Tensor:
        """Positions (B, n_tokens) of the next tokens of every row."""
        if max(self.lengths) + n_tokens > self.capacity:
            raise UserError(
                f"{max(self.lengths) + n_tokens} tokens in a cache of {self.capacity}",
                "shorten the prompt or generate fewer tokens",
            )
        starts = torch.tensor(self.lengths, device=self.keys.device)
        return starts[:, None] + torch.arange(n_tokens, device=self.keys.device)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scores: Scores
    ) -> Tensor:
        """See `Cache`."""
        self._write(layer, positions, k, v)
        k, v = self._read(layer, q.shape[2])
        return cached_attention(q, k, v, positions, scores)

    def _write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores k and v (B, H_kv, T, head) of `layer` at `positions` (B, T)."""
        n_tokens = positions.shape[1]
        if len(set(self.lengths)) == 1:
            start = self.lengths[0]
            self.keys[layer, :, :, start : start + n_tokens] = k
            self.values[layer, :, :, start : start + n_tokens] = v
        else:
            index = positions[:, None, :, None].expand_as(k)
            self.keys[layer].scatter_(2, index, k)
            self.values[layer].scatter_(2, index, v)

    def _read(self, layer: int, n_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H_kv, S, head) of `layer`, S the longest row after `n_tokens` more."""
        end = max(self.lengths) + n_tokens
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, n_tokens: int) -> None:
        self.lengths = [length + n_tokens for length in self.lengths]
