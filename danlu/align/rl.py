"""Reinforcement learning of a policy: replies are drawn, rewarded, and made more or less probable.

The loop is the training loop; its batches come from the policy itself (`rollouts.py`). What PPO and GRPO have
in common stands here.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from danlu.align.config import RLConfig
from danlu.align.policy_losses import KL_ESTIMATORS, clipped
from danlu.align.replies import replies_of
from danlu.align.rewards import make_reward
from danlu.align.rollouts import Drawer, Drawn, Places, Prompts, RolloutBatch, RolloutLoader, pack
from danlu.core.errors import UserError
from danlu.model.checkpoint import load
from danlu.model.cross_entropy import log_probabilities, log_probs_of
from danlu.model.lora import adapted_layers, without_adapter
from danlu.model.transformer import Transformer
from danlu.tokens.loader import Batch
from danlu.train.config import TrainConfig


def check(config: RLConfig, name: str) -> None:
    """Raises UserError for what no policy can be trained with."""
    if config.init_from is None:
        raise UserError(f"{name}: init_from is required and missing", "name a chat model's folder")
    if config.parallel != "ddp":
        raise UserError(
            f"{name} with parallel {config.parallel}: the policy isn't spread", "set parallel ddp"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"{name} in several processes: each would draw the same replies", "start it without torchrun"
        )


class Policy:
    """Where a run gets its batches, and the part of its loss that is the policy's."""

    nothing, measure = "no reply was drawn", "held_out_reward"
    config: RLConfig

    def __init__(self, config: RLConfig) -> None:
        self.config = config
        self.tokenizer = load(str(config.init_from))[1]
        self.prompts = Prompts(config.data, self.tokenizer, config)
        self.reward = make_reward(config.rewards)
        self.reference: Transformer | None = None
        self.shown: dict[str, float] = {}

    @property
    def once(self) -> bool:
        """Whether a rollout has one update: then the policy that learns is the one that drew."""
        return self.config.updates * self.config.passes == 1

    def fingerprint(self) -> str:
        return self.prompts.sha256

    def objective(self, model: Transformer) -> "Policy":
        """`model`: as it is before the run; of it a copy is kept where a reference is needed."""
        self.model = model
        if self.config.kl and not adapted_layers(model):
            self.reference = load(str(self.config.init_from), dtype=torch.float32)[0].requires_grad_(False)
        self.drawer = Drawer(model, self.tokenizer, self.config, self.reward)
        return self

    # Batches

    def loader(self, config: TrainConfig) -> RolloutLoader:
        self.rollouts = RolloutLoader(self.prompts, self.drawer, self.finish_rollout, self.config)
        return self.rollouts

    def finish_rollout(self, drawn: Sequence[Drawn]) -> tuple[list[RolloutBatch], dict[str, float]]:
        """The batches of one rollout's updates, and its figures."""
        raise NotImplementedError("PPO's or GRPO's")

    def said(self, drawn: Sequence[Drawn]) -> dict[str, float]:
        """Figures of a rollout."""
        rewards = torch.tensor([one.reward for one in drawn]).view(-1, self.config.group_size)
        return {
            "reward": float(rewards.mean()),
            "reply_tokens": sum(len(one.ids) for one in drawn) / len(drawn),
            "ended": sum(one.reply.ended for one in drawn) / len(drawn),
            "alike": float((rewards == rewards[:, :1]).all(1).float().mean()),
        }

    def parts(self, drawn: Sequence[Drawn]) -> list[list[int]]:
        """The replies of each update."""
        n = self.config.updates
        return [part for part in (list(range(first, len(drawn), n)) for first in range(n)) if part]

    def held_out_batches(self, config: TrainConfig) -> Iterator[Batch]:
        """One reply to each held-out prompt."""
        rows = [self.prompts.rows[number] for number in self.prompts.held_out]
        if rows:
            drawn = self.drawer.draw(rows, 1, 0)
            batch, places = pack(drawn, self.config.sequence_length)
            rewards = spread(torch.tensor([one.reward for one in drawn]), places, batch.weights)
            others = dict.fromkeys(FIELDS, rewards)  # the others are not looked at here
            yield RolloutBatch(**vars(batch), **others)

    def on_device(self, drawn: Sequence[Drawn]) -> tuple[Batch, Places, Tensor]:
        """The packed replies, where they stand, and the engine's log-probabilities."""
        batch, places = pack(drawn, self.config.sequence_length)
        engine = torch.zeros_like(batch.weights)
        for row, spans in enumerate(places):
            for number, begin, end in spans:
                engine[row, begin:end] = torch.tensor(drawn[number].log_probs)
        device = self.model.embedding.weight.device
        return batch.to(device), places, engine.to(device)

    @torch.no_grad()
    def of_reference(self, batch: Batch) -> Tensor:
        """Log-probabilities under the model before the run; zeros where none is needed."""
        if not self.config.kl:
            return torch.zeros_like(batch.weights)
        if self.reference is None:
            with without_adapter(self.model):
                return log_probabilities(self.model, batch, counted=True)
        self.reference.compute_dtype = self.model.compute_dtype
        return log_probabilities(self.reference.to(batch.ids.device), batch, counted=True)

    # The objective

    def count(self, batch: Batch) -> Tensor:
        n = batch.weights.sum() if self.config.averaging == "token" else len(replies_of(batch).rank)
        return torch.as_tensor(n, dtype=torch.float64, device=batch.ids.device)

    def loss(self, model: Transformer, batch: Batch, count: float) -> Tensor:
        assert isinstance(batch, RolloutBatch)
        hidden = model.hidden(batch.ids, batch.positions, batch.segments)
        log_probs, entropies = log_probs_of(model, batch, hidden, counted=True)
        log_ratio = log_probs - (log_probs.detach() if self.once else batch.old)
        losses = clipped(log_ratio, batch.advantages, self.config.clip_low, self.config.clip_high)
        losses = losses + self.further(model, batch, hidden, log_probs)
        self._show(batch, log_probs.detach(), log_ratio.detach(), entropies)
        return (losses * self._weights(batch)).sum() / count

    def further(self, model: Transformer, batch: RolloutBatch, hidden: Tensor, log_probs: Tensor) -> Any:
        """What is added to each token's loss."""
        return 0.0

    def _weights(self, batch: Batch) -> Tensor:
        """(B, T) of each token in the sum that is divided by `count`."""
        if self.config.averaging == "token":
            return batch.weights
        if self.config.averaging == "length":
            return batch.weights / self.config.max_tokens
        replies = replies_of(batch)
        share = 1 / replies.lengths[replies.of_token].float()
        return (
            torch.zeros_like(batch.weights)
            .flatten()
            .index_copy(0, replies.tokens, share)
            .view_as(batch.weights)
        )

    def _show(self, batch: RolloutBatch, log_probs: Tensor, log_ratio: Tensor, entropies: Tensor) -> None:
        ratio, before = log_ratio.exp(), log_probs - log_ratio
        outside = (ratio < 1 - self.config.clip_low) | (ratio > 1 + self.config.clip_high)
        self.shown = {
            **self.rollouts.figures,
            "entropy": counted_mean(entropies, batch),
            "clipped": counted_mean(outside.float(), batch),
            # Between two programs that compute the same: 0 but for rounding.
            "engine_gap": float(((before - batch.engine).abs() * batch.weights).max()),
        }
        if self.config.kl:
            self.shown["kl"] = counted_mean(KL_ESTIMATORS["k1"](log_probs, batch.reference), batch)

    def sums(self, model: Transformer, batch: Batch) -> Sequence[float]:
        assert isinstance(batch, RolloutBatch)
        replies = replies_of(batch)
        rewards = replies.sums(batch.advantages) / replies.lengths
        return float(rewards.double().sum()), float(len(rewards))

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        total, n = sums
        return {"held_out_reward": total / n} if n else {}

    def text(self, figures: dict[str, float]) -> str:
        return f"the mean reward of one reply to each held-out prompt is {figures['held_out_reward']:.4f}"

    def finish(self, model: Transformer) -> None:
        """Nothing."""


FIELDS = ("advantages", "engine", "old", "reference", "values", "returns")


def spread(values: Tensor, places: Places, like: Tensor) -> Tensor:
    """(B, T): each reply's value at all of its tokens."""
    found = torch.zeros_like(like)
    for row, spans in enumerate(places):
        for number, begin, end in spans:
            found[row, begin:end] = values[number]
    return found


def counted_mean(values: Tensor, batch: Batch) -> float:
    """Over the tokens that count."""
    return float((values * batch.weights).sum() / batch.weights.sum())
