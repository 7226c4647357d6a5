"""Samples against the exact distribution of texts, and their order against exact likelihoods."""

from collections import Counter
from typing import Any

import pytest
import torch
from plain_driver import Driver
from tiny_models import chi_square, logprob, table_model, texts
from torch import Tensor

from danlu.core.errors import UserError
from danlu.generate.program import Answer
from danlu.generate.rank import best_of_n, sample, sample_and_rank

MODEL, START, VOCABULARY, LENGTH = table_model(2, 4), [1, 3], 4, 3


def hotter(logits: Tensor, tokens: list[list[int]]) -> Tensor:
    """Differs by the number of tokens, so that a row that gets another's tokens shows."""
    heat = torch.tensor([1.0 + len(row) / 4 for row in tokens])
    return logits / heat[:, None]


def test_samples_have_the_exact_distribution() -> None:
    n = 8000
    driver = Driver(MODEL)
    answers = driver.run(sample(driver.sequences, START, n, LENGTH, (0,), hotter, seed=1))

    def processed(tokens: list[int]) -> tuple[Tensor, Tensor]:
        logits, hidden = MODEL(tokens)
        return hotter(logits, [tokens[: place + 1] for place in range(len(tokens))]), hidden

    expected = {
        tuple(text): n * torch.tensor(logprob(processed, START, text)).exp().item()
        for text in texts(VOCABULARY, LENGTH, (0,))
    }
    assert chi_square(Counter(tuple(answer.ids) for answer in answers), expected) < 5
    for answer in answers[:50]:
        assert sum(answer.logprobs) == pytest.approx(logprob(MODEL, START, answer.ids), abs=1e-4)
        assert answer.score == sum(answer.logprobs)
        assert answer.stopped == (answer.ids[-1] == 0)


def test_more_answers_leave_the_first_as_they_are() -> None:
    driver = Driver(MODEL)
    many = driver.run(sample(driver.sequences, START, 20, 8, (0,), seed=5))
    few = driver.run(sample(driver.sequences, START, 3, 8, (0,), seed=5))
    assert [a.ids for a in few] == [a.ids for a in many[:3]]
    other = driver.run(sample(driver.sequences, START, 20, 8, (0,), seed=6))
    assert [a.ids for a in other] != [a.ids for a in many]
    assert len({tuple(a.ids) for a in many}) > 5


@pytest.mark.parametrize("per_token", [False, True])
def test_sample_and_rank_puts_the_likeliest_first(per_token: bool) -> None:
    """Hot enough, and often enough, that everything is drawn: then the first is the best of all."""
    driver = Driver(MODEL)
    found = driver.run(sample_and_rank(driver.sequences, START, 2000, 3.0, per_token, LENGTH, (0,)))
    worth = {
        tuple(text): logprob(MODEL, START, text) / (len(text) if per_token else 1)
        for text in texts(VOCABULARY, LENGTH, (0,))
    }
    assert {tuple(answer.ids) for answer in found} == set(worth)
    assert [a.score for a in found] == pytest.approx([worth[tuple(a.ids)] for a in found], abs=1e-5)
    assert [a.score for a in found] == sorted((a.score for a in found), reverse=True)
    assert tuple(found[0].ids) == max(worth, key=worth.__getitem__)


def test_the_temperature_is_that_of_the_draws() -> None:
    driver = Driver(MODEL)
    [cold] = driver.run(sample_and_rank(driver.sequences, START, 1, 1e-4, max_tokens=6))
    ids = list(START)
    while len(ids) < 8:
        ids.append(int(MODEL(ids)[0][-1].argmax()))
    assert cold.ids == ids[2:]


def test_best_of_n_ranks_by_any_score() -> None:
    answers = [Answer([4, 1]), Answer([9]), Answer([2, 2, 2]), Answer([7, 2])]
    ranked = best_of_n(answers, lambda answer: sum(answer.ids))
    assert [(a.ids, a.score) for a in ranked] == [([9], 9), ([7, 2], 9), ([2, 2, 2], 6), ([4, 1], 5)]
    with pytest.raises(UserError, match="not a number"):
        best_of_n(answers, lambda answer: float("nan"))


@pytest.mark.parametrize("wrong", [{"n": 0}, {"max_tokens": 0}, {"temperature": 0}])
def test_a_number_out_of_range_is_named(wrong: dict[str, Any]) -> None:
    driver = Driver(MODEL)
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is 0"):
        driver.run(sample_and_rank(driver.sequences, START, **wrong))
