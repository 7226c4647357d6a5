"""pass@k: how likely one of k samples passes, from n samples of which c passed.

Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
"""

from collections.abc import Sequence

import numpy as np

from danlu.evaluate.intervals import Interval, bootstrap_interval, wilson_interval


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k), unbiased, as a product of numbers near one. Needs k <= n."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"n = {n}, c = {c}, k = {k}: 0 <= c <= n and 1 <= k <= n must hold")
    if n - c < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)))


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> tuple[float, Interval]:
    """Over problems with (n, c) each: the mean, and its interval: problems resampled, Wilson's of 0 and 1."""
    values = [pass_at_k(n, c, k) for n, c in counts]
    mean = float(np.mean(values))
    return mean, wilson_interval(mean, len(values)) if mean in (0, 1) else bootstrap_interval(values)
