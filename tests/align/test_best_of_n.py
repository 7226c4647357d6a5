"""Best-of-n by brute force: its distribution, its divergence, and what it gains."""

import math
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

from danlu.align.best_of_n import exact_kl, expected_best, kl_bound
from danlu.papers.best_of_n import by_draws, judge_bound, judge_draws, language_model, run
from danlu.papers.config import ReproduceConfig


def brute_force_kl(probabilities: list[float], rewards: list[float], n: int) -> float:
    """Every sequence of n draws; of equal rewards the first drawn wins."""
    best = [0.0] * len(probabilities)
    for draws in product(range(len(probabilities)), repeat=n):
        winner = max(draws, key=lambda outcome: rewards[outcome])
        best[winner] += math.prod(probabilities[outcome] for outcome in draws)
    return sum(b * math.log(b / p) for b, p in zip(best, probabilities, strict=True) if b)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("probabilities", "rewards"),
    [
        ([0.2] * 5, [1, 2, 3, 4, 5]),
        ([0.5, 0.1, 0.1, 0.3], [1, 1, 3, 2]),
        ([0.7, 0.2, 0.1], [0, 0, 0]),
        ([0.9, 0.05, 0.05], [2, 1, 3]),
        ([0.5, 0.5, 0.0], [1, 2, 3]),
    ],
)
def test_the_divergence_by_brute_force(probabilities: list[float], rewards: list[float], n: int) -> None:
    found = exact_kl(probabilities, rewards, n)
    assert found == pytest.approx(brute_force_kl(probabilities, rewards, n), abs=1e-12)
    assert found <= kl_bound(n) + 1e-12


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_the_expected_best_by_all_subsets(n: int) -> None:
    random = np.random.default_rng(0)
    proxy, gold = random.integers(0, 4, 7).astype(float), random.normal(size=7)
    total = 0.0
    for subset in combinations(range(7), n):
        top = max(proxy[i] for i in subset)
        total += float(np.mean([gold[i] for i in subset if proxy[i] == top]))
    # Of equal proxies within a subset all share alike, and so over all subsets.
    assert expected_best(proxy, gold, n) == pytest.approx(total / math.comb(7, n), abs=1e-9)
    with pytest.raises(ValueError, match="best of 8 from 7"):
        expected_best(proxy, gold, 8)


def test_a_language_model_is_enumerated_whole() -> None:
    probabilities, rewards = language_model(0)
    assert probabilities.sum() == pytest.approx(1)
    assert len(set(rewards)) == len(rewards) == 24**3


def test_claims_can_come_out_either_way() -> None:
    bound = [kl_bound(2**k) for k in range(11)]
    lower = [0.9 * value for value in bound]
    good = {"A": bound, "B": lower, "C": lower, "F": bound}
    assert [claim.verdict for claim in judge_bound(good, bound)] == ["holds"] * 3
    assert judge_bound({**good, "A": lower}, bound)[0].verdict == "does not hold"
    assert judge_bound({**good, "B": bound, "C": bound}, bound)[2].verdict == "does not hold"
    assert judge_bound({**good, "F": [1.01 * value for value in bound]}, bound)[1].verdict == "does not hold"
    drawn, error, exact = by_draws((np.full(5, 0.2), np.arange(5.0)), 4, 0)
    assert judge_draws(drawn, error, exact).verdict == "holds"
    assert judge_draws(drawn, error, exact + 10 * error).verdict == "does not hold"


def test_the_experiment(tmp_path: Path) -> None:
    result = run(ReproduceConfig(name="best-of-n"), tmp_path)
    assert not result.void
    assert len(result.claims) == 4
    assert (tmp_path / "plot.png").stat().st_size > 10_000
