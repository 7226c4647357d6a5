"""What a training run makes small. There is one loop; an objective is handed to it."""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from danlu.model.cross_entropy import linear_cross_entropy, log_probabilities
from danlu.model.transformer import Transformer
from danlu.tokens.loader import Batch
from danlu.tokens.tokenizer import Tokenizer
from danlu.train.checkpoint import NOTHING


class Objective(Protocol):
    """A mean over what `count` counts: supervised tokens, pairs of replies …

    It is a mean over the whole step: all micro-batches and processes, however a batch is cut.
    """

    nothing: str
    """What is said of a batch that counts nothing."""
    measure: str
    """The first of its figures."""

    @property
    def kept(self) -> Mapping[str, Tensor]:
        """Further tensors that a checkpoint keeps, and puts back in place."""
        ...

    @property
    def shown(self) -> dict[str, float]:
        """Further figures of the last step, for its row and the progress line; all processes ask together."""
        ...

    def count(self, batch: Batch) -> Tensor:
        """Of one micro-batch; a float64 scalar."""
        ...

    def loss(self, model: Transformer, batch: Batch, count: float) -> Tensor:
        """The micro-batch's share of the mean, a scalar with a gradient; `count` is the whole step's."""
        ...

    def sums(self, model: Transformer, batch: Batch) -> Sequence[float]:
        """Of a batch of held-out data, without a gradient: what `figures` takes, added over all batches."""
        ...

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """By name; empty where nothing was counted."""
        ...

    def text(self, figures: dict[str, float]) -> str:
        """The figures in a line."""
        ...

    def finish(self, model: Transformer) -> None:
        """Takes off what only the training needed."""
        ...


class LanguageModelling:
    """Nats per supervised token."""

    nothing, measure, kept = "a batch has no supervised token", "held_out_loss", NOTHING

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        """`tokenizer`: for bits per byte of held-out data."""
        self.shown: dict[str, float] = {}
        entries = [] if tokenizer is None else tokenizer.token_bytes
        self.token_bytes = torch.tensor([len(entry) for entry in entries])
        """(V,) the bytes each token decodes to; special tokens stand for no text."""

    def count(self, batch: Batch) -> Tensor:
        return batch.weights.double().sum()

    def loss(self, model: Transformer, batch: Batch, count: float) -> Tensor:
        hidden = model.hidden(batch.ids, batch.positions, batch.segments).flatten(0, 1)
        weights, targets = batch.weights.flatten() / count, batch.targets.flatten()
        cap = model.config.logit_softcap
        return linear_cross_entropy(hidden, model.head_weight, targets, weights, model.head_bias, cap)

    def sums(self, model: Transformer, batch: Batch) -> Sequence[float]:
        nats = -(log_probabilities(model, batch).double() * batch.weights).sum()
        self.token_bytes = self.token_bytes.to(batch.targets.device)
        text_bytes = (self.token_bytes[batch.targets] * (batch.weights > 0)).sum()
        return float(nats), float(batch.weights.sum()), float(text_bytes)

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        nats, tokens, text_bytes = sums
        if not tokens:
            return {}
        bits = nats / math.log(2)
        return {
            "held_out_loss": nats / tokens,
            "bits_per_byte": bits / text_bytes if text_bytes else math.nan,
        }

    def text(self, figures: dict[str, float]) -> str:
        loss, bits = figures["held_out_loss"], figures["bits_per_byte"]
        return f"held-out loss {loss:.4f} nats a token, {bits:.4f} bits a byte"

    def finish(self, model: Transformer) -> None:
        """Nothing."""
