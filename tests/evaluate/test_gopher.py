"""Gopher's suite: the catalogue, the questions, and the analysis of what size brings."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from needs import needs_data

from danlu.core.errors import UserError
from danlu.evaluate import gopher
from danlu.evaluate.config import GopherConfig
from danlu.evaluate.gopher import MODELLING, Score, catalogue, progress_of, questions, slopes


def test_152_tasks_in_the_paper_s_groups() -> None:
    """Table 1 of Rae et al. 2021."""
    assert Counter(task.group for task in catalogue()) == {
        "language modelling": 20,
        "reading comprehension": 3,
        "fact checking": 3,
        "question answering": 3,
        "common sense": 4,
        "MMLU": 57,
        "BIG-bench": 62,
    }
    assert len({task.task for task in catalogue()}) == 152
    assert all(task.category and task.metric and task.source for task in catalogue())


@needs_data
@pytest.mark.parametrize("task", [task for task in catalogue() if task.runs_on], ids=lambda task: task.task)
def test_every_task_that_runs_has_questions(task: gopher.Task) -> None:
    if task.category == MODELLING:
        assert len(gopher.text_of(task.runs_on)) > 4000
        return
    asked = questions(task, 20, 0)
    assert asked == questions(task, 20, 0)
    assert len(asked) == 20
    assert all(one.context.endswith("Answer:") for one in asked)
    if task.metric == "accuracy":
        assert all(len(one.choices) > 1 and 0 <= one.answer < len(one.choices) for one in asked)
        assert len({one.answer for one in asked}) > 1 or task.task == "truthfulqa"


def made(parameters: dict[str, int], rises: dict[str, float]) -> dict[str, dict[str, Score]]:
    """Scores that rise by so much a decade in each category."""
    found: dict[str, dict[str, Score]] = {}
    for name, size in parameters.items():
        found[name] = {}
        for task in catalogue():
            rise = rises.get(task.category, 0.0) * np.log10(size / 1e6)
            if task.category == MODELLING:
                found[name][task.task] = Score(2.0 * (1 - rise), 1000, None, 0)
            elif task.metric == "accuracy":
                found[name][task.task] = Score(0.25 + 0.75 * rise, 20, 0.25, 0)
            else:
                found[name][task.task] = Score(rise, 20, None, 0)
    return found


def test_slopes_are_what_was_put_in() -> None:
    parameters = {"a": 10**6, "b": 10**7, "c": 10**8, "d": 10**9}
    rises = {"logic": 0.01, "medicine": 0.2, MODELLING: 0.1, "question answering": 0.05}
    found = {one.category: one for one in slopes(made(parameters, rises), parameters)}
    for category, one in found.items():
        assert one.value == pytest.approx(rises.get(category, 0.0), abs=1e-9)
    assert [one.category for one in slopes(made(parameters, rises), parameters)][:2] == [
        "medicine",
        MODELLING,
    ]
    assert found["logic"].tasks == 15
    low, high = found["logic"].interval or (1, 0)
    assert low == pytest.approx(high)


def test_tasks_that_a_model_lacks_are_left_out() -> None:
    parameters = {"a": 10**6, "b": 10**7}
    scores = made(parameters, {})
    del scores["b"]["mathematical_induction"]
    before = {one.category: one.tasks for one in slopes(made(parameters, {}), parameters)}
    after = {one.category: one.tasks for one in slopes(scores, parameters)}
    assert after["mathematics"] == before["mathematics"] - 1


def test_one_size_has_no_slope() -> None:
    with pytest.raises(UserError, match="one size"):
        slopes(made({"a": 1000, "b": 1000}, {}), {"a": 1000, "b": 1000})


def test_progress_is_from_chance_to_perfect() -> None:
    tasks = {task.task: task for task in catalogue()}
    found = progress_of(
        tasks["piqa"], [Score(0.5, 10, 0.5, 0), Score(0.75, 10, 0.5, 0), Score(1, 10, 0.5, 0)]
    )
    assert found == [0, 0.5, 1]
    assert progress_of(tasks["arxiv"], [Score(2.0, 10, None, 0), Score(1.5, 10, None, 0)]) == [0, 0.25]


@needs_data
@pytest.mark.slow
def test_the_verb_on_two_sizes(folder: Path, tmp_path: Path) -> None:
    """A trained model and the same with a layer less; most questions are longer than its context."""
    from danlu.model.checkpoint import load, save_model
    from danlu.model.transformer import Transformer

    model, tokenizer = load(folder)
    smaller = Transformer(model.config.model_copy(update={"n_layers": 1}))
    save_model(smaller, tmp_path / "small", tokenizer)
    result = gopher.run(
        GopherConfig(models=(str(tmp_path / "small"), str(folder)), each=5, plot=tmp_path / "plot.png")
    )
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    found = {slope["category"]: slope for slope in result["slopes"]}
    assert found[MODELLING]["tasks"] == 13
    small, large = (result["scores"][name] for name in (str(tmp_path / "small"), str(folder)))
    texts = [task.task for task in catalogue() if task.category == MODELLING and task.runs_on]
    saved = np.mean([1 - large[task]["value"] / small[task]["value"] for task in texts])
    sizes = [result["parameters"][name] for name in (str(tmp_path / "small"), str(folder))]
    assert found[MODELLING]["value"] == pytest.approx(saved / np.log10(sizes[1] / sizes[0]))
    gopher.show(result)
