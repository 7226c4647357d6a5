"""Training runs of seconds, and how they are stopped and compared."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from danlu.train.config import TrainConfig
from danlu.train.loop import Hooks
from danlu.train.pretrain import pretrain

VOCABULARY = 300
MODEL = {
    "vocab_size": VOCABULARY,
    "width": 32,
    "n_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 1,
    "ffn_width": 64,
    "max_positions": 64,
}


def config(data: Path, out: Path, **changes: Any) -> TrainConfig:
    values = {
        "data": data,
        "out": out,
        "model": MODEL,
        "steps": 12,
        "batch_size": 4,
        "sequence_length": 32,
        "optim": {"lr": 3e-3},
        "schedule": {"warmup": 3},
        "eval_every": 5,
        "eval_batches": 2,
        "checkpoint_every": 4,
        "compile": "off",
        "dtype": "float32",
        **changes,
    }
    return TrainConfig.model_validate(values)


def weights_hash(out: Path) -> str:
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


class StopAt(Hooks):
    """Ends the run in the middle of an update, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def learning_rate(self, step: int, scale: float) -> float:
        if step == self.step:
            raise ConnectionAbortedError
        return scale


def run_until(settings: TrainConfig, step: int, train: Callable[..., Any] = pretrain) -> None:
    with pytest.raises(ConnectionAbortedError):
        train(settings, StopAt(step))
