"""`danlu dpo`: a policy learns from preferences directly, without a model of rewards.

Each pair of replies to one prompt is one step towards the better one; the reference is the model as it was
before, frozen, and of an adapter the model below it.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from danlu.align.config import DPOConfig
from danlu.align.preference_losses import PAIR_LOSSES, WITHOUT_REFERENCE, Pairs
from danlu.align.replies import Replies, replies_of
from danlu.core.errors import UserError
from danlu.model.cross_entropy import log_probabilities
from danlu.model.lora import adapted_layers, without_adapter
from danlu.model.transformer import Transformer
from danlu.tokens.loader import Batch
from danlu.train.loop import Hooks, train
from danlu.train.result import TrainResult


def dpo(config: DPOConfig, hooks: Hooks | None = None) -> TrainResult:
    """Trains the model that `init_from` names on preferences; loss and accuracy on held-out pairs."""
    if config.init_from is None:
        raise UserError(f"{config.loss}: init_from is required and missing", "name a chat model's folder")
    if config.parallel != "ddp":
        raise UserError(
            f"dpo with parallel {config.parallel}: its reference isn't spread", "set parallel ddp"
        )
    return train(config, "preferences", hooks, lambda model: PreferencePairs(model, config))


class PreferencePairs:
    """A loss of `PAIR_LOSSES`, the mean over all pairs of replies to one prompt."""

    nothing, measure = "a batch has no pair of replies", "held_out_loss"

    def __init__(self, model: Transformer, config: DPOConfig) -> None:
        """`model`: as it is before the run. It is copied, unless it has an adapter."""
        self.config, self.loss_of = config, PAIR_LOSSES[config.loss]
        self.shown: dict[str, float] = {}
        self.reference: Transformer | None = None
        if config.loss not in WITHOUT_REFERENCE and not adapted_layers(model):
            self.reference = copy.deepcopy(model).requires_grad_(False).eval()

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(len(replies_of(batch).pairs()[0]), dtype=torch.float64, device=batch.ids.device)

    def loss(self, model: Transformer, batch: Batch, count: float) -> Tensor:
        return self.loss_of(self._pairs(model, batch), self.config.numbers).sum() / count

    def sums(self, model: Transformer, batch: Batch) -> Sequence[float]:
        pairs = self._pairs(model, batch)
        losses, margins = self.loss_of(pairs, self.config.numbers), self._margins(pairs)
        right = (margins > 0).double() + 0.5 * (margins == 0)
        return float(losses.sum()), float(len(losses)), float(right.sum()), float(margins.sum())

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        loss, n, right, margin = sums
        return {"held_out_loss": loss / n, "accuracy": right / n, "reward_margin": margin / n} if n else {}

    def text(self, figures: dict[str, float]) -> str:
        return (
            f"held-out loss {figures['held_out_loss']:.4f} a pair, the chosen reply has the higher reward in "
            f"{figures['accuracy']:.1%}, by {figures['reward_margin']:.3f} in the mean"
        )

    def finish(self, model: Transformer) -> None:
        """Nothing."""

    def _pairs(self, model: Transformer, batch: Batch) -> Pairs:
        replies = replies_of(batch)
        own = replies.sums(log_probabilities(model, batch, counted=True))
        reference = torch.zeros_like(own)
        if self.config.loss not in WITHOUT_REFERENCE:
            reference = self._reference(model, batch, replies)
        better, worse = replies.pairs()
        lengths = replies.lengths
        return Pairs(
            own[better], own[worse], reference[better], reference[worse], lengths[better], lengths[worse]
        )

    @torch.no_grad()
    def _reference(self, model: Transformer, batch: Batch, replies: Replies) -> Tensor:
        if self.reference is None:
            with without_adapter(model):
                return replies.sums(log_probabilities(model, batch, counted=True))
        self.reference.compute_dtype = model.compute_dtype
        return replies.sums(log_probabilities(self.reference, batch, counted=True))

    def _margins(self, pairs: Pairs) -> Tensor:
        """By how much the chosen reply's implicit reward is higher."""
        if self.config.loss in WITHOUT_REFERENCE:  # there a reward is a mean over tokens
            return self.config.numbers.beta * (
                pairs.chosen / pairs.chosen_tokens - pairs.rejected / pairs.rejected_tokens
            )
        return self.config.numbers.beta * pairs.delta
