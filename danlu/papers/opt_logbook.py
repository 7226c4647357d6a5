"""OPT-175B's logbook and PaLM's section 5.1: a loss spike is survived by going back to a checkpoint.

Claim 1 (Zhang et al. 2022, "OPT", sec. 2.5 and the published logbook): restarting from an earlier checkpoint
with a lower learning rate recovers a run whose loss has spiked.
Claim 2 (Chowdhery et al. 2022, "PaLM", sec. 5.1): restarting from a checkpoint about 100 steps before the
spike and skipping the data around it recovers the run.

The rule, written before the first run:
- Model: 2 layers of width 96, vocabulary 512, context 128, about 0.3 million parameters; 400 steps of 8
  sequences, AdamW, peak learning rate 3e-3, warm-up then cosine to a tenth. Text: --data, else
  tinyshakespeare where $DANLU_DATA has it, else conversations of the package chitchat-dataset; one pass over
  it at most, but for what PaLM's remedy skips. float32, the shipped guard settings, a checkpoint every 20
  steps.
- Faults, each once in a run's history, at 40 % of the steps (160): "poison": the ten batches number 161 to
  170 of the data have random tokens as inputs and targets; they stay in the data, so whoever goes back and
  doesn't skip meets them again. "rate": the learning rate × 30 during twenty consecutive updates from the
  first time that update 161 is made; a clock that knows nothing of the guard and runs on when it goes back.
- Arms, for each fault: no guard, OPT, PaLM; and one unpoisoned run without a guard. Same seed, same initial
  weights, same data order, same number of steps in the final model.
- Metric: held-out loss (nats a token) of the final model over that of the unpoisoned run of the same seed,
  minus one.
- Seeds: 5. Interval: Student's t, 95 %, of the paired differences.
- A remedy holds for a fault when the upper end of its interval is at most 1 %.
- Controls (null = as said): the unpoisoned run repeated gives the same loss (difference exactly 0: the
  pairing works); ten clean runs with the guard on raise no alarm (five seeds, both remedies).
- No claim is made about the run without a guard: reported.

Not tested: scale (175B and 540B parameters), spikes that come by themselves from half precision or from
outliers in the optimiser state, and lasting instability: here the cause goes away.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from danlu.core.errors import UserError
from danlu.core.metrics import read_metrics
from danlu.evaluate.intervals import t_interval
from danlu.model.config import ModelConfig
from danlu.papers.config import ReproduceConfig
from danlu.papers.corpus import prepare_tokens, text_source
from danlu.papers.protocol import Claim, Control, Result, at_most, judged, save_plot
from danlu.tokens.loader import Batch
from danlu.train.config import GuardConfig, OptimConfig, ScheduleConfig, TrainConfig
from danlu.train.loop import Hooks, train
from danlu.train.result import TrainResult

STEPS = 400
FAULT_AT = STEPS * 2 // 5
POISONED = 10
RATE_FACTOR, RATE_STEPS = 30.0, 20
SEEDS = 5
LIMIT = 0.01
VOCABULARY, CONTEXT = 512, 128
FAULTS = ("poison", "rate")
ARMS = ("off", "opt", "palm")


class Poison(Hooks):
    """Batches FAULT_AT + 1 … FAULT_AT + POISONED of the data consist of random tokens."""

    def batches(self, index: int, batches: list[Batch]) -> list[Batch]:
        if not FAULT_AT < index <= FAULT_AT + POISONED:
            return batches
        for number, batch in enumerate(batches):
            generator = torch.Generator().manual_seed(1000 * index + number)
            for tokens in (batch.ids, batch.targets):
                tokens.copy_(torch.randint(VOCABULARY, tokens.shape, generator=generator))
        return batches


class WrongRate(Hooks):
    """The learning rate × RATE_FACTOR for RATE_STEPS updates from the first time FAULT_AT is passed."""

    def __init__(self) -> None:
        self.left: int | None = None

    def learning_rate(self, step: int, scale: float) -> float:
        if self.left is None and step > FAULT_AT:
            self.left = RATE_STEPS
        if not self.left:
            return scale
        self.left -= 1
        return RATE_FACTOR * scale


def hooks_of(fault: str | None) -> Hooks:
    return {"poison": Poison, "rate": WrongRate, None: Hooks}[fault]()


def run(config: ReproduceConfig, folder: Path) -> Result:
    """All arms and seeds; the runs stay below `folder`/runs."""
    begin = time.monotonic()
    tokens = prepare_tokens(text_source(config), folder / "tokens", VOCABULARY)
    seeds = list(range(config.seed, config.seed + SEEDS))
    excess: dict[tuple[str, str], list[float]] = {(f, a): [] for f in FAULTS for a in ARMS}
    repeats, alarms = [], []
    for seed in seeds:
        clean = _train(tokens, folder, seed, None, "off")
        alarms += [_train(tokens, folder, seed, None, remedy) for remedy in ("opt", "palm")]
        repeats.append(_loss(alarms[-1]) - _loss(clean))
        for fault, arm in excess:
            faulty = _train(tokens, folder, seed, fault, arm)
            excess[fault, arm].append(_loss(faulty) / _loss(clean) - 1)
    save_plot(_plot(folder, seeds[0]), folder)
    return judged(
        Result(
            paper="OPT-175B's logbook; PaLM, section 5.1: recovery from loss spikes",
            rule=__doc__ or "",
            claims=[_claim(fault, arm, excess[fault, arm]) for fault in FAULTS for arm in ("opt", "palm")],
            controls=_controls(repeats, [r.interventions for r in alarms]),
            seeds=seeds,
            seconds=time.monotonic() - begin,
            not_tested="Scale (175B and 540B parameters); spikes that come by themselves; lasting trouble.",
            figures={
                "text": text_source(config),
                **{
                    f"{fault}, {arm}": {"excess": values, "interval": t_interval(values)}
                    for (fault, arm), values in excess.items()
                },
            },
        )
    )


def _train(tokens: Path, folder: Path, seed: int, fault: str | None, remedy: str) -> TrainResult:
    """One run. An unfinished one starts afresh: the clock of WrongRate isn't in the checkpoints."""
    out = _folder(folder, seed, fault, remedy)
    if not (out / "model").exists():
        shutil.rmtree(out, ignore_errors=True)
    config = TrainConfig(
        data=tokens,
        out=out,
        seed=seed,
        model=ModelConfig(
            vocab_size=VOCABULARY,
            width=96,
            n_layers=2,
            n_heads=4,
            n_kv_heads=4,
            ffn_width=256,
            max_positions=CONTEXT,
        ),
        steps=STEPS,
        batch_size=8,
        sequence_length=CONTEXT,
        optim=OptimConfig(lr=3e-3),
        schedule=ScheduleConfig(warmup=20),
        guard=GuardConfig.model_validate({"remedy": remedy}),
        eval_every=0,
        checkpoint_every=20,
        keep_checkpoints=5,
        dtype="float32",
        compile="off",
    )
    return train(config, "text", hooks_of(fault))


def _folder(folder: Path, seed: int, fault: str | None, remedy: str) -> Path:
    return folder / "runs" / f"{fault or 'clean'}-{remedy}-{seed}"


def _loss(result: TrainResult) -> float:
    if result.held_out_loss is None:
        raise UserError("the text is too short to hold some of it out", "give a longer --data")
    return result.held_out_loss


def _claim(fault: str, remedy: str, excess: Sequence[float]) -> Claim:
    name = {
        "opt": "OPT's remedy (earlier checkpoint, lower learning rate)",
        "palm": "PaLM's remedy (skip data)",
    }
    what = {
        "poison": f"{POISONED} poisoned batches",
        "rate": f"a learning rate × {RATE_FACTOR:g} for {RATE_STEPS} steps",
    }
    interval = t_interval(excess)
    return Claim(
        claim=f"{name[remedy]} recovers a run from {what[fault]}",
        verdict=at_most(interval, LIMIT),
        value=mean(excess),
        interval=interval,
        required=f"final held-out loss at most {LIMIT:.0%} above the unpoisoned run's, whole interval",
    )


def _controls(repeats: Sequence[float], alarms: Sequence[int]) -> list[Control]:
    worst = max(map(abs, repeats))
    return [
        Control(control="a clean run with the guard on ends as without it", null=worst == 0, value=worst),
        Control(control=f"alarms in {len(alarms)} clean runs", null=not any(alarms), value=sum(alarms)),
    ]


def _plot(folder: Path, seed: int) -> Any:
    """The training loss of every arm of one seed, a panel for each fault."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4))
    clean = _curve(_folder(folder, seed, None, "off"))
    for axes, fault in zip(figure.subplots(1, 2, sharey=True), FAULTS, strict=True):
        for arm in ARMS:
            axes.plot(
                *_curve(_folder(folder, seed, fault, arm)), label=arm if arm != "off" else "no guard", lw=1
            )
        axes.plot(*clean, "k", label="unpoisoned", lw=1)
        axes.set(title=fault, xlabel="updates, those taken back included", ylabel="training loss (nats)")
        axes.legend()
    return figure


def _curve(run_folder: Path) -> tuple[list[int], list[float]]:
    losses = [row["loss"] for row in read_metrics(run_folder) if "loss" in row]
    return list(range(1, len(losses) + 1)), losses
