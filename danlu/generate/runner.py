"""The model as the engine sees it: pieces of sequences in, the vectors of the tokens asked about out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from danlu.generate.blocks import Piece
from danlu.generate.paged import PagedCache, Step
from danlu.model.transformer import Transformer

SCORED_AT_ONCE = 2**25
"""Logits that are held while targets are scored."""


class Runner:
    """Runs any model, on any device, as the transformer stands: its live weights are the current ones."""

    def __init__(self, model: Transformer, cache: PagedCache, exact: bool = False) -> None:
        """`exact`: the deterministic mode."""
        self.model, self.cache, self.exact = model, cache, exact
        scaling = model.config.rope_scaling
        self.whole = scaling is not None and scaling.kind in ("dynamic", "longrope")
        """Whether a sequence has to be read in one piece, and alone: angles hang on its length."""
        self.versions = self._versions()

    def refresh(self) -> bool:
        """Whether the weights have changed since the last call: by training, or by a file that was loaded."""
        versions = self._versions()
        if versions == self.versions:
            return False
        self.versions = versions
        return True

    def _versions(self) -> list[int]:
        """PyTorch counts the changes of each tensor. (It misses those through `.data`.)"""
        return [parameter._version for parameter in self.model.parameters()]

    @torch.no_grad()
    def run(
        self,
        pieces: Sequence[Piece],
        roots: Sequence[int],
        copies: Sequence[tuple[int, int]],
        wanted: Sequence[int],
    ) -> Tensor:
        """(wanted, D): what the output matrix is multiplied with. `copies`: blocks, before all else."""
        self.cache.copy(copies)
        step = Step(self.cache, pieces, self.exact)
        ids = torch.tensor([[token for piece in pieces for token in piece.tokens]], device=step.device)
        hidden = self.model.hidden(ids, cache=step)[0]
        return (
            hidden
            if len(wanted) == len(hidden)
            else hidden[torch.tensor(wanted, dtype=torch.long, device=step.device)]
        )

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, V) float32."""
        return self.model.logits(hidden).float()

    @torch.no_grad()
    def score(self, hidden: Tensor, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of each row the log-probability of its target, and whether it is the most probable token."""
        ids = torch.tensor(targets, device=hidden.device)
        logprobs, greedy = [], []
        size = max(1, SCORED_AT_ONCE // self.model.config.vocab_size)
        for rows, wanted in zip(hidden.split(size), ids.split(size), strict=True):
            logits = self.logits(rows)
            chosen = logits.gather(1, wanted[:, None])[:, 0]
            logprobs.append(chosen - logits.logsumexp(1))
            greedy.append(logits.argmax(1) == wanted)
        return torch.cat(logprobs).cpu(), torch.cat(greedy).cpu()
