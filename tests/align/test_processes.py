"""Two processes are the same run as one, and a run that is killed ends as one that wasn't."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from danlu.core.metrics import read_metrics

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("processes_worker.py")
RL: dict[str, Any] = {
    "steps": 8,
    "batch_size": 4,
    "group_size": 4,
    "updates": 2,
    "max_tokens": 12,
    "sequence_length": 96,
    "dtype": "float32",
    "compile": "off",
    "held_out": 0.3,
    "eval_every": 4,
    "checkpoint_every": 4,
    "kl": 0.05,
    "optim": {"lr": 1e-3, "weight_decay": 0.0},
    "schedule": {"name": "constant", "warmup": 0},
    "rewards": [{"regex": "^[a-m ]"}],
}


def start(processes: int, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*command, str(WORKER), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def call(processes: int, *arguments: str) -> None:
    process = start(processes, *arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


LOSSES: list[tuple[str, dict[str, Any]]] = [
    ("reward", {}),
    ("reward", {"weighting": "ranking", "centre": 0.1}),
    *(("dpo", {"loss": loss}) for loss in ("dpo", "ipo", "simpo", "orpo", "kto")),
]


def test_gradients_of_preferences_however_they_are_cut(
    preferences: Path, chat_model: Path, tmp_path: Path
) -> None:
    """Of each loss: accumulated, in two processes, and both."""
    settings = {"data": str(preferences), "init_from": str(chat_model), "out": str(tmp_path), "batch_size": 8}
    found = {}
    for name, processes, accumulate in (
        ("whole", 1, 1),
        ("parts", 1, 4),
        ("processes", 2, 1),
        ("both", 2, 2),
    ):
        cut = {**settings, "sequence_length": 256, "accumulate": accumulate}
        runs = [(verb, {**cut, **options}) for verb, options in LOSSES]
        call(processes, "gradients", str(tmp_path / name), json.dumps(runs))
        found[name] = torch.load(tmp_path / name)
    for number, loss in enumerate(LOSSES):
        whole = torch.cat([g.flatten() for g in found["whole"][number]])
        assert whole.norm() > 0
        for name in ("parts", "processes", "both"):
            other = torch.cat([g.flatten() for g in found[name][number]])
            assert (other - whole).norm() <= 2e-6 * whole.norm(), (loss, name)


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("grpo", {}),
        ("grpo", {"advantage": "global"}),
        ("ppo", {"whiten_rewards": True, "kl_target": 0.5}),
        ("ppo", {"reference_decay": 0.8, "pretraining": "text"}),
    ],
    ids=str,
)
def test_two_processes_draw_and_learn_as_one(
    verb: str,
    options: dict[str, Any],
    prompts: Path,
    chat_model: Path,
    text_tokens: Path,
    tmp_path: Path,
) -> None:
    """Each draws replies to its part of the prompts and learns from its part of them; one in parts."""
    curves = []
    if "pretraining" in options:
        options = {**options, "pretraining": str(text_tokens)}
    for processes, accumulate in ((1, 2), (2, 1)):
        out = tmp_path / str(processes)
        settings = {"data": str(prompts), "init_from": str(chat_model), "out": str(out), **RL, **options}
        call(processes, verb, json.dumps({**settings, "accumulate": accumulate}))
        curves.append(read_metrics(out))
    one, two = curves
    assert [row["step"] for row in one] == [row["step"] for row in two]
    assert any("held_out_reward" in row for row in one)
    for ours, theirs in zip(one, two, strict=True):
        timed = {key for key in ours if "second" in key} | {"time", "memory", "tokens", "engine_gap"}
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - timed:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-3, abs=2e-5), (ours["step"], key)


@pytest.mark.parametrize("processes", [1, 2])
def test_ppo_that_is_killed_ends_with_the_same_bytes(
    processes: int, prompts: Path, chat_model: Path, text_tokens: Path, tmp_path: Path
) -> None:
    """After some steps, at a random moment within one, within a rollout too: two updates are made of one."""
    options = {"steps": 12, "checkpoint_every": 3, "eval_every": 8, "kl_target": 0.5}
    options |= {"reference_decay": 0.8, "pretraining": str(text_tokens)}
    settings = {"data": str(prompts), "init_from": str(chat_model), **RL, **options}

    def arguments(name: str) -> list[str]:
        return ["ppo", json.dumps({**settings, "out": str(tmp_path / name)})]

    def steps() -> int:
        log = tmp_path / "killed" / "metrics.jsonl"
        return log.read_text(encoding="utf-8").count('"loss"') if log.exists() else 0

    call(processes, *arguments("whole"))
    chance, kills = random.Random(0), 0
    while True:
        process = start(processes, *arguments("killed"))
        wanted = steps() + chance.randint(1, 4)
        while process.poll() is None and steps() < wanted:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.2))  # somewhere within a step
        if process.poll() is not None:
            assert process.returncode == 0, process.communicate()[1]
            break
        for child in children(process.pid):
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.communicate()
        kills += 1
    assert kills > 0
    hashes = [
        hashlib.sha256((tmp_path / name / "model" / "model.safetensors").read_bytes()).hexdigest()
        for name in ("whole", "killed")
    ]
    assert hashes[0] == hashes[1]


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]
