"""Few-shot's experiment: what is asked, and that a score is what it says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from danlu.generate.engine import Completion
from danlu.papers.few_shot import SHUFFLED, UNRELATED, Setup, prompt, scores, tasks

SMALL = Setup(draws=2, examples=5, asked=4, shots=(0, 1, 5))


class Oracle:
    """Answers a prompt by what stands in its examples: a reader that only ever copies."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def generate(self, prompts: list[str], params: Any, progress: str = "") -> list[Completion]:
        self.prompts += prompts
        known = {task.says: dict(task.pairs) for task in tasks(0)}
        return [self._answer(text, known[text.partition("\n")[0]]) for text in prompts]

    def _answer(self, text: str, known: dict[str, str]) -> Completion:
        """Right where the examples show the task, and none of them is wrong."""
        *shown, asked = text.split("\n")[1:]
        right = all(known.get(one) == answer for one, answer in (line.split(" -> ") for line in shown))
        question = asked.removesuffix(" ->")
        answer = known.get(question, "") if shown and right else ""
        return Completion(text=f" {answer}")


def test_eight_tasks_of_sixty_pairs() -> None:
    found = tasks(0)
    assert len(found) == 8
    assert [len(task.pairs) for task in found] == [60] * 8
    assert tasks(1)[5].pairs != found[5].pairs, "drawn by the seed"


def test_a_prompt() -> None:
    assert prompt("The plural.", [("cat", "cats"), ("ox", "oxen")], "dog") == (
        "The plural.\ncat -> cats\nox -> oxen\ndog ->"
    )


def test_arms_are_what_they_are_called() -> None:
    oracle = Oracle()
    found = scores(oracle, SMALL, 0)  # type: ignore[arg-type]
    assert {arm: values.shape for arm, values in found.items()} == dict.fromkeys(
        ["0 shots", "1 shots", "5 shots", SHUFFLED, UNRELATED], (8, 8)
    )
    assert found["0 shots"].max() == 0
    assert found["1 shots"].min() == found["5 shots"].min() == 1
    assert found[SHUFFLED].max() == 0, "each answer is another's"
    lines = [text.split("\n") for text in oracle.prompts]
    assert {len(one) for one in lines} == {2, 3, 7}
    for _, *shown, asked in lines:
        assert asked.removesuffix(" ->") not in {line.split(" -> ")[0] for line in shown}


def test_unrelated_examples_are_of_another_task() -> None:
    oracle = Oracle()
    scores(oracle, SMALL, 0)  # type: ignore[arg-type]
    unrelated = oracle.prompts[-8 * 8 :]
    capitals = dict(tasks(0)[0].pairs)
    assert unrelated[0].startswith("The capital of each country.")
    assert not any(line.split(" -> ")[0] in capitals for line in unrelated[0].split("\n")[1:-1])


@pytest.mark.slow
def test_it_runs_to_its_end(tmp_path: Path) -> None:
    """On the real model, with few questions."""
    from danlu.papers.config import ReproduceConfig
    from danlu.papers.few_shot import run

    result = run(ReproduceConfig(name="few-shot"), tmp_path, Setup(draws=1, examples=10, asked=3))
    assert (tmp_path / "plot.png").exists()
    assert len(result.claims) == 2
    assert all(claim.interval is not None for claim in result.claims)
    assert np.isfinite(result.claims[0].value or np.nan)
    assert len(result.controls) == 1
