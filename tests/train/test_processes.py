"""Many processes are the same run: gloo on the CPU, started by torchrun."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from danlu.core.metrics import read_metrics
from danlu.model.checkpoint import load_model
from danlu.model.transformer import Transformer
from danlu.train.checkpoint import load_weights_and_moments
from danlu.train.config import TrainConfig
from danlu.train.optim import make_optimizer

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("processes_worker.py")


def call(processes: int, *arguments: str) -> None:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*start, str(WORKER), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_cutting_the_batch_does_not_change_the_gradient(tmp_path: Path) -> None:
    """Batch 8, eight accumulated batches of 1, and two processes of 4 (and of 2 × 2)."""
    arms = {"whole": (1, 1), "accumulated": (1, 8), "processes": (2, 1), "both": (2, 2)}
    gradients = {}
    for name, (processes, accumulate) in arms.items():
        call(processes, "gradients", str(tmp_path / name), str(accumulate))
        gradients[name] = torch.load(tmp_path / name)
    for name in ("accumulated", "processes", "both"):
        for ours, whole in zip(gradients[name], gradients["whole"], strict=True):
            assert (ours - whole).norm() <= 1e-6 * whole.norm(), name


def config(data: Path, out: Path, parallel: str) -> TrainConfig:
    sizes = {"width": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_width": 64, "max_positions": 64}
    values: dict[str, Any] = {
        "data": data,
        "out": out,
        "model": {"vocab_size": 300, **sizes},
        "steps": 20,
        "batch_size": 8,
        "sequence_length": 64,
        "eval_every": 10,
        "eval_batches": 2,
        "sample_prompts": ["It was"],
        "sample_tokens": 5,
        "checkpoint_every": 10,
        "parallel": parallel,
        "dtype": "float32",
        "compile": "off",
    }
    return TrainConfig.model_validate(values)


def curve(out: Path, key: str) -> list[float]:
    return [row[key] for row in read_metrics(out) if key in row]


def test_ddp_fsdp_and_tensor_are_the_same_run_as_one_process(text_tokens: Path, tmp_path: Path) -> None:
    ways = ("ddp", "fsdp", "tensor")
    call(1, "train", config(text_tokens, tmp_path / "one", "ddp").model_dump_json())
    for way in ways:
        call(2, "train", config(text_tokens, tmp_path / way, way).model_dump_json())
    for name in ways:
        for key, count in (("loss", 20), ("held_out_loss", 2)):
            one, many = curve(tmp_path / "one", key), curve(tmp_path / name, key)
            assert len(one) == count
            assert many == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("way", ["fsdp", "tensor"])
def test_a_spread_run_resumes_and_its_checkpoint_loads_on_one_process(
    way: str, text_tokens: Path, tmp_path: Path
) -> None:
    settings = config(text_tokens, tmp_path, way)
    call(2, "train", settings.model_dump_json())
    final = load_model(tmp_path / "model")
    other = Transformer(final.config)
    checkpoint = tmp_path / "checkpoints" / "step-00000020"
    load_weights_and_moments(checkpoint, other, make_optimizer(other, settings.optim))
    assert all(torch.equal(a, b) for a, b in zip(final.parameters(), other.parameters(), strict=True))
    # As if killed at step 10:
    for path in (checkpoint, tmp_path / "model"):
        path.rename(path.with_name("." + path.name))
    call(2, "train", settings.model_dump_json())
    again = load_model(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(final.parameters(), again.parameters(), strict=True))


def test_tensor_parallel_and_fsdp_are_one_model_and_exchange_checkpoints(tmp_path: Path) -> None:
    """Logits and gradients; weights saved by two processes and read by one, and back."""
    arms = {
        "one": (1, "whole", ""),
        "tensor": (2, "tensor", ""),
        "fsdp": (2, "fsdp", ""),
        "tensor-to-one": (1, "whole", "tensor"),
        "fsdp-to-one": (1, "whole", "fsdp"),
        "one-to-tensor": (2, "tensor", "one"),
        "tensor-to-fsdp": (2, "fsdp", "tensor"),
    }
    results = {}
    for name, (processes, way, start) in arms.items():
        out = tmp_path / name
        out.mkdir()
        call(processes, "spread", str(out), way, *([str(tmp_path / start)] if start else []))
        results[name] = torch.load(out / "result")
    logits, gradients = results["one"]
    for name, (ours, grads) in results.items():
        torch.testing.assert_close(ours, logits, atol=1e-5, rtol=0, msg=name)
        assert grads.keys() == gradients.keys()
        # Every process has the same batch, so that FSDP2's mean of their gradients is the gradient.
        for key, gradient in gradients.items():
            assert (grads[key] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, (name, key)
