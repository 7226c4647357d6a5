"""From rewards to advantages: how much better than expected a reply, or a token of it, was."""

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


def rewards_to_go(rewards: Tensor, mask: Tensor, discount: float = 1.0) -> Tensor:
    """Sum of what comes from each token on (REINFORCE++: Hu 2025, equation 4). rewards, mask (B, T)."""
    return gae(rewards, torch.zeros_like(rewards), mask, discount, 1.0)


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


def whitened(values: Tensor, mask: Tensor, shift: bool = True, eps: float = 1e-8) -> Tensor:
    """Of variance 1 over the tokens that count, and of mean 0 (`shift` False keeps the mean)."""
    n = mask.sum()
    mean = (values * mask).sum() / n
    variance = ((values - mean).square() * mask).sum() / (n - 1).clamp(min=1)
    white = (values - mean) * torch.rsqrt(variance + eps)
    return (white if shift else white + mean) * mask
