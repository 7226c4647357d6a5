"""What a stage costs, and the commands that are written down."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_verbs import VERBS

from danlu.core import stage
from danlu.core.config import make_config
from danlu.core.options import RunConfig
from danlu.core.runner import run
from danlu.core.stage import as_json, command_line

LINEAGE = Path("runs/toy/model/lineage.json")


def test_time_and_memory_are_counted_over_an_interruption(recipe, monkeypatch) -> None:
    path = str(recipe())
    now, peak = [0.0], [500]
    monkeypatch.setattr(stage.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stage.host, "peak_rss_bytes", lambda: peak[0])
    verb = next(verb for verb in VERBS if verb.name == "train")
    train = verb.load_function()

    def slow(config):
        now[0] += 100
        return train(config)

    monkeypatch.setattr("toy_verbs.train", slow)
    config = make_config(RunConfig, {"recipe": path, "overrides": ["model.stop_at=2"]})
    with pytest.raises(KeyboardInterrupt):
        run(config, VERBS)
    interrupted = json.loads(LINEAGE.read_text())
    assert (interrupted["seconds"], interrupted["peak_memory_bytes"]) == (100, 500)
    peak[0] = 300
    result = run(config, VERBS)
    assert result.stages[-1].seconds == 100  # of this call
    done = json.loads(LINEAGE.read_text())
    assert (done["seconds"], done["peak_memory_bytes"]) == (200, 500)
    assert done["started"] == interrupted["started"]
    # From scratch, nothing of it counts.
    run(make_config(RunConfig, {"recipe": path, "from": "model"}), VERBS)
    assert json.loads(LINEAGE.read_text())["seconds"] == 100


def test_freed_memory_that_was_kept_is_given_back() -> None:
    """In a process of its own: the allocator's settings hold for all of it."""
    code = """
import psutil
from danlu.core.allocator import give_back_freed_memory, keep_freed_memory
assert keep_freed_memory()
resident = lambda: psutil.Process().memory_info().rss
before = resident()
blocks = [bytearray(10_000_000) for _ in range(20)]
del blocks
kept = resident() - before
give_back_freed_memory()
print(kept, resident() - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("glibc's allocator is Linux's")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept > 150_000_000
    assert left < 20_000_000


@pytest.mark.parametrize(
    ("program", "world", "expected"),
    [
        ("/some/where/danlu", {}, "/some/where/danlu run 'my recipe.yaml'"),
        ("/lib/danlu/cli.py", {}, "python -m danlu.cli run 'my recipe.yaml'"),
        (
            "/lib/danlu/cli.py",
            {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
            "torchrun --nproc-per-node 4 -m danlu.cli run 'my recipe.yaml'",
        ),
    ],
)
def test_the_command_can_be_typed_again(monkeypatch, program, world, expected) -> None:
    monkeypatch.setattr(sys, "argv", [program, "run", "my recipe.yaml"])
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    assert command_line() == expected
    assert command_line(["doctor"]).endswith(" doctor")


def test_a_danlu_on_the_path_is_called_by_its_name(monkeypatch, tmp_path) -> None:
    program = tmp_path / "danlu"
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "argv", [str(program), "doctor"])
    assert command_line() == "danlu doctor"


def test_results_become_json_and_what_is_not_finite_is_null() -> None:
    import numpy as np
    import torch

    values = {
        "path": Path("a/b"),
        "nan": float("nan"),
        "numpy": np.float32(0.5),
        "torch": torch.tensor(3),
        "tuple": (1, float("inf")),
    }
    expected = {"path": "a/b", "nan": None, "numpy": 0.5, "torch": 3, "tuple": [1, None]}
    assert as_json(values) == expected
