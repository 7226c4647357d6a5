"""The one rule of what a token's prediction may see, for the codec and for bits per byte.

A text's tokens are cut into N streams of equal length that run side by side. Each starts like a document;
when its context is full, it goes on from the last quarter of it, read again.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from danlu.core.allocator import keep_freed_memory
from danlu.model.cache import KVCache
from danlu.model.transformer import Transformer

TOKENS_PER_STREAM = 2048
MOST_STREAMS = 96


def n_streams(n_tokens: int) -> int:
    """One stream for each 2,048 tokens: each has to warm up alone, but more of them are faster."""
    return max(1, min(MOST_STREAMS, n_tokens // TOKENS_PER_STREAM))


def stream_lengths(n_tokens: int, streams: int) -> np.ndarray:
    """(N,) tokens in each stream; the first ones are one longer where it doesn't divide."""
    return np.array([n_tokens // streams + (i < n_tokens % streams) for i in range(streams)])


def split_streams(tokens: list[int], streams: int) -> np.ndarray:
    """(N, longest) int64; short streams are padded with 0."""
    lengths = stream_lengths(len(tokens), streams)
    rows = np.zeros((streams, lengths.max()), np.int64)
    begin = 0
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = tokens[begin : begin + length]
        begin += length
    return rows


def kept(window: int) -> int:
    """Tokens of a full context that are read again. More of them predict a little better, and cost time."""
    return max(1, window // 4)


class Stepper:
    """Predicts N streams token by token, the same computation at the same shapes for coder and decoder."""

    def __init__(self, model: Transformer, streams: int, start: int, window: int) -> None:
        """`start`: id that stands before the first token; `window`: the largest context."""
        self.model, self.window, self.kept = model, window, kept(window)
        keep_freed_memory()
        self.cache = self._new_cache(streams)
        self.history = torch.full((streams, 1), start)

    def _new_cache(self, streams: int) -> KVCache:
        return KVCache(self.model.config, streams, self.window, self.model.head_weight.dtype)

    @torch.no_grad()
    def probabilities(self) -> np.ndarray:
        """(N, V) float32: of the next token of each stream."""
        fresh = self.history[:, -1:]
        if self.cache.lengths[0] == self.window:
            self.window_is_full()
            fresh = self.history[:, -self.kept :]
            self.cache = self._new_cache(len(self.history))
        hidden = self.model.hidden(fresh, cache=self.cache)[:, -1]
        return self.model.logits(hidden).softmax(dim=-1).numpy()

    def window_is_full(self) -> None:
        """Called before the kept part is read again; `history` holds `window` + 1 tokens of each stream."""

    def push(self, tokens: np.ndarray) -> None:
        """The tokens (N,) that came."""
        self.history = torch.cat((self.history[:, -self.window :], torch.from_numpy(tokens)[:, None]), dim=1)


def scoring_windows(
    streams: np.ndarray, lengths: np.ndarray, start: int, window: int, keep: int | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The same predictions, many at a time: (ids (N, T), targets (N, T), weights (N, T)).

    The first window predicts `window` tokens; each later one reads what is kept (`keep` of them, by default
    as the codec does), and predicts the rest.
    """
    keep = kept(window) if keep is None else keep
    n, longest = streams.shape
    ids = torch.cat((torch.full((n, 1), start), torch.from_numpy(streams)), dim=1)
    inside = torch.arange(longest) < torch.from_numpy(lengths)[:, None]
    begin, scored = 0, 0
    while scored < longest:
        end = min(begin + window, longest)
        weights = inside[:, begin:end].float()
        weights[:, : scored - begin] = 0
        yield ids[:, begin:end], ids[:, begin + 1 : end + 1], weights
        begin, scored = end - keep + 1, end
