import errno
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp

from danlu.core.errors import UserError
from danlu.train.checkpoint import Checkpointer, random_state, set_random_state


class Small:
    """A model and its optimiser that can be trained by random batches."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=True)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.model(torch.randn(16, 4)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def bits(self) -> list[bytes]:
        state = self.optimizer.state_dict()["state"]
        tensors = [
            *self.model.state_dict().values(),
            *(t for moments in state.values() for t in moments.values()),
        ]
        return [t.detach().numpy().tobytes() for t in tensors]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpointer]:
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep=2)
    yield checkpointer
    checkpointer.close()


def test_training_on_from_a_checkpoint_is_exact_to_the_bit(checkpoints: Checkpointer) -> None:
    one = Small(0)
    one.train(5)
    checkpoints.save(5, one.model, one.optimizer, {"random": random_state()})
    one.train(5)  # while the checkpoint is being written: the snapshot must not see it
    other = Small(1)
    assert checkpoints.steps() == [5]
    checkpoints.load(5, other.model, other.optimizer)
    set_random_state(checkpoints.read_state(5)["random"])
    other.train(5)
    assert other.bits() == one.bits()


def test_random_state_covers_python_numpy_and_torch(checkpoints: Checkpointer) -> None:
    def draw() -> tuple[Any, ...]:
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.randn(),
            torch.rand(3).tolist(),
        )

    draw()
    small = Small(0)
    checkpoints.save(1, small.model, small.optimizer, {"random": random_state()})
    expected = draw(), draw()
    set_random_state(checkpoints.read_state(checkpoints.steps()[0])["random"])
    assert (draw(), draw()) == expected


def test_keeps_the_newest_and_ignores_what_is_incomplete(checkpoints: Checkpointer) -> None:
    small = Small(0)
    small.train(1)
    for step in (10, 20, 30):
        checkpoints.save(step, small.model, small.optimizer, {})
    assert checkpoints.steps() == [20, 30]
    shutil.copytree(checkpoints.folder / "step-00000030", checkpoints.folder / ".step-00000040.tmp")
    again = Checkpointer(checkpoints.folder, keep=2)
    assert again.steps() == [20, 30]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000020", "step-00000030"]


def test_going_back_removes_the_newer_ones(checkpoints: Checkpointer) -> None:
    small = Small(0)
    checkpoints.save(10, small.model, small.optimizer, {})
    checkpoints.save(20, small.model, small.optimizer, {})
    checkpoints.discard_after(10)
    assert checkpoints.steps() == [10]


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 704 vs 598")]
)
def test_a_disk_that_fills_in_the_background_is_not_lost(
    checkpoints: Checkpointer, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    """torch wraps a full disk into errors of its own; what tells is the space left."""
    small = Small(0)
    checkpoints.save(10, small.model, small.optimizer, {})
    checkpoints.wait()

    def fail(*args: object) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0))
        raise fault

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", fail)
    checkpoints.save(20, small.model, small.optimizer, {})
    with pytest.raises(UserError, match="disk is full"):
        checkpoints.wait()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000010"]


def test_too_little_space_is_said_before_writing(
    checkpoints: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Small(0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))
    with pytest.raises(UserError, match="disk is full"):
        checkpoints.save(10, small.model, small.optimizer, {})


def test_another_number_of_processes_is_refused(checkpoints: Checkpointer) -> None:
    small = Small(0)
    checkpoints.save(10, small.model, small.optimizer, {})
    path = checkpoints.folder / "step-00000010" / "state.json"
    checkpoints.wait()
    path.write_text('{"step": 10, "processes": [{}, {}]}')
    with pytest.raises(UserError, match="2 processes"):
        checkpoints.read_state(10)
