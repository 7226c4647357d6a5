"""Whether a model is right as often as it says: reliability, expected calibration error, Brier score."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bin:
    """Answers of about the same confidence."""

    count: int
    confidence: float
    """Their mean probability."""
    accuracy: float
    """How many of them are right."""


def reliability(confidences: Sequence[float], correct: Sequence[bool], bins: int = 10) -> list[Bin]:
    """Bins of equal size, from the least to the most confident (Nguyen and O'Connor 2015).

    Bins of equal width leave most of them nearly empty. Fewer answers than bins: one each. The diagram draws
    accuracy over confidence.
    """
    order = np.argsort(confidences, kind="stable")
    parts = np.array_split(order, min(bins, len(order))) if len(order) else []
    sure, right = np.asarray(confidences, float), np.asarray(correct, float)
    return [Bin(len(part), float(sure[part].mean()), float(right[part].mean())) for part in parts]


def calibration_error(confidences: Sequence[float], correct: Sequence[bool], bins: int = 10) -> float:
    """Expected calibration error: the mean of |accuracy − confidence| over all answers (Guo 2017, eq. 3).

    Above 0 for a finite sample of a perfectly calibrated model too: compare models on the same items.
    """
    found = reliability(confidences, correct, bins)
    total = sum(one.count for one in found)
    return sum(one.count * abs(one.accuracy - one.confidence) for one in found) / total if total else 0.0


def brier_score(probabilities: Sequence[Sequence[float]], right: Sequence[int]) -> float:
    """Mean over the questions of Σ (p − y)² over their choices (Brier 1950): 0 is best, 2 is worst."""
    scores = []
    for line, answer in zip(probabilities, right, strict=True):
        wanted = np.zeros(len(line))
        wanted[answer] = 1
        scores.append(float(((np.asarray(line) - wanted) ** 2).sum()))
    return float(np.mean(scores))


def choice_probabilities(logprobs: Sequence[float]) -> list[float]:
    """Of a question's choices, given the log-likelihood of each: what is left when one of them must be it."""
    values = np.asarray(logprobs, float)
    weights = np.exp(values - values.max())
    return [float(weight) for weight in weights / weights.sum()]
