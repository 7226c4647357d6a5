"""Preference-model pretraining: pairs that cost nothing teach a model of rewards before people are asked.

Claim (Askell et al. 2021, "A General Language Assistant as a Laboratory for Alignment", section 4): a stage
of preference modelling on a large set of public comparisons, between language modelling and the wanted
preferences, improves what is learnt from few of them; a binary pretraining transfers.

The second rule, written before its first run; the first one asked for less (LOG.md): its lesser model had
seen a fifth of the text, and 32 pairs told the two apart. Seeds 0 and 1 were looked at to choose these
numbers, so the run that counts has --seed 2.
- Language model: 2.6 million parameters, chitchat-dataset, 300 steps of text and 80 of replies (8 × 512). The
  paper's comparisons (Stack Exchange, Reddit, Wikipedia) aren't here; in their place 12,000 pairs of what a
  person replied and, by turns, what somebody replied to something else or what the model replies. One pass.
- Wanted: of two replies to a prompt the one that the model wrote, not one of less training (150 steps of
  text, 40 of replies); replies of at most 24 tokens; 2,048 pairs to learn from and 500 held out, of other
  prompts.
- n = 32, 128, 512, 2,048 of these pairs; one pass, and at least 12 steps of 8 × 256; with pretraining and
  without, all else equal. Five seeds of data and training. Measured: accuracy on the held-out pairs.
- "Pretraining helps" holds when the mean over n of the gain in accuracy is above 0: mean over the seeds,
  whole interval (Student).
- Control (null = the lower end of the same gain is not above 0): pretraining on the same pairs, labelled by
  coins.
- Reported without a verdict, where $DANLU_DATA has them: the same for HH's harmless-base pairs of at most 256
  tokens, 500 to learn from and up to 500 others held out.

Not tested: the paper's data and sizes; that the gain grows with size.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from danlu.data.documents import Document, read_rows
from danlu.data.rankings import to_ranked
from danlu.evaluate.intervals import t_interval
from danlu.papers.config import ReproduceConfig
from danlu.papers.protocol import Claim, Control, Result, at_least, judged, save_plot
from danlu.papers.small_talk import (
    SPEAKER,
    answered,
    by_coin,
    chat_model,
    preference_model,
    preference_tokens,
    real_pairs,
    tokens_of_chitchat,
    write_prompts,
)
from danlu.tokens.chat import render_reply
from danlu.tokens.load import load_tokenizer

ARMS = ("plain", "pretrained", "coins")


@dataclass(frozen=True)
class Setup:
    """The sizes of the experiment; the defaults are the rule's."""

    steps: tuple[int, int] = (300, 80)
    less: tuple[int, int] = (150, 40)
    seeds: int = 5
    pretraining: int = 12_000
    counts: tuple[int, ...] = (32, 128, 512, 2048)
    held_out: int = 500
    harmless: tuple[int, int] = (500, 500)


def run(config: ReproduceConfig, folder: Path, setup: Setup | None = None) -> Result:
    """All seeds; what is there already is taken as it is."""
    begin = time.monotonic()
    setup = setup or Setup()
    tokens = tokens_of_chitchat(folder / "chitchat")
    base = chat_model(tokens, folder / "base", SPEAKER, setup.steps, config.seed)
    worse = chat_model(tokens, folder / "worse", SPEAKER, setup.less, config.seed)
    harmless = harmless_pairs(tokens / "tokenizer")
    seeds = [config.seed + number for number in range(setup.seeds)]
    found = [one_seed(folder, tokens, base, worse, harmless, setup, seed) for seed in seeds]
    save_plot(_plot(found, setup), folder)
    return judged(
        Result(
            paper="Askell et al. 2021: A General Language Assistant as a Laboratory for Alignment",
            rule=__doc__ or "",
            claims=[helps_claim(found, setup)],
            controls=[coin_control(found, setup)],
            seeds=seeds,
            seconds=time.monotonic() - begin,
            not_tested="the paper's data and sizes; that the gain grows with size",
            figures={arm: {str(n): [one[arm][n] for one in found] for n in found[0][arm]} for arm in ARMS},
        )
    )


Accuracies = dict[str, dict[int | str, float]]
"""By arm, by the number of pairs."""


def one_seed(
    folder: Path,
    tokens: Path,
    base: Path,
    worse: Path,
    harmless: Sequence[Document],
    setup: Setup,
    seed: int,
) -> Accuracies:
    """Of each arm the accuracy on held-out pairs by the number that was learnt from."""
    out, tokenizer = folder / f"seed-{seed}", tokens / "tokenizer"
    most = max(setup.counts)
    file = folder / "prompts.jsonl"
    write_prompts(file, 7000)
    prompts = [row["prompt"] for _, row in read_rows(file)]
    order = np.random.default_rng(seed).permutation(len(prompts))
    asked = [prompts[i] for i in order[: most + setup.held_out]]
    better, lesser = (
        answered(model, asked, out / f"{name}.json", seed)
        for name, model in (("better", base), ("lesser", worse))
    )
    wanted = [
        Document(str(number), "", [{"role": "user", "content": prompt}], replies=[good, bad])
        for number, (prompt, good, bad) in enumerate(zip(asked, better, lesser, strict=True))
        if good.strip() and bad.strip() and good != bad
    ]
    held, learnt = wanted[: setup.held_out], wanted[setup.held_out :]
    easy = free_pairs(base, out, setup.pretraining + 200, seed)
    starts: dict[str, Path] = {"plain": base}
    for arm, pairs in (("pretrained", easy), ("coins", by_coin(easy, seed))):
        rows = preference_tokens(
            {"held_out": pairs[:200], "train": pairs[200:]}, tokenizer, out / f"{arm}-data"
        )
        starts[arm], _ = preference_model(rows, base, out / arm, seed, max(1, setup.pretraining // 32))
    found: Accuracies = {arm: {} for arm in ARMS}
    cut, most = setup.harmless[0], sum(setup.harmless)
    tasks: dict[int | str, tuple[Sequence[Document], Sequence[Document]]] = {
        n: (learnt[:n], held) for n in setup.counts
    }
    if len(harmless) > cut:
        tasks["harmless"] = (harmless[:cut], harmless[cut:most])
    for name, (train, test) in tasks.items():
        rows = preference_tokens({"train": train, "held_out": test}, tokenizer, out / f"wanted-{name}")
        for arm, start in starts.items():
            steps = max(12, len(train) // 32)
            _, accuracy = preference_model(rows, start, out / f"{arm}-{name}", seed, steps)
            found[arm][name] = accuracy or 0.0
    return found


def free_pairs(base: Path, out: Path, n: int, seed: int) -> list[Document]:
    """What somebody replied, and, by turns, somebody's reply to something else or the model's."""
    pairs = list(islice(real_pairs(seed), n))
    asked = [pair.messages[0]["content"] for pair in pairs[1::2] if pair.messages]
    written = answered(base, asked, out / "written.json", seed + 1)
    for pair, text in zip(pairs[1::2], written, strict=True):
        if text.strip() and pair.replies and text != pair.replies[0]:
            pair.replies[1] = text
    return pairs


def harmless_pairs(tokenizer_folder: Path) -> list[Document]:
    """HH's harmless-base pairs that are short enough; none where $DANLU_DATA has them not."""
    file = Path(os.environ.get("DANLU_DATA", "")) / "hh-rlhf" / "harmless-base-test.jsonl.gz"
    if "DANLU_DATA" not in os.environ or not file.is_file():
        return []
    tokenizer = load_tokenizer(tokenizer_folder)
    found = []
    for number, row in read_rows(file):
        for ranked in to_ranked(row, f"{file}, line {number}"):
            if (
                ranked.fault is None
                and sum(len(render_reply(ranked.prompt, reply, tokenizer).ids) for reply in ranked.replies)
                <= 256
            ):
                found.append(Document(str(number), "", ranked.prompt, replies=ranked.replies))
    return found


# Verdicts


def gains(found: Sequence[Accuracies], arm: str, setup: Setup) -> list[float]:
    """Of each seed the mean gain over n."""
    return [float(np.mean([one[arm][n] - one["plain"][n] for n in setup.counts])) for one in found]


def helps_claim(found: Sequence[Accuracies], setup: Setup) -> Claim:
    values = gains(found, "pretrained", setup)
    interval = t_interval(values)
    return Claim(
        claim="Pretraining helps",
        verdict=at_least(interval, 1e-9),
        value=float(np.mean(values)),
        interval=interval,
        required="mean gain in accuracy over log n above 0, whole interval",
    )


def coin_control(found: Sequence[Accuracies], setup: Setup) -> Control:
    values = gains(found, "coins", setup)
    interval = t_interval(values)
    return Control(
        control="pretraining on coins does not help",
        null=interval[0] <= 0,
        value=float(np.mean(values)),
        interval=interval,
    )


def _plot(found: Sequence[Accuracies], setup: Setup) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, arm in enumerate(ARMS):
        lines = np.array([[one[arm][n] for n in setup.counts] for one in found])
        axes.plot(setup.counts, lines.mean(0), "o-", color=f"C{number}", label=arm)
        axes.plot(setup.counts, lines.T, color=f"C{number}", linewidth=0.4)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="pairs of what is wanted", ylabel="accuracy, held out")
    axes.axhline(0.5, color="grey", linewidth=0.8)
    axes.legend()
    return figure
