"""AnnoLLM's experiment: examples, the control, and what is measured."""

from pathlib import Path

import pytest

from danlu.evaluate.annollm import Annotation, Example
from danlu.papers.annollm import GUIDELINE, LONGEST, Setup, examples_and_questions, exchanged, measures
from danlu.papers.config import ReproduceConfig


def test_examples_are_two_of_each_label_and_never_asked() -> None:
    examples, asked = examples_and_questions(Setup(asked=50), 0)
    assert [one.label for one in examples] == ["no", "yes", "no", "yes"]
    assert all(len(one.text) <= LONGEST for one in examples)
    assert len(asked) == 50
    assert not {one.text for one in examples} & {one.text for one in asked}
    assert examples_and_questions(Setup(asked=50), 1)[1] != asked


def test_explanations_are_exchanged_between_labels() -> None:
    examples = [Example(f"t{n}", GUIDELINE.labels[n % 2], f"because {n}") for n in range(4)]
    found = exchanged(examples)
    assert [one.explanation for one in found] == ["because 1", "because 0", "because 3", "because 2"]
    assert [(one.text, one.label) for one in found] == [(one.text, one.label) for one in examples]


def test_kappa_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import cohen_kappa_score

    said, truth = ["yes", "no", "yes", "yes", "no"], ["yes", "no", "no", "yes", "yes"]
    found = measures([Annotation(label, 0.5, "", 10, 2) for label in said], truth)
    assert found["kappa"] == pytest.approx(cohen_kappa_score(said, truth))
    assert (found["accuracy"], found["tokens read"], found["tokens written"]) == (0.6, 50, 10)
    assert found["said yes"] == 0.6


@pytest.mark.slow
def test_it_runs_to_its_end(tmp_path: Path) -> None:
    """On the real model, with few questions."""
    from danlu.papers.annollm import run

    result = run(ReproduceConfig(name="annollm"), tmp_path, Setup(asked=4))
    assert (tmp_path / "plot.png").exists()
    assert [one.verdict for one in result.claims][1] == "not testable"
    assert len(result.figures["explanations"]) == 4
