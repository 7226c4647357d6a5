"""Self-consistency: of several chains of thought, the answer that most of them reach is the better one.

Claim (Wang et al. 2022, "Self-Consistency Improves Chain of Thought Reasoning in Language Models"): sampling
several reasoning paths and taking the majority of their answers beats one greedy path, more so with more
paths, and beats choosing the most probable path (sample-and-rank).

The rule, written before the first run:
- Task: the sum of 4 to 6 numbers from 1 to 30. Its working adds two of what is left, in random order, until
  one number is left, so that there are many right paths: "23+15+7+30" is answered "30+23=53 7+53=60 15+60=75
  >75".
- Model: 1.8 million parameters, a token a character, trained from nothing on conversations of five problems,
  of which the answers are learnt, in stages of 100 steps of 16 × 384 tokens (Muon at a constant rate); each
  stage draws new conversations and starts its optimiser anew. After each stage 200 other problems are
  answered greedily. Training ends after the first stage with at least 40 % right, and after 30 stages at the
  latest; a seed that ends outside of 40 to 70 % makes all claims "not testable".
- Asked: 500 problems, each behind one solved problem: greedily, and 20 samples at temperature 0.7. Arms:
  greedy; the majority of the first 1, 5, 10 and 20 samples (of equals the first; a sample without an answer
  has no vote); the most probable of the 20 samples (sum of the log-probabilities).
- Three seeds, of data, training and samples. Resampled: the seed (Student's interval of the differences of
  the three means, paired).
- "Twenty paths beat greedy" and "twenty paths beat the most probable one" hold when the mean difference is
  above 0, whole interval. 1, 5, 10 and 20 paths: reported, no verdict.
- Control (null = the upper end of the share of right answers is at most 0.05): the majority of 20 samples of
  which each belongs to another problem.

Not tested: models of billions of parameters, the paper's reasoning sets, prompts in place of training.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import danlu
from danlu.data.conversations import Messages
from danlu.evaluate.answers import majority
from danlu.evaluate.intervals import Interval, t_interval
from danlu.generate.engine import Completion, Engine
from danlu.generate.sampling import SamplingParams
from danlu.papers.config import ReproduceConfig
from danlu.papers.miniature import learn, talk
from danlu.papers.protocol import Claim, Control, Result, Verdict, at_least, judged, save_plot

LONGEST = 80
"""Tokens of an answer."""
GREEDY, RANKED, SHUFFLED = "greedy", "sample-and-rank", "samples of other problems"


@dataclass(frozen=True)
class Setup:
    """The sizes of the experiment; the defaults are the rule's."""

    seeds: int = 3
    steps: int = 100
    batch_size: int = 16
    documents: int = 4000
    stages: int = 30
    enough: float = 0.4
    too_much: float = 0.7
    tried: int = 200
    asked: int = 500
    samples: int = 20
    votes: tuple[int, ...] = (1, 5, 10, 20)


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    worked: str
    """One of its workings, and the answer."""


def problem(chance: random.Random) -> Problem:
    numbers = [chance.randint(1, 30) for _ in range(chance.randint(4, 6))]
    question, left, steps = "+".join(map(str, numbers)), list(numbers), []
    while len(left) > 1:
        first, second = (left.pop(chance.randrange(len(left))) for _ in range(2))
        steps.append(f"{first}+{second}={first + second}")
        left.append(first + second)
    answer = str(sum(numbers))
    return Problem(question, answer, f"{' '.join(steps)} >{answer}")


def conversation(chance: random.Random) -> Messages:
    problems = [problem(chance) for _ in range(5)]
    return talk([(one.question, one.worked) for one in problems])


def stated(text: str) -> str | None:
    """The answer behind ">", None where there is none."""
    _, mark, answer = text.partition(">")
    return answer.strip() if mark and answer.strip().isdigit() else None


def run(config: ReproduceConfig, folder: Path, setup: Setup | None = None) -> Result:
    """Trains, asks and votes, seed by seed."""
    begin = time.monotonic()
    setup = setup or Setup()
    seeds = [config.seed + number for number in range(setup.seeds)]
    arms, stopped = [], []
    for seed in seeds:
        trained, share, stages = train_until(setup, seed, folder)
        stopped.append({"stages": stages, "right of the problems tried": share})
        arms.append(shares(trained, setup, seed))
    save_plot(_plot(arms, setup), folder)
    inside = all(setup.enough <= one["right of the problems tried"] <= setup.too_much for one in stopped)
    return judged(
        Result(
            paper="Wang et al. 2022: Self-Consistency Improves Chain of Thought Reasoning in Language Models",
            rule=__doc__ or "",
            claims=claims(arms, setup, inside),
            controls=[control(arms)],
            seeds=seeds,
            seconds=time.monotonic() - begin,
            not_tested="Large models, the paper's reasoning sets, prompts in place of training.",
            figures={f"seed {seed}": {**s, **a} for seed, s, a in zip(seeds, stopped, arms, strict=True)},
        )
    )


def train_until(setup: Setup, seed: int, folder: Path) -> tuple[Engine, float, int]:
    """The model after the first stage that is good enough, its share of right answers, and the stages."""
    chance = random.Random(seed)
    tried = [problem(random.Random(f"tried {seed} {number}")) for number in range(setup.tried)]
    run: Path | None = None
    for stage in range(1, setup.stages + 1):
        run = learn(
            lambda: conversation(chance),
            folder / f"seed-{seed}" / f"stage-{stage:02}",
            documents=setup.documents,
            steps=setup.steps,
            batch_size=setup.batch_size,
            seed=1000 * seed + stage,
            start=run,
            constant=True,
        )
        engine = Engine(*danlu.load(run, dtype=torch.float32))
        said = ask(engine, tried, SamplingParams(max_tokens=LONGEST, temperature=0.0))
        share = float(np.mean([stated(one.text) == p.answer for one, p in zip(said, tried, strict=True)]))
        if share >= setup.enough:
            break
    return engine, share, stage


def ask(
    engine: Engine, problems: Sequence[Problem], params: SamplingParams | Sequence[SamplingParams]
) -> list[Completion]:
    """Each behind a solved one."""
    shown = problem(random.Random(0))
    pair = [(shown.question, shown.worked)]
    return engine.generate([talk(pair, one.question) for one in problems], params, progress="sums")


def shares(engine: Engine, setup: Setup, seed: int) -> dict[str, float]:
    """By arm the share of right answers."""
    problems = [problem(random.Random(f"asked {seed} {number}")) for number in range(setup.asked)]
    truth = [one.answer for one in problems]

    def share(answers: Sequence[str | None]) -> float:
        return float(np.mean([said == right for said, right in zip(answers, truth, strict=True)]))

    greedy = ask(engine, problems, SamplingParams(max_tokens=LONGEST, temperature=0.0))
    repeated = [one for one in problems for _ in range(setup.samples)]
    params = [
        SamplingParams(max_tokens=LONGEST, temperature=0.7, seed=seed * len(repeated) + number)
        for number in range(len(repeated))
    ]
    drawn = ask(engine, repeated, params)
    n = setup.samples
    paths = [drawn[n * number : n * (number + 1)] for number in range(len(problems))]
    answers = [[stated(one.text) for one in own] for own in paths]
    best = [max(own, key=lambda one: sum(one.logprobs)) for own in paths]
    others = [[answers[(place + 1 + k) % len(answers)][k] for k in range(n)] for place in range(len(answers))]
    return {
        GREEDY: share([stated(one.text) for one in greedy]),
        **{votes(k): share([majority(own[:k]) for own in answers]) for k in setup.votes},
        RANKED: share([stated(one.text) for one in best]),
        SHUFFLED: share([majority(own) for own in others]),
    }


def votes(k: int) -> str:
    return f"majority of {k}"


def claims(arms: Sequence[dict[str, float]], setup: Setup, testable: bool) -> list[Claim]:
    most, found = votes(max(setup.votes)), []
    for claim, other in (("beat greedy", GREEDY), ("beat the most probable one", RANKED)):
        gains = [arm[most] - arm[other] for arm in arms]
        interval = t_interval(gains)
        verdict: Verdict = at_least(interval, 1e-9) if testable else "not testable"
        found.append(
            Claim(
                claim=f"{max(setup.votes)} paths {claim}",
                verdict=verdict,
                value=float(np.mean(gains)),
                interval=interval,
                required="mean difference above 0, whole interval; greedy between 40 and 70 %",
            )
        )
    return found


def control(arms: Sequence[dict[str, float]]) -> Control:
    interval: Interval = t_interval([arm[SHUFFLED] for arm in arms])
    return Control(
        control="the majority of samples that belong to other problems is not right",
        null=interval[1] <= 0.05,
        value=float(np.mean([arm[SHUFFLED] for arm in arms])),
        interval=interval,
    )


def _plot(arms: Sequence[dict[str, float]], setup: Setup) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5))
    axes = figure.add_subplot()
    for number, arm in enumerate(arms):
        color = f"C{number}"
        axes.plot(
            setup.votes, [arm[votes(k)] for k in setup.votes], "-o", color=color, label=f"seed {number}"
        )
        axes.axhline(arm[GREEDY], color=color, linestyle="--", linewidth=1)
        axes.axhline(arm[RANKED], color=color, linestyle=":", linewidth=1)
    axes.plot([], [], "k--", label="greedy")
    axes.plot([], [], "k:", label="most probable of all")
    axes.set(xlabel="paths that vote", ylabel="share of sums right", xticks=setup.votes)
    axes.legend(fontsize=8)
    return figure
