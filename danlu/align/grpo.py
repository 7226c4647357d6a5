"""`danlu grpo`: what a reply is worth is how much better it is than the others to its prompt.

Shao et al. 2024 (GRPO, section 4.1); Liu et al. 2025 (Dr. GRPO); Ahmadian et al. 2024 (RLOO).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from danlu.align.advantages import group_normalised, leave_one_out
from danlu.align.config import GRPOConfig
from danlu.align.policy_losses import KL_ESTIMATORS
from danlu.align.rl import Policy, check, spread
from danlu.align.rollouts import Drawn, RolloutBatch
from danlu.core.errors import UserError
from danlu.model.cross_entropy import log_probabilities
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
    if config.group_size < 2:
        raise UserError("grpo with group_size 1: a reply has no others to be compared with", "raise it")
    source = Grouped(config)
    return train(config, "prompts", hooks, source.objective, source)


class Grouped(Policy):
    """Advantages from groups; the divergence from the reference is a part of the loss."""

    config: GRPOConfig

    def finish_rollout(self, drawn: Sequence[Drawn]) -> tuple[list[RolloutBatch], dict[str, float]]:
        rewards = torch.tensor([one.reward for one in drawn]).view(-1, self.config.group_size)
        advantages = ADVANTAGES[self.config.advantage](rewards).flatten()
        batches = [self._batch([drawn[i] for i in part], advantages[part]) for part in self.parts(drawn)]
        return batches * self.config.passes, self.said(drawn)

    def _batch(self, drawn: Sequence[Drawn], advantages: Tensor) -> RolloutBatch:
        batch, places, engine = self.on_device(drawn)
        zeros = torch.zeros_like(batch.weights)
        with torch.no_grad():
            old = zeros if self.once else log_probabilities(self.model, batch, counted=True)
        return RolloutBatch(
            **vars(batch),
            advantages=spread(advantages, places, zeros),
            engine=engine,
            old=old,
            reference=self.of_reference(batch),
            values=zeros,
            returns=zeros,
        )

    def further(self, model: Transformer, batch: RolloutBatch, hidden: Tensor, log_probs: Tensor) -> Any:
        if not self.config.kl:
            return 0.0
        return self.config.kl * KL_ESTIMATORS[self.config.kl_estimator](log_probs, batch.reference)
