"""Every family trains, all weights and an adapter, and a stopped run ends as one that was never stopped."""

from pathlib import Path
from typing import Any

import pytest
from families_table import CASES, make_theirs
from small_runs import VOCABULARY, config, run_until

from danlu.core.metrics import read_metrics
from danlu.model.checkpoint import load_model
from danlu.train.pretrain import pretrain

STEPS = {"steps": 10, "eval_every": 0, "eval_batches": 4, "checkpoint_every": 4}


def learns(data: Path, folder: Path, file: str, **start: Any) -> Path:
    """Two runs of ten steps, one of them stopped in the seventh."""
    whole, stopped = (config(data, folder / name, **STEPS, **start) for name in ("whole", "stopped"))
    result = pretrain(whole)
    run_until(stopped, 7)
    pretrain(stopped)
    losses = [[row["loss"] for row in read_metrics(run.out) if "loss" in row] for run in (whole, stopped)]
    assert losses[0] == losses[1]
    assert result.held_out_loss < (result.held_out_loss_before or losses[0][0])
    assert (whole.out / file).read_bytes() == (stopped.out / file).read_bytes()
    return whole.out


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_family_learns_and_resumes(name: str, text_tokens: Path, tmp_path: Path) -> None:
    make_theirs(name, CASES[name][1]).save_pretrained(tmp_path / "theirs")
    sizes = load_model(tmp_path / "theirs").config.model_copy(update={"vocab_size": VOCABULARY})
    base = learns(
        text_tokens,
        tmp_path / "full",
        "model/model.safetensors",
        model=sizes.model_dump(),
        optim={"lr": 3e-3},
    )
    learns(
        text_tokens,
        tmp_path / "lora",
        "adapter/adapter_model.safetensors",
        model=None,
        init_from=base,
        lora={"rank": 8},
        optim={"lr": 1e-2},
    )
