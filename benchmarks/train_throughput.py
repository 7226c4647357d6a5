"""Training speed: danlu beside transformers' Trainer, in turns, on the same model, data and optimiser.

    python benchmarks/train_throughput.py [--sizes 10M 50M] [--lora] [--contestants NAME ...]
                                          [--alternations 7] [--json FILE]

Every contestant is a process of its own, with the allocator and the memory that its user would have. All
are started, warmed up (compiled), and then run by turns, a few steps each, while the others sleep; on a
GPU, whose memory they would have to share, one after the other. The ratio is taken within an alternation,
against the variant of the Trainer that is the faster one overall.

--lora: adapters of rank 16 on all matrices of the layers instead of all weights, beside PEFT in the
Trainer; both keep the frozen weights in the dtype of the computation.

What is equal: the weights at the start, the tokens, AdamW with float32 master weights and state, clipping
at 1, bf16 where the hardware has it, else float32. What is counted: whole steps, from one batch to the
next, the loss read at every step.

Model FLOPs a token are 6 N in matrix products and 6 L d T in attention, fewer with --lora, since frozen
matrices have no gradient (danlu.model.count); utilisation is their rate over the rate of a product of 2,048²
(GPU: 8,192²) matrices, measured in every alternation.
Memory is the peak above the resident size after imports (GPU: the most allocated).
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from _racing import Loop, Quietness, median_interval, say

from danlu.model.config import LoraConfig, ModelConfig
from danlu.model.count import flops_per_token, parameters


@dataclass(frozen=True)
class Size:
    """A model, its batch, and the steps of one turn."""

    model: ModelConfig
    batch_size: int
    sequence_length: int
    steps: int
    lr: float = 1e-3


def _model(
    width: int,
    n_layers: int,
    n_heads: int,
    ffn: int,
    vocabulary: int,
    positions: int,
    n_kv_heads: int | None = None,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocabulary,
        width=width,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads or n_heads,
        ffn_width=ffn,
        max_positions=positions,
        tied_embeddings=False,
    )


SIZES = {
    "cpu": {
        "10M": Size(_model(256, 8, 8, 688, 8192, 512), 8, 512, 6),
        "50M": Size(_model(512, 12, 8, 1536, 8192, 512), 4, 512, 4),
    },
    "cuda": {
        "124M": Size(_model(768, 12, 12, 2048, 32768, 2048), 16, 2048, 20),
        "1.1B": Size(_model(2048, 22, 32, 5632, 32000, 2048, 4), 4, 2048, 10, 2e-4),
    },
}
WARM_UP = 4
RANK = 16
BATCHES = 128
"""Different ones; then they come again."""


# The contestants: each calls `turn(loss_of_last_step)` before every step, and stops when it returns False.


def token_stream(size: Size, seed: int = 0) -> Iterator[Any]:
    """Batches (B, T + 1) of a language that can be learnt: half the tokens follow from the one before."""
    import numpy as np
    import torch

    random = np.random.default_rng(seed)
    vocabulary = size.model.vocab_size
    successor = random.permutation(vocabulary)
    shape = (size.batch_size, size.sequence_length + 1)
    batches = []
    for _ in range(BATCHES):  # all at once, so that drawing them is in nobody's time
        ids = random.zipf(1.3, shape) % vocabulary
        for t in range(1, shape[1]):
            follow = random.random(shape[0]) < 0.5
            ids[follow, t] = successor[ids[follow, t - 1]]
        batches.append(torch.from_numpy(ids))
    return itertools.cycle(batches)


def run_danlu(
    size: Size,
    device: str,
    turn: Any,
    deterministic: bool,
    checkpointing: bool = False,
    dtype: str = "auto",
    lora: bool = False,
) -> None:
    import torch

    from danlu.core.device import choose_dtype
    from danlu.model.compiling import has_compiler
    from danlu.model.transformer import Transformer
    from danlu.tokens.loader import Batch
    from danlu.train.config import OptimConfig
    from danlu.train.optim import make_optimizer
    from danlu.train.run import adapt, exactness
    from danlu.train.step import TrainStep

    turn.imported()
    torch.manual_seed(0)
    computed = choose_dtype(dtype, torch.device(device))
    with torch.device(device):
        model = Transformer(size.model)
    if lora:
        adapt(model, LoraConfig(rank=RANK, alpha=2 * RANK), computed)
    optimizer = make_optimizer(model, OptimConfig(lr=size.lr, weight_decay=0.0))
    step = TrainStep(
        model,
        optimizer,
        dtype=computed,
        compile=has_compiler(),
        clip=1.0,
        checkpoint_activations=checkpointing,
    )
    shape = (size.batch_size, size.sequence_length)
    weights = torch.ones(shape)
    weights[:, -1] = 0  # the Trainer shifts its labels, and has no target for the last token
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    segments = torch.zeros(shape, dtype=torch.int32)
    with exactness(deterministic):
        loss = None
        for ids in token_stream(size):
            if not turn(loss):
                return
            batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weights, positions, segments)
            loss = step.step([batch.to(device)]).loss


def run_trainer(
    size: Size,
    device: str,
    turn: Any,
    compiled: bool,
    checkpointing: bool = False,
    dtype: str = "auto",
    lora: bool = False,
) -> None:
    import tempfile

    import torch
    import transformers
    from torch.utils.data import IterableDataset

    from danlu.core.device import choose_dtype
    from danlu.model.checkpoint import hf_tensors
    from danlu.model.families import to_hf
    from danlu.model.transformer import Transformer

    turn.imported()

    class Rows(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            for ids in token_stream(size):
                for row in ids[:, :-1]:
                    yield {"input_ids": row, "labels": row}

    class Turns(transformers.TrainerCallback):
        loss: float | None = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not turn(self.loss):
                control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.loss = logs.get("loss", self.loss)

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**to_hf(size.model), attn_implementation="sdpa")
    with torch.device(device):
        weights = hf_tensors(size.model, Transformer(size.model).state_dict())
        model = transformers.LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = ["lm_head.weight"] if size.model.tied_embeddings else []
    assert missing == tied, missing
    assert not unexpected, unexpected
    del weights
    computed = choose_dtype(dtype, torch.device(device))
    if lora:
        import peft

        adapter = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        model = peft.get_peft_model(model.to(computed), adapter)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            use_cpu=device == "cpu",
            bf16=computed == torch.bfloat16,
            torch_compile=compiled,
            gradient_checkpointing=checkpointing,
            max_steps=10**6,
            per_device_train_batch_size=size.batch_size,
            learning_rate=size.lr,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=Rows(), callbacks=[Turns()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


RUNNERS = {
    "danlu": partial(run_danlu, deterministic=True),
    "danlu, order of sums free": partial(run_danlu, deterministic=False),
    "Trainer": partial(run_trainer, compiled=False),
    "Trainer, compiled": partial(run_trainer, compiled=True),
}


# The controller.


class Racer:
    """A contestant, and how fast it was in each turn."""

    def __init__(self, name: str, size: Size, device: str, lora: bool) -> None:
        self.name, self.size = name, size
        self.loop = Loop(name, device, partial(RUNNERS[name], lora=lora), size, device)
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.memory = 0
        self.first = self.run(1)
        self.run(WARM_UP - 1)
        self.rates.clear()

    def run(self, steps: int) -> float:
        """Runs `steps` steps; returns the seconds."""
        seconds, losses, self.memory = self.loop.steps(steps)
        self.losses += losses
        tokens = steps * self.size.batch_size * self.size.sequence_length
        self.rates.append(tokens / seconds)
        return seconds


def product_rate(device: str) -> float:
    """FLOP/s of a product of square matrices in the contestants' dtype, the best of several."""
    import torch

    from danlu.core.device import choose_dtype

    size, dtype = 8192 if device == "cuda" else 2048, choose_dtype("auto", torch.device(device))
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measure(
    name: str, size: Size, device: str, lora: bool, contestants: list[str], alternations: int
) -> dict[str, Any]:
    """One size: every contestant, turn by turn. Returns the rows and ratios of the result."""

    def start(contestant_name: str) -> Racer:
        racer = Racer(contestant_name, size, device, lora)
        say(f"{name}: {contestant_name} is warm; first step {racer.first:.1f} s")
        return racer

    racers, products = [], []
    quiet = Quietness()
    if device == "cuda":
        for contestant_name in contestants:
            racer = start(contestant_name)
            for _ in range(alternations):
                racer.run(size.steps)
            racer.loop.stop()
            racers.append(racer)
            products.append(product_rate(device))
            rate, megabytes = statistics.median(racer.rates), racer.memory / 1e6
            say(f"{name}: {contestant_name}: {rate:.0f} tokens/s, {megabytes:.0f} MB")
        return summarise(name, size, lora, racers, products, quiet.others())
    racers = [start(contestant_name) for contestant_name in contestants]
    quiet = Quietness()
    for number in range(alternations):
        order = racers if number % 2 == 0 else racers[::-1]
        for racer in order:
            racer.run(size.steps)
        products.append(product_rate(device))
        say(f"{name}: {number + 1}/{alternations}  " + "  ".join(f"{r.rates[-1]:.0f}" for r in racers))
    others = quiet.others()
    for racer in racers:
        racer.loop.stop()
    return summarise(name, size, lora, racers, products, others)


def summarise(
    name: str, size: Size, lora: bool, racers: list[Racer], products: list[float], others: float
) -> dict[str, Any]:
    adapter = LoraConfig(rank=RANK) if lora else None
    flops = flops_per_token(size.model, size.sequence_length, lora=adapter)
    peak = statistics.median(products)
    rows = [
        {
            "size": name,
            "parameters": parameters(size.model),
            "contestant": racer.name,
            "tokens_per_second": statistics.median(racer.rates),
            "flops_per_second": statistics.median(racer.rates) * flops,
            "utilisation": statistics.median(racer.rates) * flops / peak,
            "peak_memory": racer.memory,
            "first_step_seconds": racer.first,
            "final_loss": statistics.mean(racer.losses[-size.steps :]),
            "turns": racer.rates,
            "losses": racer.losses,
        }
        for racer in racers
    ]
    by_name = {racer.name: racer for racer in racers}
    ours, free = by_name["danlu"], by_name.get("danlu, order of sums free")
    peers = [racer for racer in racers if racer not in (ours, free)]
    fastest = max(peers, key=lambda racer: statistics.median(racer.rates))
    ratios = [a / b for a, b in zip(ours.rates, fastest.rates, strict=True)]
    low, high = median_interval(ratios)
    gap = max(abs(a - b) / b for a, b in zip(ours.losses, fastest.losses, strict=True))
    return {
        "rows": rows,
        "ratio": {
            "against": fastest.name,
            "median": statistics.median(ratios),
            "interval": [low, high],
            "each": ratios,
            "memory": ours.memory / fastest.memory,
            "largest_relative_gap_of_losses": gap,
            "cost_of_determinism": statistics.median(
                b / a - 1 for a, b in zip(ours.rates, free.rates, strict=True)
            )
            if free
            else None,
            "product_flops_per_second": peak,
            "others_share_of_processor": others,
        },
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{'':6} {'':26} {'tokens/s':>9} {'GFLOP/s':>8} {'of peak':>8} {'memory':>8} {'start':>7} {'loss':>7}"
    ]
    for row in result["rows"]:
        lines.append(
            f"{row['size']:6} {row['contestant']:26} {row['tokens_per_second']:9.0f} "
            f"{row['flops_per_second'] / 1e9:8.0f} {row['utilisation']:8.1%} "
            f"{row['peak_memory'] / 1e6:5.0f} MB {row['first_step_seconds']:5.1f} s {row['final_loss']:7.4f}"
        )
    for name, ratio in result["ratios"].items():
        low, high = ratio["interval"]
        cost = ratio["cost_of_determinism"]
        determinism = "" if cost is None else f"determinism costs {cost:.1%}; "
        lines.append(
            f"{name}: danlu is {ratio['median']:.3f} times as fast as {ratio['against']} "
            f"[{low:.3f}, {high:.3f}], with {ratio['memory']:.2f} of its memory; losses differ by at most "
            f"{ratio['largest_relative_gap_of_losses']:.2%}; "
            f"{determinism}a product runs at "
            f"{ratio['product_flops_per_second'] / 1e9:.0f} GFLOP/s; other processes took "
            f"{ratio['others_share_of_processor']:.1%} of the processor"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", nargs="+", help="default: all of the device")
    parser.add_argument("--lora", action="store_true", help="adapters instead of all weights")
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=RUNNERS,
        default=list(RUNNERS),
        metavar="NAME",
        help="default: all. danlu and one of the Trainers must take part",
    )
    parser.add_argument("--alternations", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    known = SIZES[options.device]
    sizes = options.sizes or list(known)
    if unknown := [name for name in sizes if name not in known]:
        parser.error(f"unknown size {unknown[0]}; known: {', '.join(known)}")

    if "danlu" not in options.contestants or not any("Trainer" in name for name in options.contestants):
        parser.error("danlu and one of the Trainers must take part")

    from danlu.core.device import machine

    result: dict[str, Any] = {"machine": asdict(machine()), "rows": [], "ratios": {}}
    for name in sizes:
        measured = measure(
            name, known[name], options.device, options.lora, options.contestants, options.alternations
        )
        result["rows"] += measured["rows"]
        result["ratios"][name] = measured["ratio"]
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
