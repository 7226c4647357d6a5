"""Self-consistency's experiment: sums, votes, and that each verdict can come out either way."""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from danlu.data.conversations import Messages
from danlu.generate.engine import Completion
from danlu.generate.sampling import SamplingParams
from danlu.papers.self_consistency import (
    GREEDY,
    RANKED,
    SHUFFLED,
    Problem,
    Setup,
    claims,
    control,
    conversation,
    problem,
    shares,
    stated,
)

SMALL = Setup(asked=200, samples=6, votes=(1, 5))


def test_workings_are_right_and_use_each_number_once() -> None:
    for seed in range(50):
        one = problem(random.Random(seed))
        steps, answer = one.worked.split(" >")
        left = sorted(int(part) for part in one.question.split("+"))
        for step in steps.split(" "):
            first, second, total = (int(part) for part in re.fullmatch(r"(\d+)\+(\d+)=(\d+)", step).groups())  # type: ignore[union-attr]
            assert first + second == total
            left.remove(first)
            left.remove(second)
            left.append(total)
        assert left == [int(answer)] == [int(one.answer)]


def test_the_same_sum_is_worked_in_many_ways() -> None:
    found = {problem(random.Random(0)).worked for _ in range(3)}
    assert len(found) == 1, "the seed decides"
    orders = set()
    for seed in range(200):
        steps = problem(random.Random(seed)).worked.split(" ")
        orders.add(len(steps))
    assert orders == {4, 5, 6}, "3 to 5 steps and the answer"
    messages = conversation(random.Random(0))
    assert [one["role"] for one in messages] == ["user", "assistant"] * 5


def test_answers_are_read() -> None:
    assert stated(" 1+2=3 >3") == "3"
    assert stated(" 1+2=3 3") is None
    assert stated(" 1+2=3 >") is None


class Solver:
    """Answers right in a share of the draws; otherwise each time something else; always sure of the wrong."""

    def __init__(self, share: float) -> None:
        self.share, self.chance = share, random.Random(0)

    def generate(
        self,
        prompts: Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams],
        progress: str = "",
    ) -> list[Completion]:
        found = []
        for prompt in prompts:
            total = sum(int(part) for part in prompt[-1]["content"].split("+"))
            right = self.chance.random() < self.share
            said = total if right else total + self.chance.randrange(1, 1000)
            found.append(Completion(text=f" >{said}", logprobs=[-1.0 if right else -0.5]))
        return found


def test_votes_find_what_most_samples_say() -> None:
    solver: Any = Solver(0.6)
    found = shares(solver, SMALL, 0)
    assert found["majority of 5"] > found[GREEDY] + 0.2
    assert found[RANKED] < 0.3, "the surest samples are the wrong ones"
    assert found[SHUFFLED] < 0.05


def arm(greedy: float, most: float, ranked: float) -> dict[str, float]:
    return {GREEDY: greedy, "majority of 5": most, RANKED: ranked, SHUFFLED: 0.0}


def test_verdicts_can_come_out_either_way() -> None:
    better = [arm(0.5, 0.7, 0.6), arm(0.52, 0.71, 0.61), arm(0.48, 0.69, 0.6)]
    assert [one.verdict for one in claims(better, SMALL, True)] == ["holds", "holds"]
    assert [one.verdict for one in claims(better, SMALL, False)] == ["not testable", "not testable"]
    mixed = [arm(0.5, 0.7, 0.8), arm(0.6, 0.5, 0.8), arm(0.5, 0.55, 0.8)]
    assert [one.verdict for one in claims(mixed, SMALL, True)] == ["does not hold", "does not hold"]
    assert control(better).null
    assert not control([{**one, SHUFFLED: 0.3} for one in better]).null


@pytest.mark.slow
def test_it_runs_to_its_end(tmp_path: Path) -> None:
    """Two seeds that hardly learn: outside of the range, so nothing is claimed."""
    from danlu.papers.config import ReproduceConfig
    from danlu.papers.self_consistency import run

    setup = Setup(seeds=2, steps=3, documents=200, stages=2, tried=4, asked=4, samples=5, votes=(1, 5))
    result = run(ReproduceConfig(name="self-consistency"), tmp_path, setup)
    assert {one.verdict for one in result.claims} == {"not testable"}
    assert (tmp_path / "plot.png").exists()
    assert result.figures["seed 0"]["stages"] == 2


def test_problems_of_another_seed_are_others() -> None:
    first, second = (
        {problem(random.Random(f"asked {seed} {n}")).question for n in range(50)} for seed in (0, 1)
    )
    assert len(first & second) < 3
    assert isinstance(problem(random.Random(0)), Problem)
