"""`danlu grpo`: what a reply is worth is how much better it is than the others to its prompt.

Shao et al. 2024 (GRPO, section 4.1); Liu et al. 2025 (Dr. GRPO); Ahmadian et al. 2024 (RLOO). Or how much
better it is than all replies of the rollout: Hu 2025 (REINFORCE++).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from danlu.align.advantages import group_normalised, leave_one_out
from danlu.align.config import GRPOConfig
from danlu.align.policy_losses import KL_ESTIMATORS
from danlu.align.rl import Policy, Share, by_reply_gae, check, end_rewards, spread, whiten
from danlu.align.rollouts import Drawn, RolloutBatch
from danlu.core.errors import UserError
from danlu.model.transformer import Transformer
from danlu.train.loop import Hooks, train
from danlu.train.result import TrainResult

ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "group": group_normalised,
    "centred": partial(group_normalised, scale=False),
    "leave_one_out": leave_one_out,
}


def grpo(config: GRPOConfig, hooks: Hooks | None = None) -> TrainResult:
    """Trains the model that `init_from` names by rewards of its own replies."""
    check(config, "grpo")
    if config.group_size < 2 and config.advantage != "global":
        raise UserError("grpo with group_size 1: a reply has no others to be compared with", "raise it")
    source = Grouped(config)
    return train(config, "prompts", hooks, source.objective, source)


class Grouped(Policy):
    """Advantages from groups, and the divergence from the reference in the loss; or REINFORCE++'s.

    There a token's advantage is the reward less the divergence of the tokens from it on, whitened over the
    rollout.
    """

    config: GRPOConfig

    def finish(self, model: Transformer) -> None:
        """Nothing was added."""

    def judge(self, shares: Sequence[Share], drawn: Sequence[Drawn], figures: dict[str, float]) -> None:
        if self.config.advantage == "global":
            for share in shares:
                penalty = self.config.kl * share.log_ratio if self.config.kl else 0.0
                rewards = end_rewards(share) - penalty * share.batch.weights
                values = torch.zeros_like(rewards)
                share.batch.advantages = by_reply_gae(rewards, values, share.places, 1.0, 1.0)
            whiten(shares)
            return
        rewards = torch.tensor([one.reward for one in drawn]).view(-1, self.config.group_size)
        advantages = ADVANTAGES[self.config.advantage](rewards).flatten()
        for share in shares:
            share.batch.advantages = spread(advantages[share.numbers], share.places, share.batch.weights)

    def further(self, model: Transformer, batch: RolloutBatch, hidden: Tensor, log_probs: Tensor) -> Any:
        if not self.config.kl or self.config.advantage == "global":
            return 0.0
        return self.config.kl * KL_ESTIMATORS[self.config.kl_estimator](log_probs, batch.reference)
