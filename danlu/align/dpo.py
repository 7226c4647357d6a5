"""`danlu dpo`: a policy learns from preferences directly, without a model of rewards.

Each pair of replies to one prompt is one step towards the better one; the reference is the model as it was
before, frozen, and of an adapter the model below it.
"""

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from danlu.align.config import DPOConfig
from danlu.align.preference_losses import PAIR_LOSSES, WITHOUT_REFERENCE, Pairs, kto
from danlu.align.replies import Replies, replies_of
from danlu.align.rollouts import pack
from danlu.core.errors import UserError
from danlu.model import parallel
from danlu.model.cross_entropy import log_probabilities
from danlu.model.lora import adapted_layers, without_adapter
from danlu.model.transformer import Transformer
from danlu.tokens.loader import RANKS, Batch
from danlu.train.checkpoint import NOTHING
from danlu.train.loop import Hooks, train
from danlu.train.result import TrainResult


def dpo(config: DPOConfig, hooks: Hooks | None = None) -> TrainResult:
    """Trains the model that `init_from` names on preferences; loss and accuracy on held-out pairs."""
    if config.parallel != "ddp":
        raise UserError(
            f"dpo with parallel {config.parallel}: its reference isn't spread", "set parallel ddp"
        )
    return train(config, "preferences", hooks, lambda model: make_objective(model, config))


def make_objective(model: Transformer, config: DPOConfig) -> "PreferencePairs":
    """Of the loss that the config names."""
    return (Judged if config.loss == "kto" else PreferencePairs)(model, config)


class PreferencePairs:
    """A loss of `PAIR_LOSSES`, the mean over all pairs of replies to one prompt."""

    nothing, measure, per = "a batch has no pair of replies", "held_out_loss", "pair"
    kept = NOTHING

    def __init__(self, model: Transformer, config: DPOConfig) -> None:
        """`model`: as it is before the run. It is copied, unless it has an adapter."""
        self.config = config
        self.shown: dict[str, float] = {}
        self.reference: Transformer | None = None
        if config.loss not in WITHOUT_REFERENCE and not adapted_layers(model):
            self.reference = copy.deepcopy(model).requires_grad_(False).eval()

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(len(replies_of(batch).pairs()[0]), dtype=torch.float64, device=batch.ids.device)

    def loss(self, model: Transformer, batch: Batch, count: float) -> Tensor:
        loss_of = PAIR_LOSSES[self.config.loss]
        return loss_of(self._pairs(model, batch), self.config.numbers).sum() / count

    def sums(self, model: Transformer, batch: Batch) -> Sequence[float]:
        pairs = self._pairs(model, batch)
        losses = PAIR_LOSSES[self.config.loss](pairs, self.config.numbers)
        return self._sums(losses, self._margins(pairs))

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        loss, n, right, margin, pairs = sums
        if not pairs:
            return {}
        return {"held_out_loss": loss / n, "accuracy": right / pairs, "reward_margin": margin / pairs}

    def _sums(self, losses: Tensor, margins: Tensor) -> list[float]:
        """Of the losses, and of the pairs by how much the chosen reply's implicit reward is higher."""
        right = (margins > 0).double() + 0.5 * (margins == 0)
        n, pairs = float(len(losses)), float(len(margins))
        return [float(losses.sum()), n, float(right.sum()), float(margins.sum()), pairs]

    def text(self, figures: dict[str, float]) -> str:
        return (
            f"held-out loss {figures['held_out_loss']:.4f} a {self.per}, the chosen reply has the higher "
            f"reward in {figures['accuracy']:.1%}, by {figures['reward_margin']:.3f} in the mean"
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


class Judged(PreferencePairs):
    """KTO: each reply alone, the best one to its prompt as good and the others as bad.

    A reply's log ratio is measured by the policy's divergence from the reference, which is estimated over the
    whole step, by replies behind another prompt of the same sequence (Ethayarajh et al. 2024, section 4.2);
    0 where no sequence has two prompts.
    """

    per = "reply"

    def __init__(self, model: Transformer, config: DPOConfig) -> None:
        super().__init__(model, config)
        self.model = model
        self._mismatched: list[Tensor] = []
        self._kl: float | None = None

    def count(self, batch: Batch) -> Tensor:
        if self._kl is not None:  # the first part of another step
            self._mismatched, self._kl = [], None
        self._mismatched.append(self._of_mismatched(batch))
        return torch.tensor(len(replies_of(batch).rank), dtype=torch.float64, device=batch.ids.device)

    def loss(self, model: Transformer, batch: Batch, count: float) -> Tensor:
        if self._kl is None:
            ratios = torch.cat(self._mismatched).double()
            total, n = parallel.sum_over_ranks([float(ratios.sum()), float(len(ratios))])
            self._kl = max(0.0, total / n) if n else 0.0
        return self._losses(model, batch, self._kl)[0].sum() / count

    def sums(self, model: Transformer, batch: Batch) -> Sequence[float]:
        mismatched = self._of_mismatched(batch)
        kl = max(0.0, float(mismatched.mean())) if len(mismatched) else 0.0
        losses, log_ratios = self._losses(model, batch, kl)
        better, worse = replies_of(batch).pairs()
        return self._sums(losses, self.config.numbers.beta * (log_ratios[better] - log_ratios[worse]))

    def _losses(self, model: Transformer, batch: Batch, kl: float) -> tuple[Tensor, Tensor]:
        """(S,) the loss of each reply, and its log ratio."""
        log_ratios, replies = self._log_ratios(model, batch)
        divergence = torch.tensor(kl, device=log_ratios.device)
        return kto(log_ratios, replies.rank == 0, divergence, self.config.numbers), log_ratios.detach()

    def _log_ratios(self, model: Transformer, batch: Batch) -> tuple[Tensor, Replies]:
        replies = replies_of(batch)
        own = replies.sums(log_probabilities(model, batch, counted=True))
        return own - self._reference(model, batch, replies), replies

    @torch.no_grad()
    def _of_mismatched(self, batch: Batch) -> Tensor:
        """(M,) log ratios of replies, each behind the prompt that follows its own in the sequence."""
        pairs = []
        for row in range(len(batch.ids)):
            best: dict[int, tuple[list[int], list[int]]] = {}
            for segment in batch.segments[row][batch.segments[row] >= 0].unique().tolist():
                here = batch.segments[row] == segment
                learnt = int((batch.weights[row, here] > 0).sum())
                ids = [int(batch.ids[row, here][0]), *batch.targets[row, here].tolist()]
                end = len(ids) - int(
                    batch.weights[row, here].flip(0).argmax()
                )  # behind it a template may go on
                best.setdefault(segment // RANKS, (ids[: end - learnt], ids[end - learnt : end]))
            prompts = list(best.values())
            if len(prompts) > 1:
                around = [*prompts, prompts[0]]
                pairs += [(theirs[0], own[1]) for own, theirs in pairwise(around)]
        if not pairs:
            return torch.zeros(0, device=batch.ids.device)
        length = max(batch.ids.shape[1], *(len(prompt) + len(reply) for prompt, reply in pairs))
        mismatched, _ = pack(pairs, length)
        return self._log_ratios(self.model, mismatched.to(batch.ids.device))[0]
