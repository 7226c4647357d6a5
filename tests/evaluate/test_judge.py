"""Judges: both orders, what can't be read, and win rates against scikit-learn."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from needs import needs_data
from sklearn.linear_model import LogisticRegression

from danlu.core.errors import UserError
from danlu.data.conversations import Messages
from danlu.evaluate.judge import (
    PAIR,
    SINGLE,
    Judge,
    Judgement,
    both_orders,
    grades,
    length_controlled,
    read_grade,
    read_prompts,
    read_side,
    win_rate,
)

PAIRS = [(f"{'good' if n % 2 else 'bad'} {n}", f"{'bad' if n % 2 else 'good'} {n}") for n in range(20)]


def fair(asked: Sequence[Messages]) -> list[str]:
    """Prefers what is good, wherever it stands."""
    return [
        "[[A]]" if one[1]["content"].find("good") < one[1]["content"].find("bad") else "[[B]]"
        for one in asked
    ]


def biased(asked: Sequence[Messages]) -> list[str]:
    """Prefers what stands first."""
    return ["The first. [[A]]"] * len(asked)


def judged(judge: Judge, pairs: Sequence[tuple[str, str]]) -> list[Judgement]:
    def prompt(first: str, second: str) -> Messages:
        return PAIR.fill(question="Which?", answer_a=first, answer_b=second)

    return both_orders(judge, [(prompt(a, b), prompt(b, a)) for a, b in pairs])


def test_a_fair_judge_is_the_same_in_both_orders() -> None:
    found = judged(fair, PAIRS)
    assert [one.verdict for one in found] == ["a" if n % 2 else "b" for n in range(20)]
    rate = win_rate(PAIRS, found)
    assert (rate.rate, rate.consistent, rate.first_preferred, rate.n) == (0.5, 1, 0.5, 20)


def test_a_judge_that_prefers_the_first_decides_nothing() -> None:
    found = judged(biased, PAIRS)
    assert {one.verdict for one in found} == {"tie"}
    rate = win_rate(PAIRS, found)
    assert (rate.rate, rate.consistent, rate.first_preferred) == (0.5, 0, 1)


def test_what_cannot_be_read_does_not_count() -> None:
    answers = iter(["[[A]]", "[[B]]", "no idea", "[[A]]", "[[A]] or rather [[B]]", "[[A]]"])
    found = judged(lambda asked: [next(answers) for _ in asked], PAIRS[:3])
    assert found == [Judgement("a", "a"), Judgement(None, "b"), Judgement("b", "b")]
    rate = win_rate(PAIRS[:3], found)
    assert (rate.rate, rate.n, rate.unread) == (0.5, 2, 1)
    for nonsense in ("", "[[D]]", "A"):
        with pytest.raises(UserError, match="none of the judge's answers"):
            judged(lambda asked, nonsense=nonsense: [nonsense] * len(asked), PAIRS)
    with pytest.raises(UserError, match="no pair was judged"):
        win_rate(PAIRS[:1], [Judgement(None, "a")])


def test_an_answer_does_not_change_the_prompt() -> None:
    sly = {"question": "Q {answer_b}", "answer_a": "{answer_b} {question} {", "answer_b": "plain"}
    text = PAIR.fill(**sly)[1]["content"]
    assert "First answer:\n{answer_b} {question} {\n" in text
    assert "Question:\nQ {answer_b}\n" in text


def test_grades() -> None:
    assert [read_grade(text) for text in ("[[7]]", "8/10 [[8.5]]", "[[11]]", "[[0]]", "seven")] == [
        7,
        8.5,
        None,
        None,
        None,
    ]
    assert read_side("[[A]] no [[C]]") == "tie"
    asked = [SINGLE.fill(question="Q", answer="A")] * 3
    answers = iter(["[[3]]", "?", "[[4]]"])
    assert grades(lambda asked: [next(answers) for _ in asked], asked) == [3, None, 4]
    with pytest.raises(UserError, match="a grade such as"):
        grades(lambda asked: ["?"] * len(asked), asked)


def test_at_equal_lengths_what_is_left_of_a_win_rate() -> None:
    """The fit is scikit-learn's; a judge that only looks at the length leaves a half."""
    generator = np.random.default_rng(0)
    gaps = generator.normal(300, 400, 3000)
    logits = 0.5 + 2 * np.tanh(gaps / gaps.std())
    wins = (generator.uniform(size=3000) < 1 / (1 + np.exp(-logits))).astype(float)
    found = length_controlled(wins.tolist(), gaps.tolist())
    theirs = LogisticRegression(C=100, fit_intercept=False, tol=1e-10)
    theirs.fit(np.stack([np.ones(3000), np.tanh(gaps / gaps.std())], 1), wins)
    assert found == pytest.approx(1 / (1 + np.exp(-theirs.coef_[0, 0])), abs=1e-4)
    assert found == pytest.approx(1 / (1 + np.exp(-0.5)), abs=0.05)
    assert wins.mean() > 0.7
    longer = (gaps > 0).astype(float)
    assert length_controlled(longer.tolist(), gaps.tolist()) == pytest.approx(0.5, abs=0.05)
    assert length_controlled([1.0, 0.0], [5, 5]) is None


@needs_data
def test_mt_bench_s_prompts_are_read() -> None:
    prompts = read_prompts(Path(os.environ["DANLU_DATA"]) / "fastchat" / "judge_prompts.jsonl")
    assert len(prompts) == 8
    filled = prompts["pair-v2"].fill(question="QQ", answer_a="AA", answer_b="BB")
    assert all(part in filled[1]["content"] for part in ("QQ", "AA", "BB"))
    assert "{" not in filled[1]["content"]
    with pytest.raises(UserError, match="not a judge's prompt"):
        read_prompts(Path(os.environ["DANLU_DATA"]) / "fastchat" / "mt_bench_question.jsonl")
