"""Experiments of alignment: fits, claims that can come out either way, and all of each in small."""

import math
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from danlu.data.conversations import Messages
from danlu.papers import calibration, hh, overoptimization, preference_pretraining, reward_models
from danlu.papers.calibration import Answers
from danlu.papers.config import ReproduceConfig
from danlu.papers.hh import Learnt
from danlu.papers.overoptimization import BEST, LEARNT, Curve
from danlu.papers.small_talk import auroc, by_coin, gold_of, real_pairs, tokens_of_chitchat


def test_the_rule() -> None:
    assert gold_of(["Fine. And you?", "Fine. And you? I am.", "Yes."]) == pytest.approx(
        [1.5 - 0.07, 0.5 - 0.1, -0.02]
    )


def test_auroc_is_that_of_scikit_learn() -> None:
    chance = np.random.default_rng(0)
    strange, own = chance.integers(2, 9, 40).tolist(), chance.integers(0, 7, 60).tolist()
    wanted = roc_auc_score([1] * 40 + [0] * 60, strange + own)
    assert auroc(strange, own) == pytest.approx(wanted)


def test_real_pairs_answer_their_prompt() -> None:
    found = [pair for pair, _ in zip(real_pairs(0), range(500), strict=False)]
    assert len({pair.messages[0]["content"] for pair in found if pair.messages}) > 400
    assert all(pair.replies and pair.replies[0] != pair.replies[1] for pair in found)
    turned = by_coin(found, 0)
    swapped = sum(a.replies != b.replies for a, b in zip(found, turned, strict=True))
    assert 200 < swapped < 300


def test_damage_has_five_ways() -> None:
    chance, ways = random.Random(0), Counter[str]()
    for _ in range(2000):
        found = calibration.damaged(list("abcdefgh"), ["x"], chance)
        moved = [k for k, letter in enumerate(found) if k > 7 or letter != "abcdefgh"[k]]
        if "x" in found:
            assert len(moved) == 1
            ways["one"] += 1
        elif len(found) > 8:
            assert list(dict.fromkeys(found)) == list("abcdefgh")
            ways["again"] += 1
        elif moved:
            assert sorted(found) == list("abcdefgh")
            reach = moved[-1] - moved[0]
            ways["two" if reach == 1 else "three" if reach == 2 else "all"] += 1
    assert set(ways) == {"two", "three", "all", "one", "again"}
    assert min(ways.values()) > 100


# HH


def learnt(score: Sequence[float], kl: Sequence[float], gold: tuple[float, float] = (0.0, 1.0)) -> Learnt:
    return Learnt(list(score), list(kl), gold, (0.5, 1.0), Path())


@pytest.mark.parametrize(("power", "verdict"), [(0.5, "holds"), (1.0, "does not hold")])
def test_which_curve_grows_as_the_root(power: float, verdict: str) -> None:
    chance = random.Random(0)
    kl = [4 * (n / 50) ** 2 for n in range(60)]
    runs = [[2 * one**power + chance.gauss(0, 0.02) for one in kl] for _ in range(5)]
    fits = [hh.fit(kl, score) for score in runs]
    assert hh.root_claim(fits).verdict == verdict
    if power == 0.5:
        assert fits[0]["slope root"] == pytest.approx(2, rel=0.05)


def test_hh_s_claims_can_come_out_either_way() -> None:
    kl = [0.01 * n for n in range(40)]
    under, over = ([factor * math.sqrt(2 * one) for one in kl] for factor in (0.9, 1.6))
    assert hh.bound_claim([learnt(under, kl)], 10_000).verdict == "holds"
    assert hh.bound_claim([learnt(over, kl)], 10_000).verdict == "does not hold"
    assert hh.bound_claim([learnt([0, 3], [0, 9])], 10_000).verdict == "not testable"
    gained = [learnt([0], [1], (0.0, gold)) for gold in (0.9, 1.0, 1.1)]
    assert hh.wanted_claim(gained).verdict == "holds"
    assert hh.wanted_claim([*gained, learnt([0], [11], (0.0, 1.0))]).verdict == "does not hold"
    assert hh.rounds_claim([0.1, 0.12, 0.11]).verdict == "holds"
    assert hh.rounds_claim([-0.1, 0.12, 0.11]).verdict == "does not hold"
    assert hh.strange_claim([0.9, 0.92, 0.91]).verdict == "holds"
    assert hh.strange_claim([0.6, 0.62]).verdict == "does not hold"
    assert hh.coin_control([0.1, -0.2, 0.05]).null
    assert not hh.coin_control([0.5, 0.6, 0.55]).null
    assert hh.own_control([0.48, 0.53]).null
    assert not hh.own_control([0.6, 0.62]).null


# Overoptimisation


def curve(form: str, alpha: float, beta: float, noise: float, seed: int = 0) -> Curve:
    chance = np.random.default_rng(seed)
    kl = np.linspace(0.1, 30, 80)
    d = np.sqrt(kl)
    gold = overoptimization.FORMS[form](d) @ [alpha, beta] + noise * chance.standard_normal(80)
    return Curve(kl.tolist(), (alpha * d).tolist(), gold.tolist())


@pytest.mark.parametrize(("form", "other"), [(BEST, LEARNT), (LEARNT, BEST)])
def test_the_form_that_made_a_curve_fits_it(form: str, other: str) -> None:
    made = curve(form, 1.0, 0.3, 0.02)
    errors = overoptimization.form_errors(made)
    assert errors[form] < errors[other]
    assert overoptimization.coefficients(made, form) == pytest.approx([1.0, 0.3], abs=0.05)


@pytest.mark.parametrize("form", [BEST, LEARNT])
def test_what_made_a_curve_is_within_the_intervals(form: str) -> None:
    """Of many curves, and of one whose points are noisy; the mean of fits is the fit of means."""
    many = [curve(form, 1.0, 0.3, 0.05, seed) for seed in range(40)]
    by_prompt = overoptimization.fitted_by_prompt(many, form)
    whole = overoptimization.coefficients(overoptimization.mean_curve(many), form)
    assert [value for value, _ in by_prompt] == pytest.approx(whole)
    for fits in (by_prompt, overoptimization.fitted_by_blocks(many[0], form, 0)):
        for (value, (low, high)), true in zip(fits, (1.0, 0.3), strict=True):
            assert low < value < high
            assert low - 0.02 < true < high + 0.02


def test_overoptimization_s_claims_can_come_out_either_way() -> None:
    falls, rises = curve(BEST, 1.0, 0.3, 0.01), curve(BEST, 1.0, 0.05, 0.01)
    assert overoptimization.fall_claim({"a": falls, "b": falls, "c": rises}).verdict == "holds"
    assert overoptimization.fall_claim({"a": falls, "b": rises, "c": rises}).verdict == "does not hold"
    chance = np.random.default_rng(0)
    gold = chance.standard_normal((300, 64))
    noisy = gold + chance.standard_normal(gold.shape)
    claim = overoptimization.gap_claim({"gold": gold, "a": noisy, "b": noisy}, ["a", "b"])
    assert claim.verdict == "holds"
    claim = overoptimization.gap_claim({"gold": gold, "a": gold, "b": gold}, ["a", "b"])
    assert claim.verdict == "does not hold"
    right, wrong = {BEST: 0.1, LEARNT: 0.2}, {BEST: 0.2, LEARNT: 0.1}
    both = {"best-of-n": {"a": right}, "reinforcement learning": {"a": wrong}}
    assert overoptimization.form_claim(both).verdict == "holds"
    both["reinforcement learning"] = {"a": right}
    assert overoptimization.form_claim(both).verdict == "does not hold"
    assert overoptimization.random_control(gold, 0).null


# Preference-model pretraining, and kinds of models of rewards


def test_pretraining_s_claims_can_come_out_either_way() -> None:
    setup = preference_pretraining.Setup(counts=(32, 128))

    def seeds(*gains: float) -> list[Any]:
        return [
            {
                "plain": {32: 0.5, 128: 0.6},
                **{arm: {32: 0.5 + g, 128: 0.6 + g} for arm in ("pretrained", "coins")},
            }
            for g in gains
        ]

    assert preference_pretraining.helps_claim(seeds(0.1, 0.11, 0.09), setup).verdict == "holds"
    assert preference_pretraining.helps_claim(seeds(0.1, -0.1, 0.02), setup).verdict == "does not hold"
    assert preference_pretraining.coin_control(seeds(0.1, -0.1, 0.02), setup).null
    assert not preference_pretraining.coin_control(seeds(0.1, 0.11, 0.09), setup).null


def test_judged_pairs_and_told_errors() -> None:
    held = [reward_models.Asked([], ["a", "b", "c", "d"], [3.0, 2.0, 2.0, 1.0])]
    right = reward_models.judged_pairs([[9.0, 5.0, 5.0, 1.0]], held)
    assert right["accuracy"] == 1
    assert right["calibration error"] < 0.02
    assert reward_models.judged_pairs([[1.0, 5.0, 5.0, 9.0]], held)["accuracy"] == 0
    # Two members agree on all pairs but a and b, where their mean is wrong.
    members = [np.array([[2.0, 2.4, 1.0, 0.0]]), np.array([[2.0, 1.8, 1.0, 0.0]])]
    assert reward_models.errors_told(members, held) == 1


def test_reward_models_claims_can_come_out_either_way() -> None:
    def seed(low: float, high: float, told: float) -> dict[str, dict[str, float]]:
        lower = ("pairs, four passes", "imitation")
        found = {arm: {"accuracy": low if arm in lower else high} for arm in reward_models.ARMS}
        found["ensemble"] = {"accuracy": high + (high - low), "errors told": told}
        return found

    good, bad = (
        [seed(a, b, told + d) for d in (0.0, 0.01)] for a, b, told in ((0.6, 0.7, 0.6), (0.7, 0.6, 0.4))
    )
    assert {claim.verdict for claim in reward_models.claims(good)} == {"holds"}
    assert {claim.verdict for claim in reward_models.claims(bad)} == {"does not hold"}
    assert reward_models.coin_control([0.48, 0.53, 0.5]).null
    assert not reward_models.coin_control([0.6, 0.61, 0.6]).null


# Calibration


def test_calibration_s_claims_can_come_out_either_way() -> None:
    def said(confidence: float) -> Answers:
        """Right in six of ten."""
        rest = (1 - confidence) / 3
        return Answers([[confidence, rest, rest, rest]] * 100, [0, 0, 0, 1, 1] * 20)

    assert said(0.6).figures["calibration error"] == pytest.approx(0, abs=1e-9)
    assert said(0.95).figures["calibration error"] == pytest.approx(0.35)
    assert said(0.95).best_temperature > 2
    assert said(0.6).best_temperature == pytest.approx(1, abs=0.1)
    surer = [{"before": said(0.6), "after": said(0.9 + d), "more": said(0.6 - d)} for d in (0.0, 0.01)]
    assert calibration.rise_claim(surer, True).verdict == "holds"
    assert calibration.rise_claim(surer, False).verdict == "not testable"
    same = [{**one, "after": one["before"]} for one in surer]
    assert calibration.rise_claim(same, True).verdict == "does not hold"
    assert calibration.more_control(same).null
    assert not calibration.more_control([{**one, "more": one["after"]} for one in surer]).null


def test_questions_have_a_true_answer() -> None:
    turns = [
        [f"{role}{n}-{m}-{k}" for k in range(4 + m)] for role in "ab" for n in range(9) for m in range(18)
    ]
    talk: Messages = [{"role": "user", "content": " ".join(words)} for words in turns]
    first, heard = set(turns[0] + turns[1]), {tuple(words) for words in turns[2:] if 5 <= len(words) <= 20}
    drawn = calibration.questions(random.Random(0), [talk])
    answers = []
    for _, one in zip(range(2000), drawn, strict=False):
        shown = one.prompt[0]["content"].split()
        assert not first & set(shown), "the first turns are left out"
        assert (one.answer == "yes") == (tuple(shown) in heard)
        answers.append(one.answer)
    assert 900 < answers.count("yes") < 1100


# All of it, in small


@pytest.fixture(scope="module")
def chitchat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokens_of_chitchat(tmp_path_factory.mktemp("chitchat") / "chitchat")


SMALL: dict[str, tuple[Any, Any]] = {
    "hh": (
        hh.run,
        hh.Setup(steps=(12, 6), seeds=2, labels=80, rollouts=3, batch_size=16, prompts=600),
    ),
    "overoptimization": (
        overoptimization.run,
        overoptimization.Setup(
            steps=(12, 6),
            gold_steps=4,
            gold_labels=60,
            gold_real=60,
            labels=(20, 40),
            prompts=400,
            asked=6,
            replies=32,
            rollouts=24,
            batch_size=8,
            rate=1e-3,
        ),
    ),
    "preference-pretraining": (
        preference_pretraining.run,
        preference_pretraining.Setup(
            steps=(12, 6),
            less=(4, 2),
            seeds=2,
            pretraining=60,
            counts=(16, 32),
            held_out=20,
            harmless=(20, 10),
        ),
    ),
    "reward-models": (
        reward_models.run,
        reward_models.Setup(steps=(12, 6), seeds=2, rankings=20, held_out=10, members=2),
    ),
    "calibration": (
        calibration.run,
        calibration.Setup(steps=(12, 6), seeds=2, taught=4, rollouts=3, prompts=4, held_out=40, described=8),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_experiment(name: str, chitchat: Path, tmp_path: Path) -> None:
    """Every stage runs, everything is measured, and a second call takes what the first has left."""
    shutil.copytree(chitchat, tmp_path / "chitchat")
    experiment, setup = SMALL[name]
    result = experiment(ReproduceConfig(name=name), tmp_path, setup)
    assert result.claims
    assert result.controls
    assert result.figures
    assert (tmp_path / "plot.png").stat().st_size > 5000
    again = experiment(ReproduceConfig(name=name), tmp_path, setup)
    assert again.model_dump(exclude={"seconds"}) == result.model_dump(exclude={"seconds"})
