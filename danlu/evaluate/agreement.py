"""How far raters agree beyond chance: kappa and alpha.

1 is agreement, 0 what chance gives, below 0 less than that. Where every rating is the same there is nothing
that chance could have got wrong, and the measures that divide by it are NaN.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np

Scale = Literal["nominal", "ordinal", "interval"]


def accuracy(given: Sequence[Hashable], right: Sequence[Hashable]) -> float:
    """Share of equal labels."""
    return sum(a == b for a, b in zip(given, right, strict=True)) / len(right)


def cohen_kappa(one: Sequence[Hashable], other: Sequence[Hashable]) -> float:
    """Of two raters, each with a distribution of labels of their own (Cohen 1960)."""
    n = len(one)
    shares, others = Counter(one), Counter(other)
    expected = sum(shares[label] * others[label] for label in shares) / n**2
    return _beyond(accuracy(one, other), expected)


def fleiss_kappa(items: Sequence[Sequence[Hashable]]) -> float:
    """Of the labels that each item got, equally many, from whomever (Fleiss 1971)."""
    if len({len(labels) for labels in items}) != 1 or len(items[0]) < 2:
        raise ValueError("Fleiss' kappa needs the same number of labels, at least two, of each item")
    n = len(items[0])
    counts = [Counter(labels) for labels in items]
    observed = sum(
        sum(times * (times - 1) for times in count.values()) / (n * (n - 1)) for count in counts
    ) / len(items)
    total = sum(counts, Counter[Hashable]())
    expected = sum((times / (n * len(items))) ** 2 for times in total.values())
    return _beyond(observed, expected)


def _beyond(observed: float, expected: float) -> float:
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def krippendorff_alpha(items: Sequence[Sequence[Any]], scale: Scale = "nominal") -> float:
    """1 − observed / expected disagreement of the labels that each item got (Krippendorff 2011).

    Items may have different numbers of labels; those with fewer than two don't count. Labels of ordinal and
    interval scales are numbers.
    """
    paired = [list(labels) for labels in items if len(labels) > 1]
    counts = Counter(label for labels in paired for label in labels)
    n = counts.total()
    if n == 0:
        raise ValueError("no item has two labels")
    distance = _distance(counts, scale)
    observed = sum(
        2 * sum(distance(a, b) for a, b in combinations(labels, 2)) / (len(labels) - 1) for labels in paired
    )
    expected = sum(2 * counts[a] * counts[b] * distance(a, b) for a, b in combinations(counts, 2)) / (n - 1)
    return 1 - observed / expected if expected else math.nan


def _distance(counts: Counter[Any], scale: Scale) -> Callable[[Any, Any], float]:
    """How different two labels are, squared; between ranks as many steps as labels lie between them."""
    if scale == "nominal":
        return lambda a, b: float(a != b)
    if scale == "interval":
        return lambda a, b: float((a - b) ** 2)
    ordered = sorted(counts)
    middles = np.cumsum([counts[label] for label in ordered]) - np.array([counts[o] for o in ordered]) / 2
    rank = dict(zip(ordered, middles.tolist(), strict=True))
    return lambda a, b: (rank[a] - rank[b]) ** 2
