"""Chain of thought's experiment: problems, prompts, and that each verdict can come out either way."""

import random
from pathlib import Path

import numpy as np
import pytest
from needs import needs_data

from danlu.papers.chain_of_thought import (
    CHAIN,
    DIRECT,
    DOTS,
    FORMATS,
    Setup,
    bbh_scores,
    conversation,
    gsm8k_prompt,
    large_gains,
    miniature_claims,
    problem,
    slope_interval,
    small_gains_nothing,
    solved,
)

SETUP = Setup(n_steps=(2, 4, 6))


def test_problems_are_worked_from_left_to_right_modulo_ten() -> None:
    for seed in range(50):
        question, steps, answer = problem(random.Random(seed), 5)
        first, *asked = question.split(" ")
        begun, *worked = steps.split(" ")
        assert first == begun
        value = int(first)
        for letter, one, step in zip("abcde", asked, worked, strict=True):
            assert one.startswith(letter)
            operation, result = step.split("=")
            assert operation == one
            assert eval(f"{value}{one[1:]}") % 10 == int(result)  # digits and signs of our own
            value = int(result)
        assert answer == str(value)


def test_dots_are_as_many_as_the_steps_have_characters() -> None:
    parts = problem(random.Random(0), 6)
    answers = {form: solved(parts, form)[1] for form in FORMATS}
    assert {solved(parts, form)[0] for form in FORMATS} == {parts[0]}
    assert len(answers[CHAIN]) == len(answers[DOTS]) > len(answers[DIRECT])
    assert {one.rpartition(">")[2] for one in answers.values()} == {parts[2]}
    assert set(answers[DOTS].partition(" >")[0]) == {"."}


def test_a_conversation_has_one_format() -> None:
    found = dict.fromkeys(FORMATS, 0)
    for seed in range(90):
        messages = conversation(random.Random(seed), (2, 3))
        assert [one["role"] for one in messages] == ["user", "assistant"] * 5
        said = [one["content"] for one in messages[1::2]]
        kinds = {DOTS if "." in line else CHAIN if "=" in line else DIRECT for line in said}
        assert len(kinds) == 1
        found[kinds.pop()] += 1
    assert min(found.values()) > 15


def test_prompts_of_gsm8k() -> None:
    shown = [("How many?", "2 and 3 make 5.", "5")]
    assert gsm8k_prompt(shown, "And now?", DIRECT) == "Q: How many?\nA: The answer is 5.\n\nQ: And now?\nA:"
    assert "A: 2 and 3 make 5. The answer is 5.\n\n" in gsm8k_prompt(shown, "And now?", CHAIN)


@needs_data
def test_the_published_outputs_gain_what_was_published() -> None:
    claim = large_gains(bbh_scores(), resamples=500)
    assert claim.value == pytest.approx(0.7371 - 0.5276, abs=1e-4)
    assert claim.verdict == "holds"


def test_each_verdict_can_come_out_either_way() -> None:
    chance = np.random.default_rng(0)
    tasks = [(chance.random(40) < 0.5).astype(float) for _ in range(9)]
    better = [np.maximum(task, chance.random(40) < 0.6).astype(float) for task in tasks]
    assert large_gains({DIRECT: tasks, CHAIN: better}).verdict == "holds"
    assert large_gains({DIRECT: better, CHAIN: tasks}).verdict == "does not hold"
    assert small_gains_nothing(np.zeros(100)).verdict == "holds"
    assert small_gains_nothing((chance.random(100) < 0.3).astype(float)).verdict == "does not hold"
    direct = np.stack([(chance.random(80) < p).astype(float) for p in (0.9, 0.5, 0.1)])
    chain = np.stack([(chance.random(80) < p).astype(float) for p in (0.95, 0.9, 0.9)])
    verdicts = [one.verdict for one in miniature_claims({DIRECT: direct, CHAIN: chain}, SETUP)]
    assert verdicts == ["holds", "holds"]
    verdicts = [one.verdict for one in miniature_claims({DIRECT: chain, CHAIN: direct}, SETUP)]
    assert verdicts == ["does not hold", "does not hold"]
    verdicts = [one.verdict for one in miniature_claims({DIRECT: direct, CHAIN: 0 * chain}, SETUP)]
    assert verdicts == ["not testable", "not testable"], "a model that has not learnt tells nothing"


def test_the_slope_s_interval_holds_the_slope() -> None:
    chance = np.random.default_rng(1)
    gain = np.stack([chance.normal(0.1 * n, 0.3, 200) for n in SETUP.n_steps])
    low, high = slope_interval(gain, SETUP.n_steps)
    fitted = np.polyfit(SETUP.n_steps, gain.mean(1), 1)[0]
    assert low < fitted < high
    assert low < 0.1 < high


@needs_data
@pytest.mark.slow
def test_it_runs_to_its_end(tmp_path: Path) -> None:
    """With few questions and hardly any training."""
    from danlu.papers.chain_of_thought import run
    from danlu.papers.config import ReproduceConfig

    setup = Setup(shots=2, questions=4, longest=20, documents=300, steps=4, each=4, n_steps=(2, 3))
    result = run(ReproduceConfig(name="chain-of-thought"), tmp_path, setup)
    assert (tmp_path / "plot.png").exists()
    assert [claim.claim.partition(":")[0] for claim in result.claims] == [
        "a large model gains",
        "a small model gains nothing",
        "the prompt's steps help",
        "more steps, more gain",
    ]
    assert len(result.controls) == 1
