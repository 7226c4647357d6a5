"""Gopher's suite: its 152 tasks as a catalogue, and what more parameters bring, by category.

Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", table 1 (groups
and numbers of tasks) and section 5.1 (gains by category). `gopher_tasks.csv` lists the tasks: those of
BIG-bench as Hoffmann et al. 2022 report them for the same suite; the categories are ours, after each task's
subject. `runs_on` names the data with which a task runs here; without it a task is listed only.

Small models rarely follow a format, so choices are not asked for by letter: each choice's text is scored
behind the question, by its log-probability a byte. Chance is one over the number of choices.
"""

import csv
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import danlu
from danlu.core.errors import UserError
from danlu.core.files import atomic_write, read_text
from danlu.core.show import console, table
from danlu.data.documents import read_documents, read_rows
from danlu.evaluate.bits_per_byte import bits_per_byte
from danlu.evaluate.config import GopherConfig
from danlu.evaluate.intervals import Interval, bootstrap_interval
from danlu.evaluate.scores import plain
from danlu.evaluate.sets import located, read_set
from danlu.generate.engine import Engine
from danlu.generate.sampling import SamplingParams

CATALOGUE = Path(__file__).with_name("gopher_tasks.csv")
LEAST = 5
"""Questions that fit the model's context, without which a task isn't scored."""
LONGEST_ANSWER = 16
TEXT = 50_000
"""Bytes of a text that are scored."""
MODELLING = "language modelling"


@dataclass(frozen=True)
class Task:
    """A row of the catalogue."""

    task: str
    group: str
    category: str
    metric: str
    source: str
    runs_on: str


@dataclass(frozen=True)
class Score:
    """Of a model on a task. `chance` is None where there is nothing to guess."""

    value: float
    n: int
    chance: float | None
    left_out: int
    """Questions longer than the model's context."""


@cache
def catalogue() -> tuple[Task, ...]:
    """All 152, in the paper's groups."""
    return tuple(Task(**row) for row in csv.DictReader(read_text(CATALOGUE).splitlines()))


# The questions


@dataclass(frozen=True)
class Question:
    context: str
    choices: tuple[str, ...]
    """Texts to be scored, or answers that count."""
    answer: int = 0


def questions(task: Task, most: int, seed: int) -> list[Question]:
    """At most so many, drawn by the seed. Raises UserError where the data is missing."""
    found = list(_questions(task))
    return random.Random(f"{seed} {task.task}").sample(found, min(most, len(found)))


def _questions(task: Task) -> Iterator[Question]:
    source, _, part = task.runs_on.partition("!")
    if task.group == "MMLU":
        for row in _mmlu()[part]:
            yield Question(_asked(row["question"]), tuple(row["choices"]), row["answer"])
    elif task.group == "BIG-bench":
        yield from _big_bench(part)
    elif task.task == "natural_questions":
        for row in read_set(source, "texts"):
            yield Question(_asked(row["question"]), tuple(row["answers"]))
    else:
        for row in read_set(source, "truthful" if task.task == "truthfulqa" else "options"):
            asked = f"{row['passage']}\n{row['question']}" if row["passage"] else row["question"]
            yield Question(_asked(asked), tuple(row["choices"]), row["answer"])


def _asked(question: str) -> str:
    return f"Question: {question.strip()}\nAnswer:"


@cache
def _mmlu() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read_set(r"data:mmlu/data.tar.gz!/test/.*\.csv$", "mmlu"):
        found[row["subject"].replace(" ", "_")].append(row)
    return found


def _big_bench(name: str) -> Iterator[Question]:
    """From BIG-Bench Hard's file: options where the question lists them, else the task's few answers."""
    rows = list(read_set(rf"data:bbh/bbh.tar.gz!/{name}\.json$", "bbh"))
    answers = sorted({row["answers"][0] for row in rows})
    for row in rows:
        right = row["answers"][0]
        asked, mark, listed = row["question"].partition("\nOptions:\n")
        options = [line.split(" ", 1) for line in listed.splitlines() if line.startswith("(")]
        if mark and all(len(one) == 2 for one in options) and right in [letter for letter, _ in options]:
            letters = [letter for letter, _ in options]
            yield Question(_asked(asked), tuple(text for _, text in options), letters.index(right))
        else:
            yield Question(_asked(asked), tuple(answers), answers.index(right))


@cache
def text_of(runs_on: str) -> bytes:
    """The text of a task of language modelling; of the Pile's sample the documents of its part."""
    source, _, part = runs_on.partition("!")
    path = located(source)
    if not part:
        return "\n".join(document.text for document in read_documents(path)).encode()
    rows = (row for _, row in read_rows(path) if row["metadata"]["pile_set_name"] == part)
    return "\n\n".join(row["contents"] for row in rows).encode()


# The scores


def score(engine: Engine, task: Task, most: int, seed: int, most_bytes: int = TEXT) -> Score | None:
    """None where too few questions fit the model's context."""
    if task.category == MODELLING:
        raw = text_of(task.runs_on)[:most_bytes].decode("utf-8", "ignore").encode()
        return Score(bits_per_byte(engine.model, engine.tokenizer, raw), len(raw), None, 0)
    asked = questions(task, most, seed)
    if task.metric == "exact match":
        return _answered(engine, asked)
    return chosen(engine, asked)


def _answered(engine: Engine, asked: Sequence[Question]) -> Score | None:
    room = engine.model.config.max_positions - LONGEST_ANSWER
    kept = [one for one in asked if len(engine.prompt_ids(one.context)) <= room]
    if len(kept) < LEAST:
        return None
    params = SamplingParams(max_tokens=LONGEST_ANSWER, temperature=0.0, stop=("\n",))
    said = engine.generate([one.context for one in kept], params)
    right = [
        plain(answer.text) in {plain(text) for text in one.choices}
        for one, answer in zip(kept, said, strict=True)
    ]
    return Score(float(np.mean(right)), len(right), None, len(asked) - len(kept))


def chosen(engine: Engine, asked: Sequence[Question]) -> Score | None:
    """How often the right choice is the likeliest a byte; None where too few questions fit the context."""
    room = engine.model.config.max_positions
    pairs: list[tuple[list[int], list[int]]] = []
    kept: list[Question] = []
    for one in asked:
        context = engine.prompt_ids(one.context)
        wholes = [engine.prompt_ids(f"{one.context} {choice}") for choice in one.choices]
        if max(map(len, wholes)) <= room:
            kept.append(one)
            pairs += [(context, whole[len(context) :]) for whole in wholes]
    if len(kept) < LEAST:
        return None
    found = iter(engine.likelihoods(pairs))
    right = []
    for one in kept:
        a_byte = [next(found).logprob / len(choice.encode()) for choice in one.choices]
        right.append(a_byte.index(max(a_byte)) == one.answer)
    chance = float(np.mean([1 / len(one.choices) for one in kept]))
    return Score(float(np.mean(right)), len(kept), chance, len(asked) - len(kept))


# The analysis


def progress_of(task: Task, scores: Sequence[Score]) -> list[float]:
    """A task's scores of several models, the smallest first, on one scale.

    Of answers the part of the way from chance to perfect; of bits per byte the share that the first model
    needs and this one doesn't.
    """
    if task.category == MODELLING:
        return [1 - one.value / scores[0].value for one in scores]
    return [(one.value - (one.chance or 0)) / (1 - (one.chance or 0)) for one in scores]


def progress_by_category(
    by_model: Mapping[str, Mapping[str, Score]], models: Sequence[str]
) -> dict[str, list[Any]]:
    """By category the progress of each task that every model has a score on."""
    found: dict[str, list[Any]] = defaultdict(list)
    for task in catalogue():
        scores = [by_model[name][task.task] for name in models if task.task in by_model[name]]
        if len(scores) == len(models):
            found[task.category].append(progress_of(task, scores))
    return found


@dataclass(frozen=True)
class Slope:
    """What ten times the parameters bring to a category, in `progress_of`'s scale."""

    category: str
    value: float
    interval: Interval | None
    """95 %, tasks resampled; None for a single task."""
    tasks: int


def slopes(by_model: Mapping[str, Mapping[str, Score]], parameters: Mapping[str, int]) -> list[Slope]:
    """Least squares of each task's progress over log₁₀ of the parameters, in the mean of each category.

    Only tasks that every model has a score on. Raises UserError for fewer than two sizes.
    """
    found = task_slopes(by_model, parameters)
    return [
        Slope(
            category,
            float(np.mean(values)),
            bootstrap_interval(values) if len(values) > 1 else None,
            len(values),
        )
        for category, values in sorted(found.items(), key=lambda pair: -float(np.mean(pair[1])))
    ]


def task_slopes(
    by_model: Mapping[str, Mapping[str, Score]], parameters: Mapping[str, int]
) -> dict[str, list[float]]:
    """By category, of each task. Raises UserError for a single size."""
    models = sorted(by_model, key=lambda name: parameters[name])
    if len(set(parameters.values())) < 2:
        raise UserError("the models have one size", "name models of at least two")
    decades = np.log10([parameters[name] for name in models])
    return {
        category: [float(np.polyfit(decades, row, 1)[0]) for row in rows]
        for category, rows in progress_by_category(by_model, models).items()
    }


def evaluate(models: Sequence[str], most: int, seed: int, most_bytes: int = TEXT) -> dict[str, Any]:
    """Scores of all tasks that run here, by model, with sizes and slopes. Raises UserError without data."""
    by_model: dict[str, dict[str, Score]] = {}
    parameters: dict[str, int] = {}
    tasks = [task for task in catalogue() if task.runs_on]
    for name in models:
        model, tokenizer = danlu.load(name, dtype=torch.float32)
        engine = Engine(model, tokenizer)
        parameters[name] = sum(one.numel() for one in model.parameters())
        found = {task.task: score(engine, task, most, seed, most_bytes) for task in tasks}
        by_model[name] = {task: one for task, one in found.items() if one is not None}
    return {"scores": by_model, "parameters": parameters, "slopes": slopes(by_model, parameters)}


def plot(found: Mapping[str, Any]) -> Any:
    """Each category's mean progress over the parameters, and the slopes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5))
    left, right = figure.subplots(1, 2)
    models = sorted(found["parameters"], key=lambda name: found["parameters"][name])
    sizes = [found["parameters"][name] for name in models]
    for number, (category, rows) in enumerate(progress_by_category(found["scores"], models).items()):
        style = "-o" if number < 10 else "--s"
        left.plot(sizes, np.mean(rows, axis=0), style, label=category, color=f"C{number % 10}")
    left.set(xscale="log", xlabel="parameters", ylabel="progress: chance 0, perfect 1")
    left.legend(fontsize=7, ncols=3, loc="upper left", bbox_to_anchor=(0, -0.14))
    for place, slope in enumerate(found["slopes"]):
        right.barh(place, slope.value, color="C0", alpha=0.7)
        if slope.interval:
            right.plot(slope.interval, (place, place), "k-")
    right.set(
        yticks=range(len(found["slopes"])),
        yticklabels=[f"{slope.category} ({slope.tasks})" for slope in found["slopes"]],
        xlabel="progress for ten times the parameters",
    )
    right.axvline(0, color="grey", linewidth=1)
    figure.tight_layout()
    return figure


# The verb


def run(config: GopherConfig) -> dict[str, Any]:
    """`danlu eval gopher`: the table, and the analysis where there are models."""
    listed = [
        {
            "task": task.task,
            "group": task.group,
            "category": task.category,
            "metric": task.metric,
            "source": task.source,
            "runs": bool(task.runs_on),
        }
        for task in catalogue()
    ]
    if not config.models:
        return {"tasks": listed, "slopes": []}
    found = evaluate(config.models, config.each, config.seed)
    with atomic_write(config.plot, "wb") as file:
        plot(found).savefig(file, format="png", dpi=120)
    return {
        "tasks": listed,
        "parameters": found["parameters"],
        "scores": {
            name: {task: vars(one) for task, one in scores.items()}
            for name, scores in found["scores"].items()
        },
        "slopes": [vars(slope) for slope in found["slopes"]],
        "plot": str(config.plot),
    }


def show(result: Mapping[str, Any]) -> None:
    out = console()
    if not result["slopes"]:
        groups: dict[str, list[bool]] = defaultdict(list)
        for task in result["tasks"]:
            groups[task["group"]].append(task["runs"])
        rows = [(group, str(len(runs)), str(sum(runs))) for group, runs in groups.items()]
        out.print(table("Gopher's 152 tasks", ("group", "tasks", "run here"), rows))
        out.print("With models, smallest to largest, they are scored: danlu eval gopher MODEL MODEL")
        return
    found = []
    for slope in result["slopes"]:
        low_high = "" if slope["interval"] is None else "{:+.3f} … {:+.3f}".format(*slope["interval"])
        found.append((slope["category"], str(slope["tasks"]), f"{slope['value']:+.3f}", low_high))
    columns = ("category", "tasks", "for ten times the parameters", "95 %")
    out.print(table("Progress (chance 0, perfect 1; of text the share of bits saved)", columns, found))
    out.print(f"The plot: {result['plot']}", soft_wrap=True)
