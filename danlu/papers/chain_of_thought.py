"""Chain of thought: a model that writes the steps down before its answer solves what it can't say at once.

Claims (Wei et al. 2022, "Chain-of-Thought Prompting Elicits Reasoning in Large Language Models"): with the
steps shown in the examples, large models solve many more problems; small ones gain nothing; the gain is
larger for problems with more steps; and it is the steps, not more tokens before the answer, that help.

The fourth rule, written before the fourth run; all others are in LOG.md, 2026-11-27 and 28. Under the first,
the small model of the last part had learnt nothing that it was asked, so that two claims did not hold for
want of training; under the second and the third it found a question's numbers by their distance, and worked
only problems of some lengths. What changed is that part's problems, whose steps have letters by which they
are found, and its training and draws.
- BBH: the published outputs of a model of 175 billion parameters trained on code (code-davinci-002) on
  BIG-Bench Hard's 27 tasks and 6,511 questions, with examples with steps and without ($DANLU_DATA/bbh).
  Score: what stands behind the last "the answer is", else the first line, is the answer. "A large model
  gains" holds when the mean over the tasks of chain minus direct is above 0, whole interval. Tasks are
  resampled, and in each its questions, paired, 10,000 times.
- smollm2 (135 million parameters, float32, plain text), GSM8K ($DANLU_DATA/gsm8k): 200 questions of the test
  part, drawn by the seed; eight examples, the training part's first eight, with their steps or with the
  answer alone; greedy, up to 200 tokens or an empty line. Score: the last number is the answer. "A small
  model gains nothing" holds when the upper end of the interval of chain minus direct (questions, paired) is
  at most 0.05.
- A model of 1.8 million parameters, a token a character, trained from nothing: 1,600 steps of 16 × 384 tokens
  (Muon, cosine) of conversations of five problems, of which the answers are learnt. A problem is a digit and
  n of +d, -d, *d, lettered, worked from left to right modulo 10, n from 2 to 8. A conversation has one
  format, a third each: the answer alone; each step before it; as many dots as the steps have characters. Four
  solved problems in a format, then the question: 100 questions for each n, the same in every format, greedy.
  One model: only the prompt differs. It has learnt to work steps when at least half of all problems are right
  behind chains; otherwise the claims of this part are "not testable".
  "The prompt's steps help" holds when the mean of chain minus direct is above 0, whole interval; "more steps,
  more gain" when the slope of the gain over n is (least squares; questions resampled, paired).
- Control (null = the lower end of dots minus direct is at most 0.05): as many characters, but no steps.

Not tested: that the gain appears with size, which takes models between these; people's examples, other
domains; the model of 175 billion parameters itself, whose outputs are the published ones.
"""

import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import danlu
from danlu.data.conversations import Messages
from danlu.data.documents import read_rows
from danlu.evaluate.answers import last_number, stated_answer
from danlu.evaluate.intervals import Interval, bootstrap_interval
from danlu.evaluate.sets import archive_files, located
from danlu.generate.engine import Engine
from danlu.generate.sampling import SamplingParams
from danlu.papers.config import ReproduceConfig
from danlu.papers.miniature import learn, talk
from danlu.papers.protocol import Claim, Control, Result, at_least, at_most, judged, save_plot

DIRECT, CHAIN, DOTS = FORMATS = ("direct", "chain", "dots")
LETTERS = "abcdefgh"
LEARNT = 0.5
"""Share of the problems that a model which works steps gets right."""
NONE = 1e-9
"""What "above 0" is compared with."""


@dataclass(frozen=True)
class Setup:
    """The sizes of the experiment; the defaults are the rule's."""

    model: str = "smollm2"
    shots: int = 8
    questions: int = 200
    longest: int = 200
    documents: int = 37_500
    steps: int = 1600
    each: int = 100
    n_steps: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)


def run(config: ReproduceConfig, folder: Path, setup: Setup | None = None) -> Result:
    """The three parts, one after the other."""
    begin = time.monotonic()
    setup = setup or Setup()
    large = bbh_scores()
    small = gsm8k_scores(setup, config.seed)
    own = miniature_scores(setup, config.seed, folder)
    save_plot(_plot(large, small, own, setup), folder)
    gain = small[CHAIN] - small[DIRECT]
    found = [large_gains(large), small_gains_nothing(gain), *miniature_claims(own, setup)]
    dots = (own[DOTS] - own[DIRECT]).reshape(-1)
    interval = bootstrap_interval(dots.tolist())
    return judged(
        Result(
            paper="Wei et al. 2022: Chain-of-Thought Prompting Elicits Reasoning in Large Language Models",
            rule=__doc__ or "",
            claims=found,
            controls=[
                Control(
                    control="dots in place of the steps: no gain over the answer alone",
                    null=interval[0] <= 0.05,
                    value=float(dots.mean()),
                    interval=interval,
                )
            ],
            seeds=[config.seed],
            seconds=time.monotonic() - begin,
            not_tested="That the gain appears with size; other domains; the large model itself.",
            figures={
                "BBH": {name: float(np.mean([part.mean() for part in large[name]])) for name in large},
                "GSM8K, smollm2": {name: float(values.mean()) for name, values in small.items()},
                "miniature": {
                    name: {
                        f"{n} steps": float(part.mean())
                        for n, part in zip(setup.n_steps, values, strict=True)
                    }
                    for name, values in own.items()
                },
            },
        )
    )


# A large model's published outputs


def bbh_scores() -> dict[str, list[np.ndarray]]:
    """By format, of each task (questions,) whether each was answered. Raises UserError without the data."""
    outputs = located("data:bbh/code-davinci-002-outputs.tar.gz")
    found: dict[str, list[np.ndarray]] = {}
    for name, kind in ((DIRECT, "direct"), (CHAIN, "cot")):
        found[name] = []
        for _, text in archive_files(outputs, rf"-{kind}/.*000\.json$"):
            rows = json.loads(text)["outputs"]
            right = [stated_answer(one["prediction"]) == one["target"].strip() for one in rows]
            found[name].append(np.array(right, float))
    return found


def large_gains(scores: dict[str, list[np.ndarray]], resamples: int = 10_000) -> Claim:
    gains = [chain - direct for chain, direct in zip(scores[CHAIN], scores[DIRECT], strict=True)]
    chance = np.random.default_rng(0)
    # The mean of a task's resampled questions, many times; then tasks are resampled.
    means = np.stack([gain[chance.integers(0, len(gain), (resamples, len(gain)))].mean(1) for gain in gains])
    tasks = chance.integers(0, len(gains), (len(gains), resamples))
    drawn = means[tasks, np.arange(resamples)].mean(0)
    interval = (float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975)))
    return Claim(
        claim="a large model gains: BBH's published outputs",
        verdict=at_least(interval, NONE),
        value=float(np.mean([gain.mean() for gain in gains])),
        interval=interval,
        required="mean over 27 tasks of chain minus direct above 0, whole interval",
    )


# smollm2


def gsm8k_scores(setup: Setup, seed: int) -> dict[str, np.ndarray]:
    """By format (questions,): whether each was answered."""
    shown = [row for _, row in zip(range(setup.shots), _gsm8k("train"), strict=False)]
    asked = random.Random(seed).sample(_gsm8k("test"), setup.questions)
    engine = Engine(*danlu.load(setup.model, dtype=torch.float32))
    params = SamplingParams(max_tokens=setup.longest, temperature=0.0, stop=("\n\n",))
    found = {}
    for name in (DIRECT, CHAIN):
        prompts = [gsm8k_prompt(shown, question, name) for question, _, _ in asked]
        said = engine.generate(prompts, params, progress=f"GSM8K, {name}")
        right = [last_number(one.text) == answer for one, (_, _, answer) in zip(said, asked, strict=True)]
        found[name] = np.array(right, float)
    return found


Problem = tuple[str, str, str]
"""Question, steps, answer."""


def _gsm8k(part: str) -> list[Problem]:
    found = []
    for _, row in read_rows(located(f"data:gsm8k/{part}.jsonl.gz")):
        steps, _, answer = row["answer"].partition("####")
        steps = " ".join(re.sub(r"<<[^>]*>>", "", steps).split())
        found.append((row["question"].strip(), steps, last_number(answer) or ""))
    return found


def gsm8k_prompt(shown: Sequence[Problem], question: str, form: str) -> str:
    parts = []
    for one, steps, answer in shown:
        said = f"{steps} The answer is {answer}." if form == CHAIN else f"The answer is {answer}."
        parts.append(f"Q: {one}\nA: {said}")
    return "\n\n".join([*parts, f"Q: {question}\nA:"])


def small_gains_nothing(gain: np.ndarray) -> Claim:
    interval = bootstrap_interval(gain.tolist())
    return Claim(
        claim="a small model gains nothing: smollm2 on GSM8K",
        verdict=at_most(interval, 0.05),
        value=float(gain.mean()),
        interval=interval,
        required="upper end of the interval of chain minus direct at most 0.05",
    )


# A model that learnt all formats


def problem(chance: random.Random, n: int) -> tuple[str, str, str]:
    """Question, steps and answer: n operations on digits, from left to right, modulo 10.

    "3 a+4 b*2" is worked as "3 a+4=7 b*2=4".
    """
    value = chance.randrange(10)
    question, steps = [str(value)], [str(value)]
    for letter in LETTERS[:n]:
        sign, other = chance.choice("+-*"), chance.randrange(10)
        value = {"+": value + other, "-": value - other, "*": value * other}[sign] % 10
        question.append(f"{letter}{sign}{other}")
        steps.append(f"{letter}{sign}{other}={value}")
    return " ".join(question), " ".join(steps), str(value)


def solved(parts: tuple[str, str, str], form: str) -> tuple[str, str]:
    """Question and answer in a format."""
    question, steps, answer = parts
    between = {DIRECT: "", CHAIN: f"{steps} ", DOTS: f"{'.' * len(steps)} "}[form]
    return question, f"{between}>{answer}"


def conversation(chance: random.Random, n_steps: Sequence[int]) -> Messages:
    form = chance.choice(FORMATS)
    return talk([solved(problem(chance, chance.choice(n_steps)), form) for _ in range(5)])


def miniature_scores(setup: Setup, seed: int, folder: Path) -> dict[str, np.ndarray]:
    """By format (numbers of steps, questions): whether each was answered."""
    chance = random.Random(f"fourth rule {seed}")
    run = learn(
        lambda: conversation(chance, setup.n_steps),
        folder / "miniature",
        documents=setup.documents,
        steps=setup.steps,
        seed=seed,
    )
    engine = Engine(*danlu.load(run, dtype=torch.float32))
    chance = random.Random(f"fourth rule, asked {seed}")
    shown = [[problem(chance, chance.choice(setup.n_steps)) for _ in range(4)] for _ in range(setup.each)]
    asked = [[problem(chance, n) for _ in range(setup.each)] for n in setup.n_steps]
    params = SamplingParams(max_tokens=64, temperature=0.0)
    found = {}
    for form in FORMATS:
        prompts = [
            talk([solved(one, form) for one in shots], parts[0])
            for rows in asked
            for shots, parts in zip(shown, rows, strict=True)
        ]
        said = engine.generate(prompts, params, progress=f"miniature, {form}")
        answers = [parts[2] for rows in asked for parts in rows]
        right = [
            one.text.rpartition(">")[2].strip() == answer for one, answer in zip(said, answers, strict=True)
        ]
        found[form] = np.array(right, float).reshape(len(setup.n_steps), setup.each)
    return found


def miniature_claims(scores: dict[str, np.ndarray], setup: Setup) -> list[Claim]:
    gain = scores[CHAIN] - scores[DIRECT]
    interval = bootstrap_interval(gain.reshape(-1).tolist())
    learnt = float(scores[CHAIN].mean()) >= LEARNT
    steps, slope = np.array(setup.n_steps, float), slope_interval(gain, setup.n_steps)
    return [
        Claim(
            claim="the prompt's steps help: one model, two prompts",
            verdict=at_least(interval, NONE) if learnt else "not testable",
            value=float(gain.mean()),
            interval=interval,
            required="mean of chain minus direct above 0, whole interval",
        ),
        Claim(
            claim="more steps, more gain",
            verdict=at_least(slope, NONE) if learnt else "not testable",
            value=float(np.polyfit(steps, gain.mean(1), 1)[0]),
            interval=slope,
            required="slope of the gain over the number of steps above 0, whole interval",
        ),
    ]


def slope_interval(gain: np.ndarray, n_steps: Sequence[int]) -> Interval:
    """Of the least-squares slope of the mean gain over the steps; questions are resampled within each."""
    steps = np.array(n_steps, float) - np.mean(n_steps)

    def slope(rows: np.ndarray, axis: int) -> Any:
        return (rows.mean(axis) * steps).sum(-1) / (steps**2).sum()

    return bootstrap_interval(gain.T.tolist(), slope)


def _plot(
    large: dict[str, list[np.ndarray]],
    small: dict[str, np.ndarray],
    own: dict[str, np.ndarray],
    setup: Setup,
) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    for place, name in enumerate((DIRECT, CHAIN)):
        heights = [np.mean([part.mean() for part in large[name]]), small[name].mean()]
        left.bar(np.arange(2) + 0.38 * (place - 0.5), heights, 0.36, label=name)
    left.set(xticks=(0, 1), xticklabels=("BBH, 175B (published)", "GSM8K, smollm2"), ylim=(0, 1))
    left.set_ylabel("share answered")
    left.legend()
    for name in FORMATS:
        right.plot(setup.n_steps, own[name].mean(1), "-o", label=name)
    right.axhline(0.1, color="grey", linestyle=":", label="chance")
    right.set(xlabel="steps of the problem", title="one model of 1.8M, three prompts", ylim=(0, 1.02))
    right.legend()
    figure.tight_layout()
    return figure
