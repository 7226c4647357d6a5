"""Models of transformers beside ours, and models whose every text can be listed with its probability."""

import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from families_table import CASES, make_theirs
from plain_driver import Model, whole_pass
from torch import Tensor

from danlu.model.checkpoint import load_model

FAMILIES = ["LlamaConfig", "GPT2Config"]


def theirs_and_ours(name: str, folder: Path, disturb: float = 0.0) -> tuple[Any, Model]:
    """A random model of transformers that is sure of little and repeats little, and the same as ours.

    `disturb`: how far its matrices are from those of the model of the same name.
    """
    theirs = make_theirs(name, CASES[name][2 if name == "GPT2Config" else 0])
    with torch.no_grad():
        theirs.get_output_embeddings().weight.mul_(0.4)
        for parameter in theirs.parameters() if disturb else ():
            parameter.add_(torch.randn_like(parameter) * disturb * parameter.std())
    theirs.save_pretrained(folder)
    return theirs, whole_pass(load_model(folder))


def table_model(seed: int, vocabulary: int) -> Model:
    """Random logits and vectors, decided by the last two tokens, and a little by all before them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocabulary + 1, vocabulary, vocabulary, generator=generator) * 1.5
    hidden = torch.randn(vocabulary + 1, vocabulary, 6, generator=generator)
    past = torch.randn(vocabulary, vocabulary, generator=generator) * 0.4

    @cache
    def look_up(tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        before = [vocabulary, *tokens[:-1]]
        ages = torch.arange(len(tokens))[:, None] - torch.arange(len(tokens))
        faded = (0.8**ages).tril() @ past[list(tokens)]
        return logits[before, tokens] + faded, hidden[before, tokens]

    return lambda tokens: look_up(tuple(tokens))


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
