"""What texts are like by themselves, and beside others: diversity, repetition, overlap, relevance."""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

# Of one set of texts


def distinct_n(texts: list[str], n: int = 2) -> float:
    """Distinct n-grams of words over all n-grams of the texts together (Li 2016)."""
    grams: list[tuple[str, ...]] = []
    for text in texts:
        said = text.lower().split()
        grams += [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def ends_in_a_loop(ids: Sequence[int], times: int = 3, shortest: int = 2) -> bool:
    """Whether the end is a phrase of at least `shortest` tokens, `times` times in a row."""
    ids = list(ids)
    return any(ids[-size * times :] == ids[-size:] * times for size in range(shortest, len(ids) // times + 1))


def self_bleu(texts: Sequence[Sequence[int]], longest: int = 4) -> list[float]:
    """BLEU of each text with the others as references, for texts of one length: no brevity penalty.

    The geometric mean of the precisions of n-grams, n = 1 to `longest`, each count clipped at the most that
    one reference has; 0 where one of them is 0.
    """
    logs = np.zeros(len(texts))
    for n in range(1, longest + 1):
        counts = [Counter(tuple(t[i : i + n]) for i in range(len(t) - n + 1)) for t in texts]
        most: dict[tuple[int, ...], tuple[int, int]] = {}
        for count in counts:
            for gram, times in count.items():
                first, second = most.get(gram, (0, 0))
                most[gram] = (max(first, times), max(second, min(first, times)))
        for place, count in enumerate(counts):
            kept = sum(min(times, _others(most[gram], times)) for gram, times in count.items())
            logs[place] += math.log(kept / count.total()) / longest if kept else -math.inf
    return [float(value) for value in np.exp(logs)]


def _others(most: tuple[int, int], own: int) -> int:
    """The highest count of the other texts, given the two highest of all."""
    return most[1] if own == most[0] else most[0]


def zipf_coefficient(texts: Sequence[Sequence[int]], first: int = 10, last: int = 1000) -> float:
    """Minus the slope of log frequency over log rank, by least squares."""
    counts = sorted(Counter(token for text in texts for token in text).values(), reverse=True)[:last]
    ranks = np.arange(1, len(counts) + 1)
    return float(-np.polyfit(np.log(ranks[first - 1 :]), np.log(counts[first - 1 :]), 1)[0])


# Of a text and what was expected


def token_f1(text: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words, each as often as it stands there (Rajpurkar 2016)."""
    said, wanted = Counter(words(text)), Counter(words(reference))
    both = (said & wanted).total()
    return 2 * both / (said.total() + wanted.total()) if both else 0.0


def hits_at(scores: Sequence[float], right: int, k: int = 1) -> bool:
    """Whether `right` is among the k highest of the candidates' scores; a tie counts against it."""
    return sum(score >= scores[right] for place, score in enumerate(scores) if place != right) < k


def bm25(query: str, documents: Sequence[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """The score of each document (Robertson and Zaragoza 2009; idf as in Lucene, never negative)."""
    counts = [Counter(words(document)) for document in documents]
    mean = sum(count.total() for count in counts) / len(counts)
    scores = [0.0] * len(documents)
    for word, times in Counter(words(query)).items():
        holding = sum(word in count for count in counts)
        idf = math.log(1 + (len(counts) - holding + 0.5) / (holding + 0.5))
        for place, count in enumerate(counts):
            length = k1 * (1 - b + b * count.total() / mean)
            scores[place] += times * idf * count[word] * (k1 + 1) / (count[word] + length)
    return scores


def words(text: str) -> list[str]:
    """In lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())
