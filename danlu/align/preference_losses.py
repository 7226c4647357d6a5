"""Losses of preferences: from log-probabilities of whole replies, or from rewards, to a number for each.

π is the policy, ref the frozen model it started from, y⁺ the reply that was chosen and y⁻ the rejected one;
log π(y) is the sum over the reply's tokens. Δ = log π(y⁺)/ref(y⁺) − log π(y⁻)/ref(y⁻).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.align.config import PreferenceLossConfig


@dataclass(frozen=True)
class Pairs:
    """What a policy and its reference say of both replies of B pairs: each (B,), in nats or in tokens."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def delta(self) -> Tensor:
        return (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)


def dpo(pairs: Pairs, config: PreferenceLossConfig) -> Tensor:
    """−log σ(β Δ) (Rafailov et al. 2023, equation 7).

    With a label smoothing ε > 0 it is cDPO: the labels are taken to be wrong in a share ε of the pairs
    (Mitchell 2023, "A note on DPO with noisy preferences", equation 3).
    """
    x, noise = config.beta * pairs.delta, config.label_smoothing
    return -(1 - noise) * F.logsigmoid(x) - noise * F.logsigmoid(-x)


def ipo(pairs: Pairs, config: PreferenceLossConfig) -> Tensor:
    """(Δ − 1 / 2β)² (Azar et al. 2023, equation 17), with each reply's log ratio a mean over its tokens.

    Without that mean the target would not hang on the lengths while Δ grows with them.
    """
    chosen = (pairs.chosen - pairs.ref_chosen) / pairs.chosen_tokens
    rejected = (pairs.rejected - pairs.ref_rejected) / pairs.rejected_tokens
    return (chosen - rejected - 1 / (2 * config.beta)).square()


def simpo(pairs: Pairs, config: PreferenceLossConfig) -> Tensor:
    """−log σ(β (log π(y⁺) / |y⁺| − log π(y⁻) / |y⁻|) − γ) (Meng et al. 2024, equation 6)."""
    margin = pairs.chosen / pairs.chosen_tokens - pairs.rejected / pairs.rejected_tokens
    return -F.logsigmoid(config.beta * margin - config.gamma)


def orpo(pairs: Pairs, config: PreferenceLossConfig) -> Tensor:
    """−log p(y⁺) − β log σ(log odds(y⁺) − log odds(y⁻)) (Hong et al. 2024, equations 6 and 7).

    p(y) is the geometric mean over the reply's tokens, odds = p / (1 − p); without a reference.
    """
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    return -chosen - config.beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(log_p: Tensor) -> Tensor:
    """log p / (1 − p)."""
    return log_p - torch.log(-torch.expm1(log_p))


PAIR_LOSSES: dict[str, Callable[[Pairs, PreferenceLossConfig], Tensor]] = {
    "dpo": dpo,
    "ipo": ipo,
    "simpo": simpo,
    "orpo": orpo,
}
WITHOUT_REFERENCE = {"simpo", "orpo"}


def kto(log_ratios: Tensor, good: Tensor, kl: Tensor, config: PreferenceLossConfig) -> Tensor:
    """λ (1 − σ(± β (log π(y)/ref(y) − KL))), + where y is good (Ethayarajh et al. 2024, equation 8).

    log_ratios, good (B,); kl: an estimate of KL(π ‖ ref), at least 0 and without a gradient.
    """
    sign = torch.where(good, 1.0, -1.0)
    weight = torch.where(good, config.good_weight, config.bad_weight)
    return weight * (1 - torch.sigmoid(sign * config.beta * (log_ratios - kl)))


# Rewards


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """−log σ(r(y⁺) − r(y⁻) − m) (Ouyang et al. 2022, equation 1; the margin m: Llama 2, equation 2)."""
    return -F.logsigmoid(chosen - rejected - margin)
