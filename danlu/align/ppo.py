"""`danlu ppo`: each token's worth is what follows it, less what a value head had expected.

Schulman et al. 2017 (PPO), as Stiennon et al. 2020, Ouyang et al. 2022 (InstructGPT, appendix C.4) and
Bai et al. 2022 (HH) use it. Details, each of which can be switched: the divergence from the reference is
taken off each token's reward, or stands in the loss (`kl_in`); its weight adapts to a target (`kl_target`;
Ziegler et al. 2019, section 2.2); rewards are divided by their deviation (`whiten_rewards`); advantages are
whitened over the rollout (`whiten_advantages`); values are cut around the old ones (`value_clip`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from danlu.align.advantages import gae, whitened
from danlu.align.config import PPOConfig
from danlu.align.policy_losses import KL_ESTIMATORS, clipped_values
from danlu.align.rl import Policy, check, counted_mean
from danlu.align.rollouts import Drawn, Places, RolloutBatch
from danlu.model.cross_entropy import log_probs_of
from danlu.model.transformer import Transformer
from danlu.tokens.loader import Batch
from danlu.train.loop import Hooks, train
from danlu.train.result import TrainResult


def ppo(config: PPOConfig, hooks: Hooks | None = None) -> TrainResult:
    """Trains the model that `init_from` names by rewards of its own replies, with a value head."""
    check(config, "ppo")
    source = Critic(config)
    return train(config, "prompts", hooks, source.objective, source)


class Critic(Policy):
    """Advantages from a value head on the policy's last layer."""

    config: PPOConfig

    def objective(self, model: Transformer) -> "Policy":
        model.give_values()
        return super().objective(model)

    def finish(self, model: Transformer) -> None:
        """The value head goes."""
        model.score = None

    @property
    def kl_weight(self) -> float:
        """As it has been adapted so far."""
        return self.rollouts.figures.get("kl_weight", self.config.kl)

    def finish_rollout(self, drawn: Sequence[Drawn]) -> tuple[list[RolloutBatch], dict[str, float]]:
        packed, places, engine = self.on_device(drawn)
        old, values = self._look(packed)
        reference = self.of_reference(packed)
        log_ratio = KL_ESTIMATORS["k1"](old, reference) if self.config.kl else torch.zeros_like(old)
        rewards = end_rewards(drawn, places, packed)
        if self.config.whiten_rewards:
            rewards = rewards / torch.tensor([one.reward for one in drawn]).std().clamp(min=1e-8)
        if self.config.kl_in == "reward":
            rewards = rewards - self.kl_weight * log_ratio * packed.weights
        advantages = by_reply_gae(rewards, values, places, self.config.discount, self.config.decay)
        returns = advantages + values * packed.weights
        if self.config.whiten_advantages:
            advantages = whitened(advantages, packed.weights)
        whole = RolloutBatch(
            **vars(packed),
            advantages=advantages,
            engine=engine,
            old=old,
            reference=reference,
            values=values,
            returns=returns,
        )
        figures = {**self.said(drawn), "explained": explained_variance(values, returns, packed.weights)}
        if self.config.kl:
            kl = float((log_ratio * packed.weights).sum()) / len(drawn)
            figures |= {"reply_kl": kl, "kl_weight": self._adapted(kl)}
        return self._cut(whole) * self.config.passes, figures

    @torch.no_grad()
    def _look(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities and values of the policy as it is, by one pass."""
        hidden = self.model.hidden(batch.ids, batch.positions, batch.segments)
        old, _ = log_probs_of(self.model, batch, hidden, counted=True, entropy=False)
        return old, values_of(self.model, hidden) * batch.weights

    def _cut(self, whole: RolloutBatch) -> list[RolloutBatch]:
        """Rows of packed replies, for each update an equal share."""
        n = min(self.config.updates, len(whole.ids))
        return whole.split(n)

    def _adapted(self, kl: float) -> float:
        """The weight for the next rollout, by how far this one's divergence is from the target."""
        if not self.config.kl_target:
            return self.config.kl
        error = min(max(kl / self.config.kl_target - 1, -0.2), 0.2)
        return self.kl_weight * (1 + self.config.kl_gain * error)

    def further(self, model: Transformer, batch: RolloutBatch, hidden: Tensor, log_probs: Tensor) -> Any:
        values = values_of(model, hidden)
        found = self.config.value_weight * clipped_values(
            values, batch.values, batch.returns, self.config.value_clip
        )
        if self.config.kl and self.config.kl_in == "loss":
            estimator = KL_ESTIMATORS[self.config.kl_estimator]
            found = found + self.kl_weight * estimator(log_probs, batch.reference)
        return found

    def _show(self, batch: RolloutBatch, log_probs: Tensor, log_ratio: Tensor, entropies: Tensor) -> None:
        super()._show(batch, log_probs, log_ratio, entropies)
        self.shown["return"] = counted_mean(batch.returns, batch)


def values_of(model: Transformer, hidden: Tensor) -> Tensor:
    """(B, T) float32: what the value head says of each token's state, before the token."""
    assert model.score is not None
    return model.score(hidden.float())[..., 0]


def end_rewards(drawn: Sequence[Drawn], places: Places, batch: Batch) -> Tensor:
    """(B, T): each reply's reward at its last token."""
    found = torch.zeros_like(batch.weights)
    for row, spans in enumerate(places):
        for number, _, end in spans:
            found[row, end - 1] = drawn[number].reward
    return found


def by_reply_gae(rewards: Tensor, values: Tensor, places: Places, discount: float, decay: float) -> Tensor:
    """`gae` of replies that are packed: (B, T)."""
    spans = [(row, begin, end) for row, of_row in enumerate(places) for _, begin, end in of_row]
    longest = max(end - begin for _, begin, end in spans)
    index = torch.tensor([[row, begin] for row, begin, _ in spans], device=rewards.device)
    offsets = torch.arange(longest, device=rewards.device)
    lengths = torch.tensor([end - begin for _, begin, end in spans], device=rewards.device)
    mask = offsets < lengths[:, None]
    column = (index[:, 1:] + offsets).clamp(max=rewards.shape[1] - 1)
    row = index[:, :1].expand_as(column)
    found = gae(rewards[row, column] * mask, values[row, column] * mask, mask.float(), discount, decay)
    out = torch.zeros_like(rewards)
    out[row[mask], column[mask]] = found[mask]
    return out


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 − var(returns − values) / var(returns) over the tokens that count; 0 where all returns are alike."""
    counted = mask > 0
    spread = returns[counted].var()
    return float(1 - (returns - values)[counted].var() / spread) if spread > 0 else 0.0
