"""Contrastive search against its formula on transformers; contrastive decoding against all texts."""

import math
from typing import Any

import pytest
import torch
from plain_driver import Driver, Model
from tiny_models import FAMILIES, logprob, table_model, texts, theirs_and_ours
from torch import Tensor

from danlu.core.errors import UserError
from danlu.generate.beam import BeamParams
from danlu.generate.contrastive import contrastive_decoding, contrastive_search

PROMPT = [5, 77, 31, 8]


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Model]:
    return theirs_and_ours(request.param, tmp_path_factory.mktemp("theirs"))


@torch.no_grad()
def plain_contrastive_search(theirs: Any, prompt: list[int], k: int, alpha: float, n: int) -> list[int]:
    """Each candidate is read with all that is before it."""
    ids = list(prompt)
    for _ in range(n):
        probabilities = theirs(torch.tensor([ids])).logits[0, -1].softmax(-1)
        values = {}
        for token in probabilities.topk(k).indices.tolist():
            hidden = theirs(torch.tensor([[*ids, token]]), output_hidden_states=True).hidden_states[-1][0]
            cosines = [float(torch.cosine_similarity(hidden[-1], vector, dim=0)) for vector in hidden[:-1]]
            values[token] = (1 - alpha) * float(probabilities[token]) - alpha * max(cosines)
        ids.append(max(values, key=values.__getitem__))
    return ids[len(prompt) :]


@pytest.mark.parametrize(("k", "alpha"), [(4, 0.6), (8, 0.1), (1, 0.6), (6, 1.0), (5, 0.0)])
def test_contrastive_search_is_that_of_the_formula(pair: tuple[Any, Model], k: int, alpha: float) -> None:
    theirs, ours = pair
    driver = Driver(ours)
    found = driver.run(contrastive_search(driver.sequences, PROMPT, k, alpha, 10))
    assert found.ids == plain_contrastive_search(theirs, PROMPT, k, alpha, 10)
    assert sum(found.logprobs) == pytest.approx(logprob(ours, PROMPT, found.ids), abs=1e-4)
    assert not found.stopped
    stop = found.ids[6]
    stopped = driver.run(contrastive_search(driver.sequences, PROMPT, k, alpha, 10, (stop,)))
    assert stopped.ids == found.ids[: found.ids.index(stop) + 1]
    assert stopped.stopped


def test_contrastive_search_chooses_among_what_processing_leaves(pair: tuple[Any, Model]) -> None:
    def ruled_out(logits: Tensor, tokens: list[list[int]]) -> Tensor:
        return logits.masked_fill(torch.arange(logits.shape[1]) % 2 == len(tokens[0]) % 2, -math.inf)

    driver = Driver(pair[1])
    found = driver.run(contrastive_search(driver.sequences, PROMPT, 100, 0.5, 8, (), ruled_out))
    assert [token % 2 for token in found.ids] == [1, 0] * 4


def worth(models: tuple[Model, Model], prompts: tuple[list[int], list[int]], text: list[int], alpha: float,
          temperature: float) -> float:  # fmt: skip
    """The sum over the text, by the definition, in probabilities."""
    total = 0.0
    for place, token in enumerate(text):
        logits = [
            model([*prompt, *text[:place]])[0][-1].double()
            for model, prompt in zip(models, prompts, strict=True)
        ]
        expert, amateur = logits[0].softmax(-1), (logits[1] / temperature).softmax(-1)
        if expert[token] < alpha * expert.max():
            return -math.inf
        total += math.log(expert[token] / amateur[token])
    return total


@pytest.mark.parametrize(("alpha", "temperature"), [(0.1, 1.0), (0.3, 0.5), (0.01, 2.0)])
@pytest.mark.parametrize("seed", range(3))
def test_contrastive_decoding_finds_the_best_of_everything(
    seed: int, alpha: float, temperature: float
) -> None:
    models = table_model(seed, 4), table_model(seed + 100, 4)
    prompts = [1, 2, 3], [2, 2]
    params = BeamParams(beams=300, n=4, max_tokens=4, stop_ids=(0,), early_stopping="never")
    driver = Driver(*models)
    found = driver.run(
        contrastive_decoding(driver.sequences, prompts[0], params, alpha, temperature, prompts[1])
    )
    scores = {
        tuple(text): worth(models, prompts, text, alpha, temperature) / len(text)
        for text in texts(4, 4, (0,))
    }
    expected = sorted(scores, key=lambda text: -scores[text])[: len(found)]
    assert [tuple(answer.ids) for answer in found] == expected
    assert [answer.score for answer in found] == pytest.approx([scores[text] for text in expected], abs=1e-5)
    for answer in found:
        assert sum(answer.logprobs) == pytest.approx(logprob(models[0], prompts[0], answer.ids), abs=1e-4)


def test_an_amateur_that_knows_nothing_changes_nothing(pair: tuple[Any, Model]) -> None:
    """Both read the prompt where no other is given; at a high temperature the amateur's view is flat."""
    theirs, ours = pair
    driver = Driver(ours, ours)
    params = BeamParams(beams=1, max_tokens=8)
    [found] = driver.run(contrastive_decoding(driver.sequences, PROMPT, params, 0.1, 1e9))
    expected = theirs.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=8, eos_token_id=None)
    assert found.ids == expected[0, len(PROMPT) :].tolist()
    [found] = driver.run(contrastive_decoding(driver.sequences, PROMPT, params, 0.1))
    assert found.score == pytest.approx(0, abs=1e-5), "a model against itself"


def test_two_vocabularies_are_refused() -> None:
    driver = Driver(table_model(0, 4), table_model(0, 5))
    with pytest.raises(UserError, match="amateur model's vocabulary has 5 entries, the model's 4"):
        driver.run(contrastive_decoding(driver.sequences, [1], BeamParams()))


@pytest.mark.parametrize("wrong", [{"k": 0}, {"alpha": 1.1}, {"alpha": -0.1}, {"max_tokens": 0}])
def test_a_search_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    driver = Driver(table_model(0, 4))
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is"):
        driver.run(contrastive_search(driver.sequences, [1], **wrong))


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"alpha": 1.5}, {"temperature": 0.0}])
def test_a_contrast_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    driver = Driver(table_model(0, 4), table_model(1, 4))
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is"):
        driver.run(contrastive_decoding(driver.sequences, [1], BeamParams(), **wrong))
