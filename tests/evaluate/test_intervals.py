import numpy as np
import pytest

from danlu.evaluate.intervals import (
    bootstrap_interval,
    mean_of_shares_interval,
    relative_change,
    t_interval,
    t_quantile,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 4, 2.7764), (0.95, 9, 1.8331), (0.995, 29, 2.7564)],
)
def test_t_quantile_equals_the_printed_tables(probability: float, freedom: int, expected: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(expected, abs=1e-4)


def test_t_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, (1000, 5))
    covered = [low <= 3.0 <= high for low, high in map(t_interval, draws[:300].tolist())]
    assert 0.91 < np.mean(covered) < 0.99


def test_bootstrap_interval_is_close_to_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(0, 1, 400)
    low, high = bootstrap_interval(values.tolist())
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_relative_change_is_paired() -> None:
    """Items of very different sizes that all change by a tenth: hardly any doubt. The delta method agrees."""
    chance = np.random.default_rng(0)
    before = chance.uniform(1, 1000, 300)
    after = before * chance.normal(0.9, 0.05, 300)
    value, (low, high) = relative_change(after.tolist(), before.tolist())
    assert value == pytest.approx(after.sum() / before.sum() - 1)
    residuals = after - (1 + value) * before
    half = 1.96 * residuals.std() * 300**0.5 / before.sum()
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.2 * half)


def test_the_mean_of_shares_is_covered_as_often_as_it_says() -> None:
    """Subjects of few questions, some of which nobody misses."""
    chance = np.random.default_rng(0)
    shares, counts = np.array([1.0, 1.0, 0.9, 0.8, 0.5, 0.3]), np.array([5, 40, 10, 30, 20, 8])
    draws = chance.binomial(counts, shares, (2000, 6)) / counts
    intervals = [mean_of_shares_interval(list(zip(own, counts, strict=True))) for own in draws]
    covered = [low <= shares.mean() <= high for low, high in intervals]
    assert 0.94 < np.mean(covered) < 0.99


def test_the_mean_of_shares_of_one_subject_has_wilson_s_interval() -> None:
    assert mean_of_shares_interval([(0.7, 10)]) == pytest.approx(wilson_interval(0.7, 10))
    low, high = mean_of_shares_interval([(1.0, 1)] * 4)
    assert low == pytest.approx(1 - (1 - wilson_interval(1, 1)[0]) / 2)
    assert high == 1
