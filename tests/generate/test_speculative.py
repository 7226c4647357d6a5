"""Speculative decoding: greedy against transformers, drawn against the exact distribution."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_driver import Driver
from tiny_models import FAMILIES, chi_square, logprob, table_model, texts, theirs_and_ours
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from danlu.core.errors import UserError
from danlu.generate import speculative as module
from danlu.generate.speculative import Chooser, PromptLookup, speculative

PROMPT = [5, 77, 31, 8, 5, 77]
N = 24
PENALTY = RepetitionPenaltyLogitsProcessor(1.3)


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def trio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random model of transformers, the same as ours, and one that often says the same."""
    theirs, ours = theirs_and_ours(request.param, tmp_path_factory.mktemp("theirs"))
    close = theirs_and_ours(request.param, tmp_path_factory.mktemp("close"), 0.1)
    return theirs, ours, *close


def plain(theirs: Any, **options: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    mask = torch.ones_like(ids)
    settings = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False, "max_new_tokens": N}
    return theirs.generate(ids, attention_mask=mask, **{**settings, **options})[0, len(PROMPT) :].tolist()


def without_repeats(logits: Tensor, tokens: list[list[int]]) -> Tensor:
    rows = [PENALTY(torch.tensor([t]), row[None]) for row, t in zip(logits, tokens, strict=True)]
    return torch.cat(rows)


@pytest.mark.parametrize("length", [1, 4])
def test_greedy_is_plain_greedy_and_transformers_assisted(trio: Any, length: int) -> None:
    theirs, ours, their_draft, our_draft = trio
    driver = Driver(ours, our_draft)
    found = driver.run(speculative(driver.sequences, PROMPT, length=length, max_tokens=N))
    assert found.ids == plain(theirs) == plain(theirs, assistant_model=their_draft)
    assert sum(found.logprobs) == pytest.approx(logprob(ours, PROMPT, found.ids), abs=1e-4)
    assert found.passes + found.accepted == N
    assert driver.passes[0] == found.passes
    assert 0 < found.accepted < found.drafted <= length * found.passes
    assert driver.longest < len(PROMPT) + N, "nothing is read beyond what is asked for"


def test_a_draft_that_is_the_model_is_always_right(trio: Any) -> None:
    _, ours, *_ = trio
    driver = Driver(ours, ours)
    for rule in (None, without_repeats):
        found = driver.run(speculative(driver.sequences, PROMPT, None, 5, N, (), rule))
        assert found.passes == 1 + 4, "the first token, three times six, and the rest"
        assert found.accepted == found.drafted == N - 5


def test_lookup_and_processing_keep_the_greedy_answer(trio: Any) -> None:
    theirs, ours, _, our_draft = trio
    for draft in (None, PromptLookup(2)):
        for rule, options in ((None, {}), (without_repeats, {"repetition_penalty": 1.3})):
            driver = Driver(ours, our_draft)
            found = driver.run(speculative(driver.sequences, PROMPT, draft, 4, N, (), rule))
            assert found.ids == plain(theirs, **options)
            assert found.accepted <= found.drafted


def test_it_ends_at_a_stop_token_also_within_a_draft(trio: Any) -> None:
    theirs, ours, *_ = trio
    for place in range(3, 12):
        stop = plain(theirs)[place]
        driver = Driver(ours, ours)
        found = driver.run(speculative(driver.sequences, PROMPT, None, 5, N, (stop,)))
        assert found.ids == plain(theirs, eos_token_id=stop)
        assert found.stopped
        assert found.passes + found.accepted >= len(found.ids)


VOCABULARY, LENGTH, DRAWS, START = 4, 4, 10_000, [1, 3, 2, 1, 1, 2, 3, 3, 1, 3]
TARGET, OTHER = table_model(4, VOCABULARY), table_model(54, VOCABULARY)


def sharper(logits: Tensor, _: list[list[int]]) -> Tensor:
    """Temperature and top-k: what it rules out differs between model and draft."""
    scaled = logits / 0.8
    return scaled.masked_fill(scaled < scaled.topk(3).values[..., -1:], -torch.inf)


def deviation(draft: PromptLookup | None) -> float:
    """How far the texts of 10,000 runs are from the model's own distribution of texts, in deviations."""
    driver = Driver(TARGET, OTHER)
    generator = torch.Generator().manual_seed(3)
    counts: Counter[tuple[int, ...]] = Counter()
    accepted = drafted = 0
    for _ in range(DRAWS):
        program = speculative(driver.sequences, START, draft, 2, LENGTH, (0,), sharper, generator)
        found = driver.run(program)
        counts[tuple(found.ids)] += 1
        accepted, drafted = accepted + found.accepted, drafted + found.drafted
    assert 0.1 * drafted < accepted

    def processed(tokens: list[int]) -> tuple[Tensor, Tensor]:
        return sharper(TARGET(tokens)[0], []), TARGET(tokens)[1]

    chances = {tuple(t): torch.tensor(logprob(processed, START, t)) for t in texts(VOCABULARY, LENGTH, (0,))}
    expected = {text: DRAWS * float(chance.exp()) for text, chance in chances.items() if chance > -torch.inf}
    assert sum(expected.values()) == pytest.approx(DRAWS, rel=1e-5)
    return chi_square(counts, expected)


@pytest.mark.parametrize("draft", [None, PromptLookup(1)])
def test_drawn_texts_have_the_distribution_of_the_model(draft: PromptLookup | None) -> None:
    assert deviation(draft) < 5


def test_a_wrong_acceptance_rule_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what the model finds at least half as probable as the draft does."""
    monkeypatch.setattr(module, "acceptance", lambda p, q, token: float(p[token] >= q[token] / 2))
    assert deviation(None) > 5


def test_a_wrong_residual_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "residual", lambda p, q: p)
    assert deviation(None) > 5


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(1, 3), st.integers(1, 4))
def test_lookup_goes_on_as_after_the_last_like_place(ids: list[int], longest: int, n: int) -> None:
    try:
        next(PromptLookup(longest).guess(ids, n, Chooser(None, None)))
        raise AssertionError("it reads nothing")
    except StopIteration as end:
        guessed, q = end.value
    assert q is None
    text = "".join(map(str, ids))
    for size in range(min(longest, len(text) - 1), 0, -1):
        place = text[:-1].rfind(text[-size:])
        if place >= 0:
            assert "".join(map(str, guessed)) == text[place + size : place + size + n] != ""
            return
    assert guessed == []


def test_a_draft_of_another_vocabulary_is_refused() -> None:
    for prompt in ([1, 2], [1]):
        driver = Driver(table_model(0, 4), table_model(0, 5))
        with pytest.raises(UserError, match="draft model's vocabulary has 5 entries, the model's 4"):
            driver.run(speculative(driver.sequences, prompt))
        assert not driver.sequences.tokens


@pytest.mark.parametrize("wrong", [{"length": 0}, {"max_tokens": 0}])
def test_a_number_out_of_range_is_named(wrong: dict[str, int]) -> None:
    driver = Driver(table_model(0, 4), table_model(1, 4))
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is 0"):
        driver.run(speculative(driver.sequences, [1, 2], **wrong))
    with pytest.raises(UserError, match="has 0 tokens"):
        PromptLookup(0)
