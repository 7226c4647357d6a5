"""Reinforcement learning of a policy: replies are drawn, rewarded, and made more or less probable.

The loop is the training loop; its batches come from the policy itself (`rollouts.py`).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from danlu.align.advantages import group_normalised, leave_one_out
from danlu.align.config import GRPOConfig
from danlu.align.policy_losses import KL_ESTIMATORS, clipped
from danlu.align.replies import replies_of
from danlu.align.rewards import make_reward
from danlu.align.rollouts import Drawer, Drawn, Places, Prompts, RolloutBatch, RolloutLoader, pack
from danlu.core.errors import UserError
from danlu.model.checkpoint import load
from danlu.model.cross_entropy import log_probabilities, log_probs_and_entropies
from danlu.model.lora import adapted_layers, without_adapter
from danlu.model.transformer import Transformer
from danlu.tokens.loader import Batch
from danlu.train.config import TrainConfig
from danlu.train.loop import Hooks, train
from danlu.train.result import TrainResult


def grpo(config: GRPOConfig, hooks: Hooks | None = None) -> TrainResult:
    """Trains the model that `init_from` names by rewards of its own replies."""
    if config.init_from is None:
        raise UserError("grpo: init_from is required and missing", "name a chat model's folder")
    if config.parallel != "ddp":
        raise UserError(f"grpo with parallel {config.parallel}: the policy isn't spread", "set parallel ddp")
    if config.group_size < 2:
        raise UserError("grpo with group_size 1: a reply has no others to be compared with", "raise it")
    source = Grouped(config)
    return train(config, "prompts", hooks, source.objective, source)


class Grouped:
    """Where a run by GRPO gets its batches, and what it makes small (Shao et al. 2024, section 4.1)."""

    nothing, measure = "no reply was drawn", "held_out_reward"

    def __init__(self, config: GRPOConfig) -> None:
        self.config = config
        self.tokenizer = load(str(config.init_from))[1]
        self.prompts = Prompts(config.data, self.tokenizer, config)
        self.reward = make_reward(config.rewards)
        self.reference: Transformer | None = None
        self.shown: dict[str, float] = {}

    def fingerprint(self) -> str:
        return self.prompts.sha256

    def objective(self, model: Transformer) -> "Grouped":
        """`model`: as it is before the run; of it a copy is kept where a reference is needed."""
        self.model = model
        if self.config.kl and not adapted_layers(model):
            self.reference = load(str(self.config.init_from), dtype=torch.float32)[0].requires_grad_(False)
        self.drawer = Drawer(model, self.tokenizer, self.config, self.reward)
        return self

    # Batches

    def loader(self, config: TrainConfig) -> RolloutLoader:
        self.rollouts = RolloutLoader(self.prompts, self.drawer, self.finish, self.config)
        return self.rollouts

    def held_out_batches(self, config: TrainConfig) -> Iterator[Batch]:
        """One reply to each held-out prompt."""
        rows = [self.prompts.rows[number] for number in self.prompts.held_out]
        if rows:
            drawn = self.drawer.draw(rows, 1, 0)
            batch, places = pack(drawn, self.config.sequence_length)
            rewards = _spread(torch.tensor([one.reward for one in drawn]), places, batch)
            yield RolloutBatch(
                **vars(batch), advantages=rewards, engine=rewards, old=rewards, reference=rewards
            )

    def finish(self, drawn: Sequence[Drawn]) -> tuple[list[RolloutBatch], dict[str, float]]:
        """The batches of one rollout's updates, and its figures."""
        config = self.config
        rewards = torch.tensor([one.reward for one in drawn]).view(-1, config.group_size)
        advantages = {
            "group": group_normalised,
            "centred": lambda values: group_normalised(values, scale=False),
            "leave_one_out": leave_one_out,
        }[config.advantage](rewards).flatten()
        lengths = [len(one.ids) for one in drawn]
        figures = {
            "reward": float(rewards.mean()),
            "reply_tokens": sum(lengths) / len(lengths),
            "ended": sum(one.reply.ended for one in drawn) / len(drawn),
            "alike": float((rewards == rewards[:, :1]).all(1).float().mean()),
        }
        n = config.updates
        parts = [list(range(part, len(drawn), n)) for part in range(n)]
        batches = [self._batch([drawn[i] for i in part], advantages[part]) for part in parts if part]
        return batches * config.passes, figures

    def _batch(self, drawn: Sequence[Drawn], advantages: Tensor) -> RolloutBatch:
        batch, places = pack(drawn, self.config.sequence_length)
        device = self.model.embedding.weight.device
        plain = batch.to(device)
        zeros = torch.zeros_like(plain.weights)
        first = (
            self.config.updates * self.config.passes == 1
        )  # old and new policy are one: its pass says both
        with torch.no_grad():
            old = zeros if first else log_probabilities(self.model, plain, counted=True)
            reference = self._reference(plain) if self.config.kl else zeros
        engine = torch.zeros_like(batch.weights)
        for row, spans in enumerate(places):
            for number, begin, end in spans:
                engine[row, begin:end] = torch.tensor(drawn[number].log_probs)
        return RolloutBatch(
            **vars(plain),
            advantages=_spread(advantages, places, batch).to(device),
            engine=engine.to(device),
            old=old,
            reference=reference,
        )

    def _reference(self, batch: Batch) -> Tensor:
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
        config = self.config
        log_probs, entropies = log_probs_and_entropies(model, batch, counted=True)
        first = config.updates * config.passes == 1
        log_ratio = log_probs - (log_probs.detach() if first else batch.old)
        losses = clipped(log_ratio, batch.advantages, config.clip_low, config.clip_high)
        if config.kl:
            losses = losses + config.kl * KL_ESTIMATORS[config.kl_estimator](log_probs, batch.reference)
        self._show(batch, log_probs.detach(), log_ratio.detach(), entropies)
        return (losses * self._weights(batch)).sum() / count

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
        n = batch.weights.sum()
        mean = lambda values: float((values * batch.weights).sum() / n)  # noqa: E731
        ratio = log_ratio.exp()
        outside = (ratio < 1 - self.config.clip_low) | (ratio > 1 + self.config.clip_high)
        self.shown = {**self.rollouts.figures, "entropy": mean(entropies), "clipped": mean(outside.float())}
        # Between two programs that compute the same: 0 but for rounding, until the policy has moved.
        before = log_probs - log_ratio
        self.shown["engine_gap"] = float(((before - batch.engine).abs() * batch.weights).max())
        if self.config.kl:
            self.shown["kl"] = mean(KL_ESTIMATORS["k1"](log_probs, batch.reference))

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


def _spread(values: Tensor, places: Places, batch: Batch) -> Tensor:
    """(B, T): each reply's value at all of its tokens."""
    found = torch.zeros_like(batch.weights)
    for row, spans in enumerate(places):
        for number, begin, end in spans:
            found[row, begin:end] = values[number]
    return found
