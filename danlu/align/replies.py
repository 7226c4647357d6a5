"""Replies in a packed batch: which tokens are whose, and which of them are compared."""

from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.tokens.loader import RANKS, Batch


@dataclass(frozen=True)
class Replies:
    """The S replies of a batch of preferences, in the order in which they stand there."""

    tokens: Tensor
    """(N,) where in the flattened batch the tokens are that count"""
    of_token: Tensor
    """(N,) the reply of each"""
    group: Tensor
    """(S,) a number for each prompt"""
    rank: Tensor
    """(S,) 0 = the best reply to its prompt"""

    def sums(self, values: Tensor) -> Tensor:
        """(S,) of values (B, T) over each reply's tokens."""
        found = values.flatten()[self.tokens]
        return found.new_zeros(len(self.rank)).index_add(0, self.of_token, found)

    @property
    def lengths(self) -> Tensor:
        """(S,) tokens of each reply."""
        return torch.zeros_like(self.rank).index_add(0, self.of_token, torch.ones_like(self.of_token))

    @property
    def ends(self) -> Tensor:
        """(S,) where in the flattened batch the token is read that ends each reply."""
        last = torch.zeros_like(self.rank).scatter_reduce(0, self.of_token, self.tokens, "amax")
        return last + 1  # a target stands one place before itself

    def pairs(self) -> tuple[Tensor, Tensor]:
        """(better, worse): the numbers of the replies of each pair with the same prompt."""
        same = self.group[:, None] == self.group
        better, worse = (same & (self.rank[:, None] < self.rank)).nonzero(as_tuple=True)
        return better, worse


def replies_of(batch: Batch) -> Replies:
    """The replies of a batch of preferences."""
    row = torch.arange(len(batch.segments), device=batch.segments.device)[:, None]
    prompt = row * (batch.segments.max() // RANKS + 1) + batch.segments // RANKS
    number = (prompt * RANKS + batch.segments % RANKS).flatten()
    tokens = ((batch.weights > 0) & (batch.segments >= 0)).flatten().nonzero()[:, 0]
    present, of_token = number[tokens].unique(return_inverse=True)
    return Replies(tokens, of_token, present // RANKS, present % RANKS)
