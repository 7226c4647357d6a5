"""Inverse prompting against the best of everything that a tiny model can say, and its beam step by step."""

import itertools
from pathlib import Path

import pytest
import torch
from plain_driver import Driver
from tiny_models import FAMILIES, logprob, table_model, texts, theirs_and_ours
from torch import Tensor

from danlu.core.errors import UserError
from danlu.generate.inverse_prompting import (
    InverseParams,
    continuation_logprobs,
    inverse_prompting,
    template,
)
from danlu.tokens.tokenizer import Tokenizer

MODEL, PROMPT = table_model(4, 4), [2, 3, 1]


def inverse(answer: list[int]) -> tuple[list[int], list[int]]:
    return [1, *answer, 2], [3, 2, 3]


def worth(answer: list[int]) -> float:
    read, target = inverse(answer)
    return logprob(MODEL, read, target)


def anything(logits: Tensor, tokens: list[list[int]]) -> Tensor:
    """Everything is drawn, given enough draws."""
    return torch.zeros_like(logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_continuations_are_as_probable_as_in_transformers(name: str, tmp_path: Path) -> None:
    theirs, ours = theirs_and_ours(name, tmp_path)
    driver = Driver(ours)
    pairs = [([4, 5, 6], [7, 8, 9, 10]), ([1], [2]), ([3, 3, 3, 3, 3], [4, 4])]
    found = driver.run(continuation_logprobs(driver.sequences, pairs))
    for (context, continuation), logp in zip(pairs, found, strict=True):
        ids = torch.tensor([context + continuation])
        labels = ids.clone()
        labels[0, : len(context)] = -100
        with torch.no_grad():
            mean = theirs(ids, labels=labels).loss
        assert logp == pytest.approx(-float(mean) * len(continuation), abs=1e-3)


@pytest.mark.parametrize("segment", [1, 2, 3])
@pytest.mark.parametrize("fluency", [0.0, 2.0])
def test_a_beam_that_holds_everything_finds_the_best(segment: int, fluency: float) -> None:
    often = 20 * 4**segment
    params = InverseParams(
        beams=200, branch=often, per_parent=200, segment=segment, fluency=fluency,
        n=5, max_tokens=3, stop_ids=(0,),
    )  # fmt: skip
    driver = Driver(MODEL)
    found = driver.run(inverse_prompting(driver.sequences, PROMPT, inverse, params, anything))
    scores = {
        tuple(text): worth(text) + fluency * logprob(MODEL, PROMPT, text) / len(text)
        for text in texts(4, 3, (0,))
    }
    expected = sorted(scores, key=lambda text: -scores[text])[:5]
    assert [tuple(answer.ids) for answer in found] == expected
    assert [answer.score for answer in found] == pytest.approx([scores[text] for text in expected], abs=1e-4)
    for answer in found:
        assert sum(answer.logprobs) == pytest.approx(logprob(MODEL, PROMPT, answer.ids), abs=1e-4)
        assert answer.stopped == (answer.ids[-1] == 0)


@pytest.mark.parametrize("per_parent", [1, 2, 9])
def test_each_step_keeps_the_best_and_few_of_a_kind(per_parent: int) -> None:
    """What the inverse prompt is asked about shows which texts were continued."""
    params = InverseParams(beams=3, branch=4, per_parent=per_parent, segment=2, max_tokens=8, seed=2)
    asked: list[list[int]] = []

    def recorded(answer: list[int]) -> tuple[list[int], list[int]]:
        asked.append(list(answer))
        return inverse(answer)

    driver = Driver(MODEL)
    [found] = driver.run(inverse_prompting(driver.sequences, PROMPT, recorded, params))
    steps = [[text for text in asked if len(text) == length] for length in (2, 4, 6, 8)]
    assert [text for step in steps for text in step] == asked
    for step, following in itertools.pairwise(steps):
        kept: list[list[int]] = []
        for text in sorted(step, key=worth, reverse=True):
            of_parent = [other for other in kept if other[:-2] == text[:-2]]
            if text not in kept and len(of_parent) < per_parent and len(kept) < 3:
                kept.append(text)
        assert len(following) == 4 * len(kept)
        assert sorted({tuple(text[: len(step[0])]) for text in following}) == sorted(map(tuple, kept))
    assert found.score == pytest.approx(max(map(worth, steps[-1])), abs=1e-4)


def test_a_segment_ends_at_its_mark_and_is_drawn_from_the_model() -> None:
    """At a temperature near 0 every draw is the greedy text."""
    ids = list(PROMPT)
    while len(ids) < 12:
        ids.append(int(MODEL(ids)[0][-1].argmax()))
    asked: list[list[int]] = []

    def recorded(answer: list[int]) -> tuple[list[int], list[int]]:
        asked.append(list(answer))
        return inverse(answer)

    end = ids[4]
    params = InverseParams(beams=1, branch=1, segment=4, ends=(end,), max_tokens=9)
    driver = Driver(MODEL)
    program = inverse_prompting(driver.sequences, PROMPT, recorded, params, lambda logits, _: logits * 1e4)
    [found] = driver.run(program)
    assert found.ids == ids[3:]
    lengths, since = [], 0
    for place, token in enumerate(found.ids, 1):
        since += 1
        if token == end or since == 4 or place == 9:
            lengths.append(place)
            since = 0
    assert [len(text) for text in asked] == lengths
    assert driver.longest <= len(PROMPT) + 9 + 4


def test_the_template_wraps_the_text_of_the_answer(tokenizer: Tokenizer) -> None:
    ask = template(tokenizer, '"', '" tells of', " the furnace")
    read, target = ask(tokenizer.encode("Fire and glass"))
    assert tokenizer.decode(read).endswith('"Fire and glass" tells of')
    assert read[: len(tokenizer.document_start)] == list(tokenizer.document_start)
    assert tokenizer.decode(target) == " the furnace"


@pytest.mark.parametrize("wrong", ["beams", "branch", "per_parent", "segment", "n", "max_tokens"])
def test_a_number_out_of_range_is_named(wrong: str) -> None:
    with pytest.raises(UserError, match=f"{wrong} is 0"):
        InverseParams(**{wrong: 0})
    with pytest.raises(UserError, match="fluency is -1"):
        InverseParams(fluency=-1)


def test_nothing_to_predict_is_refused() -> None:
    driver = Driver(MODEL)
    with pytest.raises(UserError, match="is empty"):
        driver.run(inverse_prompting(driver.sequences, PROMPT, lambda ids: (ids, []), InverseParams()))
    assert not driver.sequences.tokens
