"""Killed with SIGKILL at ten random moments and resumed, a run ends with the same bytes."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from danlu.core.metrics import read_metrics

pytestmark = pytest.mark.slow

STEPS = 60
THREADS = "2"
CHILD = """
import json, sys
from danlu.train.config import TrainConfig
from danlu.train.pretrain import pretrain
pretrain(TrainConfig.model_validate(json.loads(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def busy_machine() -> Iterator[None]:
    """Another process that loads every core meanwhile."""
    spin = "import torch; a = torch.randn(600, 600)\nwhile True: a @ a"
    process = subprocess.Popen([sys.executable, "-c", spin], env={**os.environ, "OMP_NUM_THREADS": THREADS})
    yield
    process.kill()
    process.wait()


def start(data: Path, out: Path, cache: Path) -> subprocess.Popen[bytes]:
    """A short run with the shipped settings, in a process of its own."""
    model = {"vocab_size": 300, "width": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "ffn_width": 128}
    config = {
        "data": str(data),
        "out": str(out),
        "model": {**model, "max_positions": 64},
        "steps": STEPS,
        "sequence_length": 64,
        "checkpoint_every": 3,
        "eval_every": 9,
        "sample_every": 20,
        "sample_prompts": ["It was"],
        "compile": "on",  # what auto chooses for every run that isn't as short as this one
    }
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": THREADS}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(config)], env=environment, stderr=subprocess.DEVNULL
    )


def finish(data: Path, out: Path, cache: Path) -> str:
    """Runs to the end; the hash of the final weights."""
    assert start(data, out, cache).wait() == 0
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


def steps_done(out: Path) -> int:
    return max((row["step"] for row in read_metrics(out)), default=0)


def in_a_step(out: Path, start_step: int) -> bool:
    return steps_done(out) > start_step + 1


def in_a_write(out: Path, start_step: int) -> bool:
    return steps_done(out) > start_step and any((out / "checkpoints").glob(".step-*.tmp"))


def in_an_evaluation(out: Path, start_step: int) -> bool:
    """The checkpoint is written just before the evaluation starts."""
    step = steps_done(out)
    return step > start_step and step % 9 == 0


MOMENTS: list[Callable[[Path, int], bool]] = [in_a_step, in_a_write, in_an_evaluation]


def kill_at(moment: Callable[[Path, int], bool], delay: float, data: Path, out: Path, cache: Path) -> bool:
    """Kills the run at `moment`; False when it ended before."""
    before = steps_done(out)
    process = start(data, out, cache)
    while process.poll() is None:
        if moment(out, before):
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            return process.wait() == -signal.SIGKILL
        time.sleep(0.001)
    return False


@pytest.mark.parametrize("warm", [True, False], ids=["warm compile cache", "cold compile cache"])
def test_killed_and_resumed_equals_never_stopped(
    warm: bool, text_tokens: Path, tmp_path: Path, busy_machine: None
) -> None:
    cache = tmp_path / "cache"
    expected = finish(text_tokens, tmp_path / "whole", cache)
    chance = random.Random(warm)
    kills = 0
    for number in range(5):
        used = cache if warm else tmp_path / f"cache-{number}"
        moment = MOMENTS[number % len(MOMENTS)]
        kills += kill_at(moment, chance.uniform(0, 0.02), text_tokens, tmp_path / "killed", used)
    assert kills >= 4, "the run was over before it could be killed: make it longer"
    last = cache if warm else tmp_path / "cache-last"
    assert finish(text_tokens, tmp_path / "killed", last) == expected
