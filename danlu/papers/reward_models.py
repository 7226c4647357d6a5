"""Models of rewards of several kinds, taught by the same rankings.

Claims: training on all pairs of a ranking as one element, each reply read once, is better than shuffling its
pairs (Ouyang et al. 2022, InstructGPT, section 3.5); the mean of an ensemble is a better judge than a member,
and says where it is unsure (Christiano et al. 2017, section 2.2; Coste et al. 2023); comparing is a better
lesson than imitating the best reply (Askell et al. 2021, section 2).

The rule, written before the first run:
- Language model: 2.6 million parameters, chitchat-dataset, 300 steps of text and 80 of replies (8 × 512).
  Rankings: of 600 prompts four different replies each by that model, of at most 24 tokens; annotators follow
  the rule of danlu/papers/small_talk.py with an error of deviation 0.5. Held out: all pairs of 300 other
  prompts' replies that the rule itself doesn't call equal.
- Arms, each from the language model, with steps of 8 × 256 tokens, in which a pass takes a step for 32 pairs
  or 16 rankings: "pairs", every pair a row of its own, shuffled; "ranking", the four replies in one row, the
  mean over its pairs; each also with four passes; "ensemble", the mean of five models of other seeds that
  learnt pairs once, each standardised over the held-out replies; "imitation", fine-tuning on the best
  replies, four passes; a reply's score is the mean log-probability of its tokens.
- Five seeds of prompts, replies, errors and training. Measured: accuracy on held-out pairs, and the
  calibration error of σ(difference), not of imitation. Intervals: Student's, of paired differences.
- "A ranking as one element is better" holds when with four passes the accuracy of "ranking" less that of
  "pairs" is above 0, whole interval.
- "An ensemble is a better judge" holds when "ensemble" less "pairs" is above 0, whole interval.
- "An ensemble knows where it errs" holds when its members' disagreement about a pair (the deviation of their
  differences by their mean's size) tells its errors with an AUROC above 0.5, whole interval.
- "Comparing beats imitating" holds when "pairs" less "imitation" is above 0, whole interval.
- Control (null = the interval holds 0.5): "pairs", taught by coins.

Not tested: people, models of billions of parameters.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

import danlu
from danlu.align.reward import RewardModel
from danlu.data.conversations import Messages, plain_text
from danlu.data.documents import Document, read_rows, write_documents
from danlu.evaluate.calibration import calibration_error
from danlu.evaluate.intervals import t_interval
from danlu.generate.engine import Engine
from danlu.papers.config import ReproduceConfig
from danlu.papers.protocol import Claim, Control, Result, at_least, judged, save_plot
from danlu.papers.small_talk import (
    SPEAKER,
    answered,
    auroc,
    by_coin,
    chat_model,
    gold_of,
    imitate,
    preference_model,
    preference_tokens,
    tokens_of_chitchat,
    write_prompts,
)
from danlu.tokens.chat import render_reply
from danlu.tokens.config import TokenizeConfig
from danlu.tokens.tokenize import tokenize

REPLIES = 4
ARMS = ("pairs", "ranking", "pairs, four passes", "ranking, four passes", "ensemble", "imitation", "coins")


@dataclass(frozen=True)
class Setup:
    """The sizes of the experiment; the defaults are the rule's."""

    steps: tuple[int, int] = (300, 80)
    seeds: int = 5
    rankings: int = 600
    held_out: int = 300
    members: int = 5
    error: float = 0.5


@dataclass(frozen=True)
class Asked:
    """A prompt, different replies to it, and what they are worth."""

    prompt: Messages
    replies: list[str]
    worth: list[float]


Scores = list[list[float]]
"""Of each prompt, what a model says of its replies."""


def run(config: ReproduceConfig, folder: Path, setup: Setup | None = None) -> Result:
    """All seeds; what is there already is taken as it is."""
    begin = time.monotonic()
    setup = setup or Setup()
    tokens = tokens_of_chitchat(folder / "chitchat")
    base = chat_model(tokens, folder / "base", SPEAKER, setup.steps, config.seed)
    write_prompts(folder / "prompts.jsonl", 7000)
    seeds = [config.seed + number for number in range(setup.seeds)]
    found = [one_seed(folder, tokens, base, setup, seed) for seed in seeds]
    save_plot(_plot(found), folder)
    return judged(
        Result(
            paper="Ouyang et al. 2022; Christiano et al. 2017; Askell et al. 2021: models of rewards",
            rule=__doc__ or "",
            claims=claims(found),
            controls=[coin_control([one["coins"]["accuracy"] for one in found])],
            seeds=seeds,
            seconds=time.monotonic() - begin,
            not_tested="people, models of billions of parameters",
            figures={
                arm: {
                    name: {
                        "mean": float(np.mean(values)),
                        "interval": t_interval(values),
                        "less that of pairs": t_interval(
                            [a - one["pairs"][name] for a, one in zip(values, found, strict=True)]
                        ),
                    }
                    for name in found[0][arm]
                    if name in found[0]["pairs"] and (values := [one[arm][name] for one in found])
                }
                for arm in ARMS
            },
        )
    )


def one_seed(folder: Path, tokens: Path, base: Path, setup: Setup, seed: int) -> dict[str, dict[str, float]]:
    """Of each arm accuracy and calibration error."""
    out, tokenizer = folder / f"seed-{seed}", tokens / "tokenizer"
    asked = rankings(base, folder / "prompts.jsonl", out, setup, seed)
    held, learnt = asked[: setup.held_out], asked[setup.held_out :]
    chance = np.random.default_rng(seed)
    ranked = [
        [one.replies[i] for i in np.argsort([-w - setup.error * chance.standard_normal() for w in one.worth])]
        for one in learnt
    ]
    whole = [
        Document(str(number), "", one.prompt, replies=replies)
        for number, (one, replies) in enumerate(zip(learnt, ranked, strict=True))
    ]
    pairs = [
        Document(f"{one.id}/{number}", "", one.messages, replies=list(pair))
        for one in whole
        for number, pair in enumerate(combinations(one.replies or [], 2))
    ]

    def taught(name: str, documents: Sequence[Document], passes: int, seed: int, **options: Any) -> Path:
        per_step = 16 if len(documents[0].replies or []) > 2 else 32
        rows = preference_tokens(
            {"train": documents, "held_out": documents[:8]}, tokenizer, out / f"{name}-data"
        )
        steps = max(1, passes * len(documents) // per_step)
        return preference_model(rows, base, out / name, seed, steps, **options)[0]

    members = [
        scores_of(RewardModel(taught(f"pairs-{number}", pairs, 1, 100 * seed + number)), held)
        for number in range(setup.members)
    ]
    found = {
        "pairs": members[0],
        "ranking": scores_of(RewardModel(taught("ranking", whole, 1, seed, weighting="ranking")), held),
        "pairs, four passes": scores_of(RewardModel(taught("pairs-long", pairs, 4, seed)), held),
        "ranking, four passes": scores_of(
            RewardModel(taught("ranking-long", whole, 4, seed, weighting="ranking")), held
        ),
        "ensemble": np.mean([standardised(one) for one in members], axis=0).tolist(),
        "imitation": imitated(best_rows(whole, tokenizer, out), base, held, out, seed, len(whole)),
        "coins": scores_of(RewardModel(taught("coins", by_coin(pairs, seed), 1, seed)), held),
    }
    figures = {arm: judged_pairs(scores, held) for arm, scores in found.items()}
    figures["ensemble"]["errors told"] = errors_told([standardised(one) for one in members], held)
    del figures["imitation"]["calibration error"]
    return figures


def rankings(base: Path, prompts: Path, out: Path, setup: Setup, seed: int) -> list[Asked]:
    """Prompts with different replies by the language model."""
    texts = [row["prompt"] for _, row in read_rows(prompts)]
    order = np.random.default_rng(seed).permutation(len(texts))
    chosen = [texts[i] for i in order[: 2 * (setup.rankings + setup.held_out)]]
    drawn = answered(base, [text for text in chosen for _ in range(REPLIES)], out / "replies.json", seed)
    found = []
    for number, text in enumerate(chosen):
        replies = drawn[REPLIES * number : REPLIES * (number + 1)]
        if len(set(replies)) == REPLIES and all(one.strip() for one in replies):
            found.append(Asked([{"role": "user", "content": text}], replies, gold_of(replies)))
    return found[: setup.rankings + setup.held_out]


def scores_of(judge: RewardModel, held: Sequence[Asked]) -> Scores:
    flat = judge(
        [one.prompt for one in held for _ in one.replies], [text for one in held for text in one.replies]
    )
    return [flat[n : n + REPLIES] for n in range(0, len(flat), REPLIES)]


def standardised(scores: Scores) -> np.ndarray:
    values = np.array(scores)
    return (values - values.mean()) / values.std()


def best_rows(whole: Sequence[Document], tokenizer: Path, out: Path) -> Path:
    """The best replies as a `danlu tokenize` folder."""
    conversations = []
    for one in whole:
        messages = [*(one.messages or []), {"role": "assistant", "content": (one.replies or [""])[0]}]
        conversations.append(Document(one.id, plain_text(messages), messages))
    for part, some in (("train", conversations), ("held_out", conversations[:8])):
        write_documents(some, out / "best-data" / f"{part}.jsonl.zst")
    tokenize(
        TokenizeConfig(data=out / "best-data", tokenizer=tokenizer, kind="chat", out=out / "best-tokens")
    )
    return out / "best-tokens"


def imitated(rows: Path, base: Path, held: Sequence[Asked], out: Path, seed: int, n: int) -> Scores:
    """Mean log-probabilities under a model that was fine-tuned on the best replies."""
    model = imitate(rows, base, out / "imitation", max(1, 4 * n // 80), seed)
    engine = Engine(*danlu.load(model, dtype=torch.float32))
    pairs = []
    for one in held:
        for reply in one.replies:
            rendered = render_reply(one.prompt, reply, engine.tokenizer)
            first = rendered.mask.index(True)
            end = len(rendered.mask) - rendered.mask[::-1].index(True)
            pairs.append((rendered.ids[:first], rendered.ids[first:end]))
    found = engine.likelihoods(pairs)
    flat = [own.logprob / len(reply) for own, (_, reply) in zip(found, pairs, strict=True)]
    return [flat[n : n + REPLIES] for n in range(0, len(flat), REPLIES)]


def oriented(scores: Scores, held: Sequence[Asked]) -> list[float]:
    """Of each held-out pair the difference of its scores, the better reply's first."""
    found = []
    for own, one in zip(scores, held, strict=True):
        for a, b in combinations(range(REPLIES), 2):
            if one.worth[a] != one.worth[b]:
                sign = 1 if one.worth[a] > one.worth[b] else -1
                found.append(sign * (own[a] - own[b]))
    return found


def judged_pairs(scores: Scores, held: Sequence[Asked]) -> dict[str, float]:
    margins = np.array(oriented(scores, held))
    sure = 1 / (1 + np.exp(-np.abs(margins)))
    return {
        "accuracy": float(((margins > 0) + 0.5 * (margins == 0)).mean()),
        "calibration error": calibration_error(sure.tolist(), (margins > 0).tolist()),
    }


def errors_told(members: Sequence[np.ndarray], held: Sequence[Asked]) -> float:
    """AUROC of the members' disagreement, by the size of their mean, for the errors of their mean."""
    said = np.array([oriented(one.tolist(), held) for one in members])
    doubt = said.std(0) / np.abs(said.mean(0))
    wrong = said.mean(0) <= 0
    return auroc(doubt[wrong].tolist(), doubt[~wrong].tolist()) if wrong.any() and not wrong.all() else 0.5


# Verdicts


def claims(found: Sequence[dict[str, dict[str, float]]]) -> list[Claim]:
    def above(claim: str, values: Sequence[float], than: float, required: str) -> Claim:
        interval = t_interval(values)
        return Claim(
            claim=claim,
            verdict=at_least(interval, than + 1e-9),
            value=float(np.mean(values)),
            interval=interval,
            required=f"{required} above {than:g}, whole interval",
        )

    def gap(a: str, b: str) -> list[float]:
        return [one[a]["accuracy"] - one[b]["accuracy"] for one in found]

    difference = "paired difference of accuracies"
    return [
        above(
            "A ranking as one element is better",
            gap("ranking, four passes", "pairs, four passes"),
            0,
            difference,
        ),
        above("An ensemble is a better judge", gap("ensemble", "pairs"), 0, difference),
        above(
            "An ensemble knows where it errs",
            [one["ensemble"]["errors told"] for one in found],
            0.5,
            "AUROC of its disagreement for its errors",
        ),
        above("Comparing beats imitating", gap("pairs", "imitation"), 0, difference),
    ]


def coin_control(values: Sequence[float]) -> Control:
    interval = t_interval(values)
    return Control(
        control="pairs, taught by coins",
        null=interval[0] <= 0.5 <= interval[1],
        value=float(np.mean(values)),
        interval=interval,
    )


def _plot(found: Sequence[dict[str, dict[str, float]]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for row, arm in enumerate(ARMS):
        values = [one[arm]["accuracy"] for one in found]
        low, high = t_interval(values)
        axes.plot(values, [-row] * len(values), ".", color="grey")
        axes.errorbar(
            np.mean(values),
            -row,
            xerr=[[np.mean(values) - low], [high - np.mean(values)]],
            fmt="o",
            capsize=3,
        )
    axes.axvline(0.5, color="grey", linewidth=0.8)
    axes.set(yticks=[-row for row in range(len(ARMS))], yticklabels=ARMS, xlabel="accuracy on held-out pairs")
    return figure
