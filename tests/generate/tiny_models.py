"""Models so small that everything they can say can be listed, with its exact probability."""

import itertools
from collections.abc import Iterator

import torch
from plain_driver import Model
from torch import Tensor


def table_model(seed: int, vocabulary: int, spread: float = 1.5) -> Model:
    """A random distribution after each pair of tokens, and a random vector."""
    generator = torch.Generator().manual_seed(seed)
    shape = (vocabulary + 1, vocabulary)
    logits = torch.randn(*shape, vocabulary, generator=generator) * spread
    hidden = torch.randn(*shape, 6, generator=generator)

    def read(tokens: list[int]) -> tuple[Tensor, Tensor]:
        before = [vocabulary, *tokens[:-1]]
        return logits[before, tokens], hidden[before, tokens]

    return read


def texts(vocabulary: int, length: int, stop_ids: tuple[int, ...]) -> Iterator[list[int]]:
    """Every text that ends with a stop token or is `length` tokens long."""
    for size in range(1, length + 1):
        for text in itertools.product(range(vocabulary), repeat=size):
            if not any(token in stop_ids for token in text[:-1]) and (size == length or text[-1] in stop_ids):
                yield list(text)


def logprob(model: Model, prompt: list[int], text: list[int]) -> float:
    table = model([*prompt, *text[:-1]])[0][len(prompt) - 1 :].log_softmax(-1)
    return float(table[range(len(text)), text].sum())


def chi_square(counts: dict[tuple[int, ...], int], expected: dict[tuple[int, ...], float]) -> float:
    """Pearson's statistic in units of its distribution, (value - mean) / standard deviation.

    Outcomes that are expected less than 5 times are counted as one.
    """
    assert set(counts) <= set(expected)
    common = [outcome for outcome, n in expected.items() if n >= 5]
    pairs = [(counts.get(outcome, 0), expected[outcome]) for outcome in common]
    rest = sum(expected.values()) - sum(n for _, n in pairs)
    if rest > 0:
        pairs.append((sum(counts.values()) - sum(n for n, _ in pairs), rest))
    statistic = sum((n - e) ** 2 / e for n, e in pairs)
    freedom = len(pairs) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5
