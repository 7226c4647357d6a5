"""What lm-evaluation-harness calls for the tasks in `packs/`: choices and scores of one question."""

import re
import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from danlu.evaluate.answers import last_number, stated_answer
from danlu.evaluate.text_measures import token_f1

Doc = Mapping[str, Any]


def letters(doc: Doc) -> list[str]:
    """The choices' names, where they stand in the prompt."""
    return list("ABCDEFGHIJ"[: len(doc["choices"])])


def plain(text: str) -> str:
    """A short answer without what doesn't matter: case, articles, punctuation (Rajpurkar et al. 2016)."""
    lowered = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", lowered).split())


def answer(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Against the right answers, of which the nearest counts."""
    said = plain(results[0])
    right = [plain(text) for text in doc["answers"]]
    return {
        "exact_match": float(said in right),
        "f1": max(token_f1(said, text) for text in right),
    }


def exact(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Whether the first line is the answer, and nothing else."""
    return {"exact_match": float(results[0].strip().partition("\n")[0].strip() == doc["answers"][0])}


def number(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Whether the first line's last number is the right one."""
    return {"exact_match": float(last_number(results[0].partition("\n")[0]) == doc["answers"][0])}


def reasoned_number(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Whether a chain of thought ends in the right number."""
    return {"exact_match": float(last_number(results[0]) == doc["answers"][0])}


def stated(doc: Doc, results: Sequence[str]) -> dict[str, tuple[str, float]]:
    """Whether what a text states is exactly the answer; with the subject, for `mean_of_subjects`."""
    return {"exact_match": (doc["subject"], float(stated_answer(results[0]) == doc["answers"][0]))}


def mean_of_subjects(items: Sequence[tuple[str, float]]) -> float:
    """Each subject counts the same, however many questions it has."""
    by_subject: dict[str, list[float]] = defaultdict(list)
    for subject, score in items:
        by_subject[subject].append(score)
    return float(np.mean([np.mean(scores) for scores in by_subject.values()]))


def true_mass(doc: Doc, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """The probability of the right answers among all that are listed: TruthfulQA's MC2 (Lin et al. 2022)."""
    logprobs = np.array([logprob for logprob, _ in results])
    shares = np.exp(logprobs - logprobs.max())
    return {"mass": float(shares[: doc["n_right"]].sum() / shares.sum())}
