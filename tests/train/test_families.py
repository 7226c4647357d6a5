"""Every family trains, all weights and an adapter, and a stopped run ends as one that was never stopped."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families_table import CASES, make_theirs
from small_runs import VOCABULARY, config, run_until

from danlu.core.metrics import read_metrics
from danlu.model.checkpoint import load_model
from danlu.train.pretrain import pretrain
from danlu.train.result import TrainResult
from danlu.train.sft import sft

STEPS = {"steps": 10, "eval_every": 0, "eval_batches": 4, "checkpoint_every": 4}
RATE = {"lr": 1e-2}
"""One for all families, and for all weights and an adapter: three times more or less teaches most of them."""


def learns(
    train: Callable[..., TrainResult], data: Path, folder: Path, file: str, **start: Any
) -> tuple[Path, TrainResult]:
    """Two runs of ten steps, one of them stopped in the seventh: the same losses, the same bytes."""
    whole, stopped = (
        config(data, folder / name, **STEPS, optim=RATE, **start) for name in ("whole", "stopped")
    )
    result = train(whole)
    run_until(stopped, 7, train)
    train(stopped)
    losses = [[row["loss"] for row in read_metrics(run.out) if "loss" in row] for run in (whole, stopped)]
    assert losses[0] == losses[1]
    assert (whole.out / file).read_bytes() == (stopped.out / file).read_bytes()
    return whole.out, result


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_family_learns_and_resumes(
    name: str, text_tokens: Path, chat_tokens: Path, tmp_path: Path
) -> None:
    """All weights from a random start, then an adapter on what came of it.

    The model starts at about log V nats. The adapter learns another kind of text than its base has seen:
    on the same one ten steps have too little left to learn to tell learning from noise.
    """
    make_theirs(name, CASES[name][1]).save_pretrained(tmp_path / "theirs")
    sizes = load_model(tmp_path / "theirs").config.model_copy(update={"vocab_size": VOCABULARY})
    base, result = learns(
        pretrain, text_tokens, tmp_path / "full", "model/model.safetensors", model=sizes.model_dump()
    )
    assert result.held_out_loss < math.log(VOCABULARY) - 1
    _, result = learns(
        sft,
        chat_tokens,
        tmp_path / "lora",
        "adapter/adapter_model.safetensors",
        model=None,
        init_from=base,
        lora={"rank": 8},
    )
    assert result.held_out_loss < result.held_out_loss_before - 0.3
