"""`danlu plan`: its numbers by brute force, and what it finds wrong before anything runs."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from toy_verbs import VERBS as TOYS

from danlu.cli import VERBS
from danlu.core import device, plan
from danlu.core.config import make_config, read_yaml
from danlu.core.options import PlanConfig, RunConfig
from danlu.core.plan import IMPORTS_BYTES, Plan, show
from danlu.core.recipe import RECIPES
from danlu.core.runner import run
from danlu.core.verbs import Verb
from danlu.model.config import ModelConfig
from danlu.model.transformer import Transformer
from danlu.train import estimate

MACHINE = device.Machine("cpu", "A Chip", 2, 8 * 10**9, True, 1000.0, 250.0)


@pytest.fixture(autouse=True)
def chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known machine."""
    for module in (plan, estimate):
        monkeypatch.setattr(module, "machine", lambda: MACHINE)
    monkeypatch.setattr("danlu.core.device.has_native_bf16", lambda device: True)
    monkeypatch.setattr(plan.host, "available_memory_bytes", lambda: 6 * 10**9)


def make(recipe: Path | str, verbs: list[Verb] = VERBS, **options: Any) -> Plan:
    return plan.plan(make_config(PlanConfig, {"recipe": str(recipe), **options}), verbs)


def test_sums_are_over_what_is_still_to_do(recipe: Any) -> None:
    path = recipe()
    made = make(path, TOYS)
    # The toys: `write` 10 tokens, 1 s, 1 kB; `train` 4 steps of 5 tokens and 1 s; `join` says nothing.
    assert [stage.tokens for stage in made.stages] == [10, 10, 0, 20]
    assert made.tokens == 40
    assert made.seconds == 1 + 1 + 4
    assert made.flops == 6e9
    assert made.memory_bytes == 1000 + IMPORTS_BYTES
    assert made.problems == []
    assert not Path("runs").exists()
    run(make_config(RunConfig, {"recipe": str(path)}), TOYS)
    made = make(path, TOYS, overrides=["model.steps=7"])
    assert [stage.runs for stage in made.stages] == [False, False, False, True]
    assert (made.tokens, made.seconds) == (35, 7)
    assert make(path, TOYS).memory_bytes == 0


def test_memory_that_is_not_there_is_a_problem(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(recipe(), TOYS, overrides=["model.steps=2000"])
    assert made.problems == ["model: needs about 1,000 TB of memory, 6 GB are free now"]
    show(made, TOYS)
    assert f"won't work: {made.problems[0]}" in capsys.readouterr().out


def options_of(stage: str) -> dict[str, Any]:
    stages = read_yaml(RECIPES / "quickstart.yaml")["stages"]
    return next(s["options"] for s in stages if s["name"] == stage)


def test_the_shipped_recipe_by_brute_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = make("quickstart")
    stages = {stage.stage: stage for stage in made.stages}
    assert made.problems == []
    sizes = ModelConfig(**options_of("pretrain")["model"])
    model = Transformer(sizes)
    # Every token is multiplied with every matrix; the embedding is the head, the norms are no product.
    n = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    for name in ("pretrain", "chat"):
        options = options_of(name)
        length = options["sequence_length"]
        tokens = options["steps"] * options["batch_size"] * length
        assert stages[name].tokens == tokens
        flops = tokens * (6 * n + 6 * sizes.n_layers * sizes.width * length)
        assert stages[name].flops == pytest.approx(flops)
        seconds = flops / (1000e9 * estimate.UTILISATION)
        assert seconds < stages[name].seconds < seconds + 10
        state = 4 * sum(p.numel() for p in model.parameters())
        assert stages[name].memory_bytes > IMPORTS_BYTES + 3 * state  # weights, gradients, moments
    assert made.seconds == pytest.approx(sum(stage.seconds for stage in made.stages))
    assert not Path("runs").exists()


def test_predicted_and_counted_parameters_are_the_same(tiny: Path) -> None:
    values = read_yaml(tiny / "runs/tiny/pretrain/config.yaml")
    verb = next(verb for verb in VERBS if verb.name == "pretrain")
    config = make_config(verb.load_config(), values | {"data": str(tiny / "runs/tiny/text-tokens")})
    predicted = verb.run_estimate(config, {}).outputs["parameters"]
    result = json.loads((tiny / "runs/tiny/pretrain/result.json").read_text())
    assert predicted == result["parameters"]


def test_predicted_tokens_are_those_that_were_trained_on(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny)
    made = make("tiny.yaml", runs="elsewhere")
    for stage in made.stages:
        result = json.loads((tiny / "runs/tiny" / stage.stage / "result.json").read_text())
        if stage.verb in ("pretrain", "sft"):
            assert stage.tokens == result["tokens"]
        assert stage.why in ("not run yet",) or stage.why.startswith("reads ")
    assert all(not stage.runs for stage in make("tiny.yaml").stages)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("pretrain.batch_size=4096", "pretrain: needs about "),
        ("pretrain.model.n_layers=2000", "pretrain: needs about "),
        ("pretrain.sequence_length=1024", "pretrain: sequence_length 1024 is beyond max_positions 512"),
        ("pretrain.model.vocab_size=5000", "pretrain: model.vocab_size is 5000, the tokenizer has 4096"),
    ],
)
def test_what_will_not_work_is_said_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    problems = make("quickstart", overrides=[change]).problems
    assert any(problem.startswith(expected) for problem in problems), problems


def test_compiling_without_a_compiler_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("danlu.model.compiling.has_compiler", lambda: False)
    (problem,) = make("quickstart", overrides=["chat.compile=on"]).problems
    assert problem.startswith("chat: compile is on, and no C++ compiler is found")


def test_a_slower_machine_takes_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    times = {}
    for gflops in (1000.0, 100.0):
        slower = device.Machine("cpu", "A Chip", 2, 8 * 10**9, True, gflops, gflops / 4)
        monkeypatch.setattr(estimate, "machine", lambda slower=slower: slower)
        times[gflops] = make("quickstart").stages[4].seconds
    assert 8 < times[100.0] / times[1000.0] <= 10


def test_the_plan_is_shown(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny)
    made = make("tiny.yaml", overrides=["chat.steps=1000"])
    show(made, VERBS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny on A Chip, 2 cores: 1,000 GFLOP/s in bfloat16, 250 in float32, 6 GB")
    row = {
        line.split("│")[1].strip(): [c.strip() for c in line.split("│")[1:-1]]
        for line in lines
        if "│" in line
    }
    assert row["chat"][2] == f"{1000 * 4 * 64:,}"
    assert row["chat"][-1] == "steps 10 → 1000"
    assert row["pretrain"][-1] == "done"
    assert row["to do"][2] == f"{made.tokens:,}"
    assert made.memory_bytes < psutil.virtual_memory().total
