"""Best-of-n: of n replies the one with the highest reward; how far that is from the policy, what it gains."""

import math

import numpy as np
from numpy.typing import ArrayLike


def kl_bound(n: int) -> float:
    """log n − (n − 1) / n: nats between the best of n draws and a draw (Stiennon et al. 2020, appendix G.3).

    Exact where all rewards differ and no single reply is probable; else the true divergence is lower
    (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def exact_kl(probabilities: ArrayLike, rewards: ArrayLike, n: int) -> float:
    """KL(best of n ‖ policy), in nats, over outcomes that can be listed; of equal rewards the first one wins.

    With F the probability of a reward at most r, and f that of r itself, the best of n has the reward r with
    probability Fⁿ − (F − f)ⁿ, and is distributed among the outcomes with that reward as in the policy.
    """
    values, place = np.unique(np.asarray(rewards, float), return_inverse=True)
    mass = np.bincount(place, np.asarray(probabilities, float), len(values))
    below = np.cumsum(mass) - mass
    mass, below = mass[mass > 0], below[mass > 0]
    # Fⁿ − (F − f)ⁿ = Fⁿ (1 − (1 − f / F)ⁿ), of which the logarithm is exact where f is tiny.
    total = np.minimum(below + mass, 1.0)
    ratio = np.minimum(mass / total, 1.0)
    with np.errstate(divide="ignore"):
        kept = -np.expm1(n * np.log1p(-ratio))
    best = total**n * kept
    log_ratio = n * np.log(total) + np.log(kept) - np.log(mass)
    return float((best * log_ratio)[best > 0].sum())


def expected_best(proxy: ArrayLike, gold: ArrayLike, n: int) -> float:
    """The expected gold reward of the reply that the proxy likes best of n, unbiased, from N ≥ n replies.

    The mean over all subsets of n: sorted by the proxy, the reply of rank i wins in C(i − 1, n − 1) of the
    C(N, n) (Nakano et al. 2021, appendix I; Gao et al. 2022). Of equal proxies all share alike.
    """
    scores, values = np.asarray(proxy, float), np.asarray(gold, float)
    total = len(scores)
    if n > total:
        raise ValueError(f"the best of {n} from {total} replies")
    order = np.argsort(scores, kind="stable")
    ranks = np.arange(1, total + 1)
    weights = np.exp([_log_choose(int(i) - 1, n - 1) - _log_choose(total, n) for i in ranks])
    _, place, sizes = np.unique(scores[order], return_inverse=True, return_counts=True)
    shared = (np.bincount(place, weights) / sizes)[place]
    return float((shared * values[order]).sum())


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) if 0 <= k <= n else -math.inf
