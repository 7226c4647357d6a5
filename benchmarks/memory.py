"""Memory of a training step, beside transformers' Trainer; and of attention as sequences grow.

    python benchmarks/memory.py [--parts step attention] [--batch-size 4] [--dtype bf16] [--json FILE]

step: peak memory, above the resident size after imports, of two training steps of the LLaMA 135M shape
(30 layers of width 576, vocabulary 49,152, sequence 2,048), for danlu and for the Trainer, each without and
with activation checkpointing, each in a process of its own. bf16 where the processor has it, else float32
(bf16 computes there too, ten times as long).

attention: peak memory, above that of its inputs, of danlu's attention forward and backward on the
processor: causal, packed, ALiBi, sliding window; at 2k to 16k tokens. The exponent of the length is fitted
to log memory (median of 3 runs) over log length: 1 = linear, 2 = quadratic. PyTorch's
scaled_dot_product_attention with a mask stands beside it, up to 4k.
"""

import argparse
import json
import math
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from _racing import say
from train_throughput import Size, run_danlu, run_trainer

from danlu.core.host import memory_bytes, peak_rss_bytes, reset_peak_rss
from danlu.model.config import ModelConfig

SHAPE = ModelConfig(
    vocab_size=49152, width=576, n_layers=30, n_heads=9, n_kv_heads=3, ffn_width=1536, max_positions=2048
)
STEPS = 2
REPEATS = 3
CONTESTANTS: dict[str, Callable[..., None]] = {
    "danlu": partial(run_danlu, deterministic=True),
    "danlu, checkpointed": partial(run_danlu, deterministic=True, checkpointing=True),
    "Trainer": partial(run_trainer, compiled=False),
    "Trainer, checkpointed": partial(run_trainer, compiled=False, checkpointing=True),
}

LENGTHS = (2048, 4096, 8192, 16384)
SQUARE_LENGTHS = (1024, 2048, 4096)
HEADS, HEAD_WIDTH, WINDOW, DOCUMENT = 4, 64, 512, 700
KINDS = ("causal", "packed", "alibi", "window", "sdpa, masked")


class Steps:
    """What a contestant calls before each step: lets STEPS of them pass."""

    def __init__(self) -> None:
        self.done, self.resident = 0, 0

    def imported(self) -> None:
        self.resident = psutil.Process().memory_info().rss

    def __call__(self, loss: float | None) -> bool:
        self.done += 1
        return self.done <= STEPS


def step_memory(name: str, batch_size: int, dtype: str, connection: Connection) -> None:
    """Sends the peak of a contestant's process."""
    sys.stdout = sys.stderr
    turn = Steps()
    size = Size(SHAPE, batch_size, SHAPE.max_positions, STEPS)
    CONTESTANTS[name](size, "cpu", turn, dtype=dtype)
    connection.send(peak_rss_bytes() - turn.resident)


def attention_memory(kind: str, length: int, connection: Connection) -> None:
    """Sends the peak of one forward and backward pass, above its inputs, outputs and gradients."""
    import torch
    import torch.nn.functional as F

    from danlu.model.attention import Scores, causal_attention, plan_blocks

    def run(n: int) -> None:
        q, k, v = (torch.randn(1, HEADS, n, HEAD_WIDTH, requires_grad=True) for _ in range(3))
        if kind == "sdpa, masked":
            mask = torch.ones(n, n, dtype=torch.bool).tril()
            F.scaled_dot_product_attention(q, k, v, mask).sum().backward()
            return
        segments = (torch.arange(n) // DOCUMENT)[None].int() if kind == "packed" else None
        window = WINDOW if kind == "window" else 0
        scores = Scores(HEAD_WIDTH**-0.5, window, alibi=kind == "alibi")
        blocks = plan_blocks(torch.zeros(1, n, dtype=torch.long), segments, torch.float32, window)
        causal_attention(q, k, v, blocks, scores).sum().backward()

    run(256)  # what is loaded once is loaded now
    reset_peak_rss()
    before = psutil.Process().memory_info().rss
    run(length)
    connection.send(peak_rss_bytes() - before)


def in_a_process(function: Callable[..., None], *arguments: Any) -> int:
    """What `function` sends. Raises SystemExit where its process dies, as it does without enough memory."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(*arguments, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        sys.exit(f"{arguments[0]}: its process ended with {process.exitcode}")
    finally:
        process.join()


Rows = list[dict[str, Any]]


def measure_step(batch_size: int, dtype: str) -> Rows:
    rows: Rows = []
    for name in CONTESTANTS:
        size = in_a_process(step_memory, name, batch_size, dtype)
        rows.append({"part": "step", "name": name, "batch_size": batch_size, "dtype": dtype, "bytes": size})
        say(f"{name}: {size / 1e6:,.0f} MB")
    return rows


def step_ratios(rows: Rows) -> dict[str, float]:
    """Of the leaner way of danlu's to each of the Trainer's."""
    found = {row["name"]: row["bytes"] for row in rows}
    best = min(found["danlu"], found["danlu, checkpointed"])
    return {f"step / {name}": best / found[name] for name in ("Trainer", "Trainer, checkpointed")}


def measure_attention() -> Rows:
    rows: Rows = []
    for kind in KINDS:
        lengths = SQUARE_LENGTHS if kind == "sdpa, masked" else LENGTHS
        sizes = [
            int(median(in_a_process(attention_memory, kind, length) for _ in range(REPEATS)))
            for length in lengths
        ]
        slope = exponent(lengths, sizes)
        rows.append(
            {"part": "attention", "name": kind, "lengths": lengths, "bytes": sizes, "exponent": slope}
        )
        say(f"{kind}: " + ", ".join(f"{size / 1e6:,.0f} MB" for size in sizes) + f"; exponent {slope:.2f}")
    return rows


def exponent(lengths: tuple[int, ...], sizes: list[int]) -> float:
    """Slope of the least-squares line through log size over log length."""
    xs, ys = [math.log(n) for n in lengths], [math.log(size) for size in sizes]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - mean_x) ** 2 for x in xs)


def plot(rows: Rows, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        megabytes = [size / 1e6 for size in row["bytes"]]
        label = f"{row['name']}, exponent {row['exponent']:.2f}"
        axes.loglog(row["lengths"], megabytes, "o-", base=2, label=label)
    axes.set(xlabel="tokens", ylabel="MB, forward and backward")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["step", "attention"], default=["step", "attention"])
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of a step")
    parser.add_argument("--dtype", choices=["auto", "bf16", "float32"], default="auto", help="of the step")
    parser.add_argument("--plot", type=Path, help="draw attention's memory into this file")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()

    from danlu.core.device import machine

    result: dict[str, Any] = {"machine": asdict(machine()), "rows": [], "ratios": {}}
    if "step" in options.parts:
        native = "bf16" if machine().bf16_native else "float32"
        dtype = native if options.dtype == "auto" else options.dtype
        say(f"{dtype}, {memory_bytes() / 1e9:.0f} GB of memory, batch {options.batch_size}")
        result["rows"] += measure_step(options.batch_size, dtype)
        result["ratios"] = step_ratios(result["rows"])
        for name, ratio in result["ratios"].items():
            print(f"{name}: danlu needs {ratio:.2f} of its memory")
    if "attention" in options.parts:
        attention = measure_attention()
        result["rows"] += attention
        if options.plot:
            plot(attention, options.plot)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
