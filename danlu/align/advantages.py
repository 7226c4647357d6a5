"""From rewards to advantages: how much better than expected a reply, or a token of it, was."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def group_normalised(rewards: Tensor, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """(A − mean) / std within each group (Shao et al. 2024, GRPO, section 4.1.2).

    rewards (prompts, group). `scale` False: the mean is taken off only (Liu et al. 2025, Dr. GRPO). A group
    whose rewards are all equal says nothing: zeros.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + eps) if scale else centred


def leave_one_out(rewards: Tensor) -> Tensor:
    """Each reward less the mean of the others in its group (Ahmadian et al. 2024, RLOO, equation 5)."""
    n = rewards.shape[1]
    if n < 2:
        raise ValueError("a group of one has no others to be compared with")
    return (rewards - rewards.mean(1, keepdim=True)) * n / (n - 1)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, discount: float = 1.0, decay: float = 0.95) -> Tensor:
    """Σₖ (γ λ)ᵏ δₜ₊ₖ with δₜ = rₜ + γ Vₜ₊₁ − Vₜ, nothing after a reply's last token.

    Schulman et al. 2016, equation 16. rewards, values, mask (B, T): the tokens that count lie one after
    another in each row. Zero where they don't.
    """
    advantages, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(following)
    for t in range(rewards.shape[1] - 1, -1, -1):
        here = mask[:, t]
        delta = rewards[:, t] + discount * next_value - values[:, t]
        following = (delta + discount * decay * following) * here
        next_value = values[:, t] * here
        advantages[:, t] = following
    return advantages


Total = Callable[[list[float]], list[float]]
"""The element-wise sum of some numbers over all processes that hold a part of the values."""


def moments(values: Tensor, total: Total = list) -> tuple[float, float]:
    """Mean and variance of values (N,)."""
    n, added = total([float(len(values)), float(values.double().sum())])
    (squares,) = total([float((values.double() - added / n).square().sum())])
    return added / n, squares / max(n - 1, 1)


def whitened(
    values: Tensor, mask: Tensor, shift: bool = True, eps: float = 1e-8, total: Total = list
) -> Tensor:
    """Of variance 1 over the tokens that count, and of mean 0 (`shift` False keeps the mean)."""
    mean, variance = moments(values[mask > 0], total)
    white = (values - mean) / math.sqrt(variance + eps)
    return (white if shift else white + mean) * mask
