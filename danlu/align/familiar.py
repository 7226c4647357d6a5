"""How unlike a prompt is what a model of rewards has seen: where it is strange, its rewards mean little.

Bai et al. 2022 (HH, section 5.4) turn strange requests away by such a distance of a preference model's
activations from those of known prompts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from danlu.align.reward import RewardModel
from danlu.core.errors import UserError
from danlu.data.conversations import Messages
from danlu.tokens.chat import render_prompt

FEW = 2
"""Known prompts at least, for each dimension of the model."""
RIDGE = 1e-3
"""Of the mean variance, added to each: the last layer has directions in which nothing varies."""


class Familiar:
    """Distances from known prompts, by what the model's last layer says at the end of a prompt."""

    def __init__(self, model: RewardModel, known: Sequence[Messages]) -> None:
        """Raises UserError where the known prompts are too few to say in which directions they vary."""
        self.model = model
        states = self._states(known)
        if len(states) < FEW * states.shape[1]:
            raise UserError(
                f"{len(states)} known prompts, and the model has {states.shape[1]} dimensions",
                f"give at least {FEW * states.shape[1]}",
            )
        self.mean = states.mean(0)
        covariance = torch.cov(states.T)
        covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
        self.precision = torch.linalg.inv(covariance)

    def __call__(self, prompts: Sequence[Messages]) -> list[float]:
        """(x − μ)ᵀ Σ⁻¹ (x − μ) of each prompt's state x: about the model's width for a known kind."""
        gaps = self._states(prompts) - self.mean
        return torch.einsum("ni,ij,nj->n", gaps, self.precision, gaps).tolist()

    def _states(self, prompts: Sequence[Messages]) -> Tensor:
        """(N, D) float64."""
        rows = [render_prompt(messages, self.model.tokenizer) for messages in prompts]
        return self.model.states(rows).double()
