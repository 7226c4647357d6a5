"""Calibration, against scikit-learn, by hand, and on models whose calibration is known."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from danlu.evaluate.calibration import brier_score, calibration_error, choice_probabilities, reliability


def sample(n: int, over: float = 1.0) -> tuple[list[float], list[bool]]:
    """Confidences, and whether each answer is right: as often as it says, or to the power `over`."""
    generator = np.random.default_rng(0)
    sure = generator.uniform(0.25, 1, n)
    return sure.tolist(), (generator.uniform(size=n) < sure**over).tolist()


def test_bins_of_equal_size_are_scikit_learn_s() -> None:
    sure, right = sample(1000)
    theirs = calibration_curve(right, sure, n_bins=10, strategy="quantile")
    ours = reliability(sure, right, 10)
    assert [one.count for one in ours] == [100] * 10
    np.testing.assert_allclose([one.accuracy for one in ours], theirs[0], atol=1e-12)
    np.testing.assert_allclose([one.confidence for one in ours], theirs[1], atol=1e-12)


def test_the_error_sees_what_is_wrong_and_nothing_else() -> None:
    assert calibration_error(*sample(20_000)) < 0.02
    # accuracy = confidence³: the mean gap over 0.25 … 1 is ∫ (c − c³) dc / 0.75
    expected = ((1 - 0.25**2) / 2 - (1 - 0.25**4) / 4) / 0.75
    assert calibration_error(*sample(20_000, over=3.0)) == pytest.approx(expected, abs=0.02)


def test_by_hand() -> None:
    bins = reliability([0.9, 0.5, 0.6, 1.0], [True, False, True, False], bins=2)
    assert [(one.count, one.accuracy) for one in bins] == [(2, 0.5), (2, 0.5)]
    assert [one.confidence for one in bins] == pytest.approx([0.55, 0.95])
    assert calibration_error([0.9, 0.5, 0.6, 1.0], [True, False, True, False], 2) == pytest.approx(0.25)
    assert reliability([], []) == []
    assert len(reliability([0.5], [True])) == 1


def test_brier_score() -> None:
    generator = np.random.default_rng(1)
    yes = generator.uniform(size=200)
    right = (generator.uniform(size=200) < yes).astype(int)
    # Of two choices both contribute the same: twice scikit-learn's.
    ours = brier_score(np.stack([1 - yes, yes], 1).tolist(), right.tolist())
    assert ours == pytest.approx(2 * brier_score_loss(right, yes))
    assert brier_score([[1.0, 0.0, 0.0]], [2]) == 2
    assert brier_score([[0.25] * 4], [1]) == pytest.approx(0.75)


def test_probabilities_of_choices() -> None:
    found = choice_probabilities([-1000.0, -1000.0 + np.log(3)])
    assert found == pytest.approx([0.25, 0.75])
