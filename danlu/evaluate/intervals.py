"""How sure a figure is: intervals of means, of shares and of paired differences."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Interval = tuple[float, float]

_AT_ONCE = 2**24
"""Numbers that a bootstrap draws at a time."""


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's interval of the mean of independent values, such as paired differences of seeds."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        raise ValueError("an interval needs at least two values")
    half = t_quantile(0.5 + confidence / 2, n - 1) * float(np.std(values, ddof=1)) / n**0.5
    return mean - half, mean + half


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t: its density ∝ (1 + x²/ν)^(−(ν+1)/2) summed up on a grid of tan θ.

    With x = √ν tan θ the density in θ is ∝ cos(θ)^(ν−1), which is smooth on (−π/2, π/2).
    """
    edges = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    middles = (edges[:-1] + edges[1:]) / 2
    mass = np.concatenate([[0.0], np.cumsum(np.cos(middles) ** (freedom - 1))])
    theta = np.interp(probability, mass / mass[-1], edges)
    return float(np.sqrt(freedom) * np.tan(theta))


def bootstrap_interval(
    values: Sequence[Any],
    statistic: Callable[..., Any] = np.mean,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over items, each a number or several; `statistic` takes an array and `axis`."""
    items = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    found: list[Any] = []
    while len(found) < resamples:
        n = min(resamples - len(found), max(1, _AT_ONCE // items.size))
        draws = generator.integers(0, len(items), (n, len(items)))
        found.extend(statistic(items[draws], axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def relative_change(after: Sequence[float], before: Sequence[float]) -> tuple[float, Interval]:
    """Σ after / Σ before − 1 over the same items, with its paired bootstrap interval."""

    def change(pairs: np.ndarray, axis: int) -> Any:
        sums = pairs.sum(axis)
        return sums[..., 0] / sums[..., 1] - 1

    pairs = np.stack([after, before], 1)
    return float(change(pairs, 0)), bootstrap_interval(pairs.tolist(), change)


def wilson_interval(share: float, n: int, z: float = 1.959964) -> Interval:
    """Of a share of n independent items (Wilson 1927); never outside [0, 1], and wide for few items."""
    if n < 1:
        raise ValueError("an interval needs at least one item")
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_of_shares_interval(shares: Sequence[tuple[float, int]]) -> Interval:
    """Of the mean of shares, each of its own n items: Wilson's intervals put together (Zou & Donner 2008)."""
    own = np.array([(share, *wilson_interval(share, n)) for share, n in shares])
    mean, (below, above) = own[:, 0].mean(), (own[:, 1:] - own[:, :1]).T
    return float(mean - np.linalg.norm(below) / len(own)), float(mean + np.linalg.norm(above) / len(own))
