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

from danlu.align.advantages import moments
from danlu.align.config import PPOConfig
from danlu.align.policy_losses import KL_ESTIMATORS, clipped_values
from danlu.align.rl import Policy, Share, by_reply_gae, check, end_rewards, whiten
from danlu.align.rollouts import Drawn, RolloutBatch
from danlu.model import parallel
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

    def of_policy(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        hidden = self.model.hidden(batch.ids, batch.positions, batch.segments)
        old, _ = log_probs_of(self.model, batch, hidden, counted=True, entropy=False)
        return old, values_of(self.model, hidden) * batch.weights

    def judge(self, shares: Sequence[Share], drawn: Sequence[Drawn], figures: dict[str, float]) -> None:
        scale = torch.tensor([one.reward for one in drawn]).std() if self.config.whiten_rewards else 1.0
        for share in shares:
            batch = share.batch
            rewards = end_rewards(share) / max(float(scale), 1e-8)
            if self.config.kl and self.config.kl_in == "reward":
                rewards = rewards - self.kl_weight * share.log_ratio * batch.weights
            batch.advantages = by_reply_gae(
                rewards, batch.values, share.places, self.config.discount, self.config.decay
            )
            batch.returns = batch.advantages + batch.values * batch.weights
        counted = [share.batch.weights > 0 for share in shares]
        values, returns = (
            torch.cat([getattr(share.batch, name)[mask] for share, mask in zip(shares, counted, strict=True)])
            for name in ("values", "returns")
        )
        figures["return"], spread = moments(returns, parallel.sum_over_ranks)
        _, left = moments(returns - values, parallel.sum_over_ranks)
        figures["explained"] = 1 - left / spread if spread > 0 else 0.0
        if self.config.kl:
            figures["kl_weight"] = self._adapted(figures["reply_kl"])
        if self.config.whiten_advantages:
            whiten(shares)

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


def values_of(model: Transformer, hidden: Tensor) -> Tensor:
    """(B, T) float32: what the value head says of each token's state, before the token."""
    assert model.score is not None
    return model.score(hidden.float())[..., 0]
