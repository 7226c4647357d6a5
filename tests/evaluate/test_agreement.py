"""Agreement beyond chance, against scikit-learn and the worked examples of the papers."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from danlu.evaluate.agreement import Scale, accuracy, cohen_kappa, fleiss_kappa, krippendorff_alpha

LABELS = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), min_size=2, max_size=40)


@given(LABELS)
def test_cohen_s_kappa_is_scikit_learn_s(pairs: list[tuple[str, str]]) -> None:
    one, other = zip(*pairs, strict=True)
    found = cohen_kappa(one, other)
    if len({*one, *other}) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(cohen_kappa_score(one, other))


FLEISS = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip
"""Ratings of ten subjects by fourteen raters, five labels: how many gave each."""


def test_fleiss_kappa_of_the_common_example() -> None:
    items = [[label for label, n in enumerate(row) for _ in range(n)] for row in FLEISS]
    assert fleiss_kappa(items) == pytest.approx(0.210, abs=5e-4)


def test_fleiss_kappa_of_two_raters_is_scott_s_pi() -> None:
    """With one distribution of labels for both, which is what sets it apart from Cohen's."""
    generator = np.random.default_rng(0)
    pairs = generator.choice(3, (50, 2), p=[0.6, 0.3, 0.1])
    pairs[:25, 1] = pairs[:25, 0]
    shares = np.bincount(pairs.ravel()) / pairs.size
    observed, expected = float((pairs[:, 0] == pairs[:, 1]).mean()), float((shares**2).sum())
    assert fleiss_kappa(pairs.tolist()) == pytest.approx((observed - expected) / (1 - expected))


KRIPPENDORFF = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]
"""Four observers, twelve units, values missing: section D of "Computing Krippendorff's Alpha-Reliability"."""


@pytest.mark.parametrize(
    ("scale", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_krippendorff_s_alpha_of_his_own_example(scale: Scale, published: float) -> None:
    items = [[row[unit] for row in KRIPPENDORFF if row[unit] is not None] for unit in range(12)]
    assert krippendorff_alpha(items, scale) == pytest.approx(published, abs=5e-4)


def test_chance_is_nothing_and_agreement_is_all() -> None:
    generator = np.random.default_rng(1)
    random = generator.integers(0, 3, (5000, 3)).tolist()
    same: list[Sequence[int]] = [[label] * 3 for label in range(3)] * 10
    for measure in (fleiss_kappa, krippendorff_alpha):
        assert measure(random) == pytest.approx(0, abs=0.02)
        assert measure(same) == pytest.approx(1)
    assert accuracy("abc", "abd") == pytest.approx(2 / 3)


def test_what_cannot_be_computed_is_an_error() -> None:
    with pytest.raises(ValueError, match="same number"):
        fleiss_kappa([[1, 2], [1, 2, 3]])
    with pytest.raises(ValueError, match="two labels"):
        krippendorff_alpha([[1], [2]])
