"""Losses of a policy that learns from rewards: token by token, and how they are put together.

A = advantage, ρ = π(a) / π_old(a), the ratio of the policy to the one that drew the tokens. All tensors are
(B, T) over the tokens of replies, `mask` is 1 where a token counts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from danlu.align.replies import replies_of
from danlu.tokens.loader import Batch


def clipped(log_ratio: Tensor, advantages: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    """−min(ρ A, clip(ρ, 1 − low, 1 + high) A) (Schulman et al. 2017, equation 7)."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def clipped_values(values: Tensor, old_values: Tensor, returns: Tensor, clip: float = 0.2) -> Tensor:
    """½ max((V − R)², (V' − R)²), V' cut to `clip` around the old value; `clip` 0 = ½ (V − R)²."""
    errors = (values - returns).square()
    if clip:
        near = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.maximum(errors, (near - returns).square())
    return 0.5 * errors


# Divergence from the reference, by the drawn tokens (Schulman 2020, "Approximating KL divergence")


def k1(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """log π/ref: without a bias, and below zero at times."""
    return log_probs - ref_log_probs


def k2(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """½ (log π/ref)²: a bias, and little variance; its gradient is that of the true divergence."""
    return 0.5 * (log_probs - ref_log_probs).square()


def k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """ref/π − 1 − log ref/π: without a bias, never below zero (GRPO: Shao et al. 2024, equation 4)."""
    log_ratio = ref_log_probs - log_probs
    return torch.expm1(log_ratio) - log_ratio


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


# From tokens to one number


def count_of(batch: Batch, averaging: str) -> Tensor:
    """What a mean is taken over: the batch's tokens that count (`token`), or its replies."""
    return batch.weights.sum() if averaging == "token" else torch.tensor(len(replies_of(batch).rank))


def token_weights(batch: Batch, averaging: str, longest: int) -> Tensor:
    """(B, T) of each token in the sum that is divided by `count_of`.

    `reply`: a mean over each reply's tokens, every reply counts the same (GRPO); `token`: every token does
    (DAPO); `length`: each reply's sum over the longest length there may be (Liu et al. 2025, Dr. GRPO).
    """
    if averaging == "token":
        return batch.weights
    if averaging == "length":
        return batch.weights / longest
    replies = replies_of(batch)
    share = 1 / replies.lengths[replies.of_token].float()
    return (
        torch.zeros_like(batch.weights).flatten().index_copy(0, replies.tokens, share).view_as(batch.weights)
    )
