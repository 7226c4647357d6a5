"""Arms that train one model on the same data, all weights or an adapter, each at its best learning rate."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from danlu.core.device import choose_device, choose_dtype, peak_rss_bytes
from danlu.core.files import atomic_write, read_json
from danlu.core.host import reset_peak_rss
from danlu.model.checkpoint import load
from danlu.model.config import LoraConfig
from danlu.model.cross_entropy import log_probabilities
from danlu.model.transformer import Transformer
from danlu.tokens.loader import Batch
from danlu.tokens.shards import Shards
from danlu.train.config import GuardConfig, OptimConfig, ScheduleConfig, TrainConfig
from danlu.train.loop import train

FULL = 0
"""The arm of all weights; the others are named by their adapter's rank."""


@dataclass(frozen=True)
class Task:
    """A model, what it is taught, and how."""

    name: str
    base: str
    tokens: str
    """Of which the training part is learnt …"""
    held_out: str
    """… and shards on which the result is measured; every second document is for choosing the rate."""
    unrelated: str | None
    kind: Literal["text", "chat"]
    steps: int
    batch_size: int
    length: int
    targets: tuple[str, ...]
    starts: tuple[int, int]
    """k of the first rate 10^(k/2): of all weights, of adapters."""


@dataclass(frozen=True)
class Measured:
    """One run."""

    held_out: list[float]
    """Nats of each held-out document …"""
    unrelated: list[float]
    """… and of each unrelated one."""
    before: float
    """Held-out loss that the loop measured before the first step."""
    trained: int
    parameters: int
    seconds: float
    """From loading to the written model."""
    memory_bytes: int
    """Resident at most."""


Sweep = dict[int, Measured]
"""k of the rate: its run."""


class Arms:
    """The runs of one task."""

    def __init__(self, task: Task, folder: Path, seeds: Sequence[int]) -> None:
        self.task, self.folder, self.seeds = task, folder, seeds
        self.tokens = learnt_tokens(Shards(Path(task.held_out)))
        self.sweeps: dict[int, Sweep] = {}
        self.runs: dict[int, list[Measured]] = {}

    def sweep(self, rank: int) -> None:
        """Looks for the arm's rate, on the first seed."""
        if rank in self.sweeps:
            return
        found: Sweep = {}

        def loss(k: int) -> float:
            found[k] = measure(self.task, rank, k, self.seeds[0], self.folder)
            return self._loss(found[k].held_out, 0)

        best_rate(loss, self.task.starts[rank != FULL])
        self.sweeps[rank] = found

    def repeat(self, rank: int) -> None:
        """The arm at its rate, with every seed."""
        self.sweep(rank)
        k = self.best(rank)
        self.runs[rank] = [measure(self.task, rank, k, seed, self.folder) for seed in self.seeds]

    def best(self, rank: int) -> int:
        return min(self.sweeps[rank], key=lambda k: self._loss(self.sweeps[rank][k].held_out, 0))

    def first(self, rank: int) -> Measured:
        """The run of the first seed, at the arm's rate."""
        return self.sweeps[rank][self.best(rank)]

    def losses(self, rank: int) -> list[float]:
        """Of each seed."""
        return [self.result(measured.held_out) for measured in self.runs[rank]]

    def result(self, nats: Sequence[float]) -> float:
        """Nats a token on the documents that no rate was chosen by."""
        return self._loss(nats, 1)

    def _loss(self, nats: Sequence[float], part: int) -> float:
        return sum(nats[part::2]) / float(sum(self.tokens[part::2]))


def best_rate(loss: Callable[[int], float], start: int) -> int:
    """The k that is better than both its neighbours, downhill from `start`."""
    known: dict[int, float] = {}
    best = start
    while True:
        near = (best, best + 1, best - 1)
        known |= {k: loss(k) for k in near if k not in known}
        lowest = min(near, key=lambda k: known[k])
        if lowest == best:
            return best
        best = lowest


def measure(task: Task, rank: int, k: int, seed: int, folder: Path) -> Measured:
    """Trains one arm at the rate 10^(k/2) and measures it; of the weights nothing is kept."""
    name = f"{task.name}-{f'r{rank}' if rank else 'full'}-{k}-{seed}"
    file, out = folder / "runs" / f"{name}.json", folder / "runs" / name
    data = [Shards(path).fingerprint() for path in (Path(task.tokens) / "train", Path(task.held_out))]
    settings = json.loads(json.dumps({**asdict(task), "data": data}))
    if file.is_file() and (kept := read_json(file))["settings"] == settings:
        return Measured(**kept["measured"])
    shutil.rmtree(out, ignore_errors=True)
    reset_peak_rss()
    begin = time.monotonic()
    result = train(_train_config(task, rank, k, seed, out), task.kind)
    seconds, memory = time.monotonic() - begin, peak_rss_bytes()
    measured = Measured(
        **evaluated(task, out),
        before=result.held_out_loss_before or 0.0,
        trained=result.trained_parameters,
        parameters=result.parameters,
        seconds=seconds,
        memory_bytes=memory,
    )
    with atomic_write(file) as opened:
        json.dump({"settings": settings, "measured": asdict(measured)}, opened)
    for heavy in ("checkpoints", "model"):
        shutil.rmtree(out / heavy, ignore_errors=True)
    return measured


def _train_config(task: Task, rank: int, k: int, seed: int, out: Path) -> TrainConfig:
    return TrainConfig(
        data=Path(task.tokens),
        out=out,
        seed=seed,
        init_from=Path(task.base),
        lora=LoraConfig(rank=rank, alpha=32.0, targets=task.targets) if rank else None,
        steps=task.steps,
        batch_size=task.batch_size,
        sequence_length=task.length,
        optim=OptimConfig(lr=10 ** (k / 2), weight_decay=0.0),
        schedule=ScheduleConfig(warmup=min(10, task.steps // 2)),
        guard=GuardConfig(remedy="off"),
        eval_every=0,
        eval_batches=1,
        checkpoint_every=task.steps,
        keep_checkpoints=1,
        compile="off",
    )


def evaluated(task: Task, ref: Path | str) -> dict[str, list[float]]:
    """Nats of each held-out and each unrelated document, computed in the dtype of the training."""
    device = choose_device()
    model, _ = load(ref, dtype=torch.float32, device=device)
    model.compute_dtype = choose_dtype(device=device)
    found = {"held_out": document_nats(model, Shards(Path(task.held_out)), task.length), "unrelated": []}
    if task.unrelated is not None:
        found["unrelated"] = document_nats(model, Shards(Path(task.unrelated)), task.length)
    return found


@torch.no_grad()
def document_nats(model: Transformer, shards: Shards, length: int, rows: int = 8) -> list[float]:
    """−log p of the learnt tokens of each document, in windows of `length` that see nothing before them."""
    windows = [
        (number, ids[start : start + length + 1].astype(np.int64), mask[start : start + length + 1])
        for number, (ids, mask) in enumerate(shards[i] for i in range(len(shards)))
        for start in range(0, len(ids) - 1, length)
    ]
    nats = [0.0] * len(shards)
    device = model.embedding.weight.device
    for begin in range(0, len(windows), rows):
        group = windows[begin : begin + rows]
        batch = _batch([(ids, mask) for _, ids, mask in group]).to(device)
        found = -(log_probabilities(model, batch).double() * batch.weights).sum(1)
        for (number, _, _), value in zip(group, found.tolist(), strict=True):
            nats[number] += value
    return nats


def _batch(windows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """Rows filled up on the right, where nothing before sees it."""
    longest = max(len(ids) for ids, _ in windows) - 1
    ids, targets = (torch.zeros(len(windows), longest, dtype=torch.int64) for _ in range(2))
    weights = torch.zeros(len(windows), longest)
    for row, (tokens, mask) in enumerate(windows):
        n = len(tokens) - 1
        ids[row, :n], targets[row, :n] = torch.from_numpy(tokens[:-1]), torch.from_numpy(tokens[1:])
        weights[row, :n] = torch.from_numpy(mask[1:].astype(np.float32))
    positions = torch.arange(longest).expand_as(ids)
    return Batch(ids, targets, weights, positions, torch.zeros_like(ids, dtype=torch.int32))


def learnt_tokens(shards: Shards) -> list[int]:
    """Learnt tokens of each document."""
    return [int(shards[number][1][1:].sum()) for number in range(len(shards))]
