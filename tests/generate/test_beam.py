"""Beam searches against transformers, and against the best of everything that a tiny model can say."""

import itertools
from typing import Any

import pytest
import torch
from plain_driver import Driver, Model
from tiny_models import FAMILIES, logprob, table_model, texts, theirs_and_ours
from torch import Tensor
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from danlu.core.errors import UserError
from danlu.generate.beam import (
    BeamParams,
    Candidate,
    beam_sample,
    beam_search,
    constrained_beam_search,
    diverse_beam_search,
    leading_on,
    share_out,
    tokens_met,
)
from danlu.generate.program import Answer, Process

PROMPT = [5, 77, 31, 8]
N = 12
STOPS = tuple(range(3, 128, 8))
EVEN = tuple(range(0, 128, 2))


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Model]:
    return theirs_and_ours(request.param, tmp_path_factory.mktemp("theirs"))


def processed(*processors: Any) -> Process:
    both = LogitsProcessorList(processors)
    return lambda logits, tokens: both(torch.tensor(tokens), logits)


def theirs_of(model: Any, **options: Any) -> Any:
    ids = torch.tensor([PROMPT])
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=N,
        pad_token_id=1,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )


def check_same(found: list[Answer], expected: Any) -> None:
    """Ids and scores; behind the end of an answer they put padding."""
    assert len(found) == len(expected.sequences)
    for answer, row in zip(found, expected.sequences.tolist(), strict=True):
        padding = row[len(PROMPT) + len(answer.ids) :]
        assert row[len(PROMPT) :] == answer.ids + padding
        assert set(padding) <= {1}
    scores = [answer.score for answer in found]
    assert scores == pytest.approx(expected.sequences_scores.tolist(), rel=1e-5, abs=1e-4)


SETTINGS = [
    {},
    {"n": 4, "stop_ids": STOPS},
    {"beams": 3, "n": 3, "stop_ids": STOPS, "early_stopping": True},
    {"n": 4, "stop_ids": STOPS, "length_penalty": 2.5, "early_stopping": "never"},
    {"n": 2, "stop_ids": STOPS, "length_penalty": 0.0, "early_stopping": "never"},
    {"beams": 6, "n": 6, "stop_ids": STOPS, "length_penalty": -1.0},
    {"beams": 4, "n": 4, "stop_ids": STOPS[:1], "length_penalty": 3.0},
    {"beams": 2, "n": 2, "stop_ids": EVEN, "length_penalty": 2.0},
    {"beams": 2, "n": 2, "stop_ids": EVEN, "length_penalty": 2.0, "early_stopping": "never"},
    {"beams": 3, "n": 3, "stop_ids": EVEN},
]


def options_of(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_beams": settings.get("beams", 4),
        "num_return_sequences": settings.get("n", 1),
        "length_penalty": settings.get("length_penalty", 1.0),
        "early_stopping": settings.get("early_stopping", False),
        "eos_token_id": list(settings.get("stop_ids", ())) or None,
    }


@pytest.mark.parametrize(
    ("settings", "block"), [(settings, 0) for settings in SETTINGS] + [(SETTINGS[1], 1), (SETTINGS[2], 2)]
)
def test_beam_search_is_that_of_transformers(
    pair: tuple[Any, Model], settings: dict[str, Any], block: int
) -> None:
    theirs, ours = pair
    params = BeamParams(**{"max_tokens": N, **settings})
    process = processed(NoRepeatNGramLogitsProcessor(block)) if block else None
    driver = Driver(ours)
    found = driver.run(beam_search(driver.sequences, PROMPT, params, process))
    check_same(found, theirs_of(theirs, no_repeat_ngram_size=block, do_sample=False, **options_of(settings)))
    for answer in found:
        assert sum(answer.logprobs) == pytest.approx(logprob(ours, PROMPT, answer.ids), abs=1e-4)
        assert answer.stopped == (answer.ids[-1] in params.stop_ids)
    assert driver.longest < len(PROMPT) + N


@pytest.mark.parametrize("settings", SETTINGS[:4])
@pytest.mark.parametrize("seed", range(2))
def test_beam_sample_is_that_of_transformers_with_the_same_draws(
    pair: tuple[Any, Model], settings: dict[str, Any], seed: int
) -> None:
    theirs, ours = pair
    params = BeamParams(**{"max_tokens": N, **settings})
    process = processed(TemperatureLogitsWarper(1.7), TopKLogitsWarper(60), TopPLogitsWarper(0.98))
    driver = Driver(ours)
    generator = torch.Generator().manual_seed(seed)
    found = driver.run(beam_sample(driver.sequences, PROMPT, params, generator, process))
    torch.manual_seed(seed)
    options = {"do_sample": True, "temperature": 1.7, "top_k": 60, "top_p": 0.98, **options_of(settings)}
    check_same(found, theirs_of(theirs, **options))


def test_other_draws_are_other_answers(pair: tuple[Any, Model]) -> None:
    driver, params = Driver(pair[1]), BeamParams(max_tokens=8)
    answers = []
    for seed in (0, 0, 1):  # the third draws otherwise
        generator = torch.Generator().manual_seed(seed)
        answers.append(driver.run(beam_sample(driver.sequences, PROMPT, params, generator)))
    assert answers[0] == answers[1] != answers[2]


VOCABULARY, LENGTH = 5, 4
EVERYTHING = VOCABULARY**LENGTH


def best_texts(model: Model, prompt: list[int], penalty: float, phrases: list[list[int]]) -> list[Answer]:
    """Of everything that can be said, the texts with all phrases, the best first."""
    found = []
    for text in texts(VOCABULARY, LENGTH, (0,)):
        joined = "".join(map(str, text))
        if all("".join(map(str, phrase)) in joined for phrase in phrases):
            found.append(Answer(text, score=logprob(model, prompt, text) / len(text) ** penalty))
    return sorted(found, key=lambda answer: -answer.score)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("phrases", [[], [[2]], [[3, 1]], [[1], [4]], [[1, 1, 2]], [[2, 3], [3]], [[4], [4]]])
def test_a_beam_that_holds_everything_finds_the_best(
    seed: int, phrases: list[list[int]], penalty: float
) -> None:
    model = table_model(seed, VOCABULARY)
    rules: dict[str, Any] = {"length_penalty": penalty, "stop_ids": (0,), "early_stopping": "never"}
    params = BeamParams(beams=EVERYTHING, n=5, max_tokens=LENGTH, **rules)
    driver = Driver(model)
    found = driver.run(constrained_beam_search(driver.sequences, [2, 1], params, phrases))
    expected = best_texts(model, [2, 1], penalty, phrases)[:5]
    assert [answer.ids for answer in found] == [answer.ids for answer in expected]
    assert [answer.score for answer in found] == pytest.approx(
        [answer.score for answer in expected], abs=1e-5
    )
    if not phrases:
        assert found == driver.run(beam_search(driver.sequences, [2, 1], params))


@pytest.mark.parametrize("beams", [1, 2, 4])
def test_a_narrow_beam_meets_every_phrase(beams: int) -> None:
    for seed, phrases in itertools.product(range(4), ([[1, 2]], [[4], [3]], [[3, 3, 4]])):
        model = table_model(seed, VOCABULARY)
        params = BeamParams(beams=beams, n=beams, max_tokens=LENGTH, length_penalty=0.0, stop_ids=(0,))
        driver = Driver(model)
        found = driver.run(constrained_beam_search(driver.sequences, [1], params, phrases))
        assert found
        possible = {tuple(a.ids): a.score for a in best_texts(model, [1], 0.0, phrases)}
        for answer in found:
            assert answer.score == pytest.approx(possible[tuple(answer.ids)], abs=1e-5)


def test_hypotheses_on_the_way_to_a_phrase_have_their_share_of_the_beam() -> None:
    seen: list[list[list[int]]] = []

    def watch(logprobs: Tensor, tokens: list[list[int]]) -> Tensor:
        seen.append([ids[1:] for ids in tokens])
        return logprobs

    driver, phrase, n = Driver(table_model(0, 12)), [3, 5, 4], 10
    params = BeamParams(beams=8, max_tokens=n)
    driver.run(constrained_beam_search(driver.sequences, [1], params, [phrase], watch))
    met = [sorted(tokens_met(ids, [phrase]) for ids in rows) for rows in seen]
    assert met[4:8] == [[0, 0, 1, 1, 2, 2, 3, 3]] * 4
    # Too late to begin, then to go on; two on the way make two a step, the rest is of those who are through.
    assert met[8:] == [[1, 1, 2, 2, 3, 3, 3, 3], [2, 2, 3, 3, 3, 3, 3, 3]]


def test_met_tokens_are_counted_and_forgotten_when_a_phrase_breaks_off() -> None:
    phrases = [[1, 2, 1, 3], [7]]
    for ids, met, onward in [
        ([], 0, {1, 7}),
        ([1], 1, {2, 1, 7}),
        ([1, 2, 1], 3, {3, 1, 7}),
        ([1, 2, 1, 2], 2, {1, 7}),
        ([1, 2, 1, 4], 0, {1, 7}),
        ([7, 1, 2], 3, {1}),
        ([1, 2, 1, 3, 5], 4, {7}),
        ([1, 2, 1, 3, 7], 5, set()),
    ]:
        assert (tokens_met(ids, phrases), leading_on(ids, phrases)) == (met, onward), ids


def test_banks_share_the_beam() -> None:
    def bank(met: int, n: int) -> list[Candidate]:
        return [Candidate(-float(place), met, place) for place in range(n)]

    for sizes, beams, expected in [
        ([9, 9, 9], 6, [2, 2, 2]),
        ([9, 9, 9], 7, [2, 2, 3]),
        ([9, 9, 1], 6, [2, 3, 1]),
        ([9, 1, 1], 8, [6, 1, 1]),
        ([9, 9, 9], 2, [0, 1, 1]),
        ([9, 0, 0], 4, [4, 0, 0]),
        ([1, 1, 1], 8, [1, 1, 1]),
    ]:
        chosen = share_out({met: bank(met, n) for met, n in enumerate(sizes)}, beams)
        assert [sum(c.row == met for c in chosen) for met in range(3)] == expected
        assert all(c.token < expected[c.row] for c in chosen), "the best of each bank"


def plainly_diverse(
    model: Model, prompt: list[int], groups: int, width: int, diversity: float, n_tokens: int
) -> list[tuple[list[int], float]]:
    """Algorithm 1, on lists of texts."""
    beams: list[list[tuple[list[int], float]]] = [[([], 0.0)] for _ in range(groups)]
    for _ in range(n_tokens):
        taken: list[int] = []
        for group, beam in enumerate(beams):
            successors = []
            for text, score in beam:
                logprobs = model([*prompt, *text])[0][-1].log_softmax(-1).tolist()
                for token, value in enumerate(logprobs):
                    successors.append(([*text, token], score + value - diversity * taken.count(token)))
            beams[group] = sorted(successors, key=lambda successor: -successor[1])[:width]
            taken += [text[-1] for text, _ in beams[group]]
    return [beams[group][rank] for rank in range(width) for group in range(groups)]


@pytest.mark.parametrize(("groups", "width"), [(3, 1), (2, 2), (3, 3), (1, 4)])
@pytest.mark.parametrize("diversity", [0.0, 0.6, 50.0])
def test_diverse_beams_are_those_of_the_plain_algorithm(groups: int, width: int, diversity: float) -> None:
    for seed in range(3):
        model = table_model(seed, 12)
        params = BeamParams(beams=groups * width, n=groups * width, max_tokens=6)
        driver = Driver(model)
        found = driver.run(diverse_beam_search(driver.sequences, [1, 4], params, groups, diversity))
        expected = plainly_diverse(model, [1, 4], groups, width, diversity, 6)
        assert [answer.ids for answer in found] == [text for text, _ in expected]
        assert [answer.score * 6 for answer in found] == pytest.approx([s for _, s in expected], abs=1e-4)
        if diversity == 50:
            for step in range(6):
                tokens = [{a.ids[step] for a in found[group::groups]} for group in range(groups)]
                assert all(one.isdisjoint(other) for one, other in itertools.combinations(tokens, 2))


@pytest.mark.parametrize("early", [True, False])
def test_groups_without_diversity_are_beam_searches(pair: tuple[Any, Model], early: bool) -> None:
    """Also where groups end at different times, as they do with diversity."""
    driver = Driver(pair[1])
    settings: dict[str, Any] = {"max_tokens": N, "stop_ids": STOPS, "early_stopping": early}
    six = BeamParams(beams=6, n=6, **settings)
    two = BeamParams(beams=2, n=2, **settings)
    alone = driver.run(beam_search(driver.sequences, PROMPT, two))
    grouped = driver.run(diverse_beam_search(driver.sequences, PROMPT, six, 3, 0.0))
    assert [a.ids for a in grouped] == [a.ids for a in alone for _ in range(3)]
    apart = driver.run(diverse_beam_search(driver.sequences, PROMPT, six, 3, 3.0))
    assert [a.ids for a in apart[::3]] == [a.ids for a in alone]
    assert len({len(a.ids) for a in apart}) > 1


def test_what_is_ruled_out_never_comes(pair: tuple[Any, Model]) -> None:
    driver = Driver(pair[1])

    def only(*tokens: int) -> Process:
        def process(logits: Tensor, _: list[list[int]]) -> Tensor:
            kept = torch.full_like(logits, -torch.inf)
            kept[:, tokens] = logits[:, tokens]
            return kept

        return process

    params = BeamParams(max_tokens=3, n=4)
    generator = torch.Generator()
    for program in (
        beam_search(driver.sequences, PROMPT, params, only(4)),
        beam_sample(driver.sequences, PROMPT, params, generator, only(4)),
        diverse_beam_search(driver.sequences, PROMPT, params, 1, 0.0, only(4)),
        constrained_beam_search(driver.sequences, PROMPT, params, [[4]], only(4)),
    ):
        assert [answer.ids for answer in driver.run(program)] == [[4, 4, 4]]
    for program in (
        beam_search(driver.sequences, PROMPT, params, only()),
        beam_sample(driver.sequences, PROMPT, params, generator, only()),
        diverse_beam_search(driver.sequences, PROMPT, params, 2, 0.0, only()),
        constrained_beam_search(driver.sequences, PROMPT, params, [[4]], only(5)),
    ):
        with pytest.raises(UserError, match="every token was ruled out"):
            driver.run(program)
        assert not driver.sequences.tokens


def test_a_cancelled_search_leaves_nothing(pair: tuple[Any, Model]) -> None:
    driver = Driver(pair[1])
    program = beam_search(driver.sequences, PROMPT, BeamParams())
    feeds = next(program)
    for _ in range(4):
        feeds = program.send(driver.answer(feeds))
    assert len(driver.sequences.tokens) == 4
    program.close()
    assert not driver.sequences.tokens


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beams": 0}, "beams is 0"),
        ({"n": 5}, "n is 5"),
        ({"n": 0}, "n is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"early_stopping": "soon"}, "early_stopping is soon"),
    ],
)
def test_a_number_out_of_range_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BeamParams(**wrong)


@pytest.mark.parametrize(
    ("phrases", "message"),
    [
        ([[1, 2], [3, 4]], "have 4 tokens, the answer at most 3"),
        ([[1], []], "is empty"),
        ([[1, 0]], "holds a stop token"),
    ],
)
def test_phrases_that_cannot_occur_are_refused(phrases: list[list[int]], message: str) -> None:
    driver = Driver(table_model(0, 5))
    params = BeamParams(max_tokens=3, stop_ids=(0,))
    with pytest.raises(UserError, match=message):
        driver.run(constrained_beam_search(driver.sequences, [1], params, phrases))


@pytest.mark.parametrize(("groups", "diversity"), [(3, 0.5), (0, 0.5), (2, -1.0), (2, float("inf"))])
def test_groups_that_do_not_fit_are_refused(groups: int, diversity: float) -> None:
    driver = Driver(table_model(0, 5))
    with pytest.raises(UserError, match=r"groups|diversity"):
        driver.run(diverse_beam_search(driver.sequences, [1], BeamParams(), groups, diversity))
