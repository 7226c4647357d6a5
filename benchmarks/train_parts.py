"""The parts of a training step that danlu does in its own way, each beside the usual one.

    python benchmarks/train_parts.py [--repeats 7] [--json FILE]

Forward and backward in bf16 on the processor, in turns; the ratio of times is taken within a turn:

- causal attention by blocks of queries (danlu.model.attention), against scaled_dot_product_attention;
- cross-entropy whose gradient is computed chunk by chunk in the forward pass (danlu.model.cross_entropy),
  against the product with the output matrix followed by torch's cross_entropy;
- a whole training step with glibc's allocator told to keep freed memory (danlu.core.allocator), against one
  without, each in a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ATTENTION = [(8, 8, 512, 32), (4, 8, 512, 64), (16, 4, 256, 64)]
"""Sequences, heads, tokens, width of a head."""
CROSS_ENTROPY = [(4096, 256, 8192), (2048, 512, 8192)]
"""Tokens, width, vocabulary."""

Step = Callable[[], Any]


def attention(shape: tuple[int, ...]) -> tuple[Step, Step]:
    import torch
    import torch.nn.functional as F

    from danlu.model.attention import causal_attention, plan_blocks

    q, k, v = (torch.randn(shape).bfloat16().requires_grad_() for _ in range(3))
    out = torch.randn(shape).bfloat16()
    blocks = plan_blocks(torch.zeros(shape[0], shape[2], dtype=torch.long), None, torch.bfloat16)

    def ours() -> None:
        causal_attention(q, k, v, blocks).transpose(1, 2).backward(out)

    def usual() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(out)

    return ours, usual


def cross_entropy(shape: tuple[int, ...]) -> tuple[Step, Step]:
    import torch
    import torch.nn.functional as F

    from danlu.model.cross_entropy import linear_cross_entropy

    n_tokens, width, vocabulary = shape
    hidden = torch.randn(n_tokens, width).bfloat16().requires_grad_()
    head = torch.randn(vocabulary, width).mul_(0.02).requires_grad_()
    targets = torch.randint(vocabulary, (n_tokens,))
    weights = torch.full((n_tokens,), 1 / n_tokens)

    def ours() -> None:
        linear_cross_entropy(hidden, head, targets, weights).backward()

    def usual() -> None:
        F.cross_entropy((hidden @ head.bfloat16().T).float(), targets).backward()

    return ours, usual


def compare(ours: Step, usual: Step, repeats: int) -> dict[str, Any]:
    """Milliseconds of both, in turns after one warm-up, and the ratio usual / ours."""
    times: dict[str, list[float]] = {"ours": [], "usual": []}
    for turn in range(repeats + 1):
        for name, step in (("ours", ours), ("usual", usual)):
            start = time.perf_counter()
            for _ in range(5):
                step()
            if turn:
                times[name].append((time.perf_counter() - start) / 5 * 1e3)
    return summarise(times["ours"], times["usual"])


def summarise(ours: list[float], usual: list[float]) -> dict[str, Any]:
    ratios = [b / a for a, b in zip(ours, usual, strict=True)]
    return {
        "ours_ms": statistics.median(ours),
        "usual_ms": statistics.median(usual),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


def time_steps(keep: bool, steps: int = 12) -> float:
    """Milliseconds of a training step of the 10M model of train_throughput.py, not compiled."""
    import torch

    import danlu.train.step
    from danlu.model.config import ModelConfig
    from danlu.model.transformer import Transformer
    from danlu.tokens.loader import Batch
    from danlu.train.config import OptimConfig
    from danlu.train.optim import make_optimizer

    if not keep:
        danlu.train.step.keep_freed_memory = lambda: False
    sizes = ModelConfig(vocab_size=8192, n_layers=8, max_positions=512, tied_embeddings=False)
    model = Transformer(sizes)
    updater = danlu.train.step.TrainStep(
        model, make_optimizer(model, OptimConfig(weight_decay=0.0)), torch.bfloat16
    )
    shape = (8, 512)
    ids = torch.randint(8192, (8, 513))
    batch = Batch(
        ids=ids[:, :-1].contiguous(),
        targets=ids[:, 1:].contiguous(),
        weights=torch.ones(shape),
        positions=torch.arange(512).expand(shape).contiguous(),
        segments=torch.zeros(shape, dtype=torch.int32),
    )
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        updater.step([batch])
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[3:])


def allocator(repeats: int) -> dict[str, Any]:
    """`time_steps` with and without, in turns."""
    times: dict[str, list[float]] = {"yes": [], "no": []}
    for _ in range(repeats):
        for keep, seen in times.items():
            command = [sys.executable, __file__, "--keep-freed-memory", keep]
            seen.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return summarise(times["yes"], times["no"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--keep-freed-memory", choices=["yes", "no"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.keep_freed_memory:
        print(time_steps(options.keep_freed_memory == "yes"))
        return

    from danlu.core.device import machine

    measured = {
        **{f"attention {shape}": compare(*attention(shape), options.repeats) for shape in ATTENTION},
        **{
            f"cross-entropy {shape}": compare(*cross_entropy(shape), options.repeats)
            for shape in CROSS_ENTROPY
        },
        "freed memory kept, 10M step": allocator(options.repeats),
    }
    print(f"{'':32} {'ours':>9} {'usual':>9} {'ratio':>6}  {'least to most':>15}")
    for name, row in measured.items():
        print(
            f"{name:32} {row['ours_ms']:6.1f} ms {row['usual_ms']:6.1f} ms {row['ratio']:6.2f}  "
            f"{row['least']:6.2f} to {row['most']:5.2f}"
        )
    if options.json:
        result = {
            "machine": asdict(machine()),
            "rows": [{"part": name, **row} for name, row in measured.items()],
            "ratios": {name: row["ratio"] for name, row in measured.items()},
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
