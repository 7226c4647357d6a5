"""`danlu grpo`: on-policy to rounding, rules learnt, bad rewards named, runs resumed to the bit."""

import html
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from danlu.align.config import GRPOConfig
from danlu.align.estimate import estimate_rollouts
from danlu.align.grpo import Grouped, grpo
from danlu.align.rollouts import RolloutBatch
from danlu.cli import VERBS
from danlu.core.errors import UserError
from danlu.core.files import read_jsonl
from danlu.core.metrics import read_metrics
from danlu.core.options import RunConfig
from danlu.core.runner import run
from danlu.data.config import DataConfig
from danlu.data.documents import to_document, write_documents
from danlu.data.prepare import prepare
from danlu.model.checkpoint import load, save_model
from danlu.model.config import LoraConfig
from danlu.model.lora import add_adapter
from danlu.tokens.loader import Batch
from danlu.train.checkpoint import load_weights_and_moments
from danlu.train.loop import Hooks
from danlu.train.optim import make_optimizer
from danlu.train.step import TrainStep

QUICK: dict[str, Any] = {
    "steps": 3,
    "batch_size": 4,
    "group_size": 6,
    "max_tokens": 12,
    "sequence_length": 96,
    "dtype": "float32",
    "compile": "off",
    "optim": {"lr": 1e-2, "weight_decay": 0.0},
    "schedule": {"name": "constant", "warmup": 0},
    "rewards": [{"regex": "^[a-m ]"}],
}


def config(prompts: Path, chat_model: Path, out: Path, **values: Any) -> GRPOConfig:
    return GRPOConfig(**{"data": prompts, "init_from": chat_model, "out": out, **QUICK, **values})


def started(settings: GRPOConfig, lora: bool = False) -> tuple[Any, Grouped, RolloutBatch]:
    """A policy, its objective, and the first batch that it draws."""
    model = load(str(settings.init_from), dtype=torch.float32)[0]
    if lora:
        torch.manual_seed(0)
        add_adapter(model, LoraConfig(rank=4))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    source = Grouped(settings)
    source.objective(model)
    return model, source, next(source.loader(settings))  # type: ignore[arg-type]


def test_the_plan_knows_how_long_prompts_are(prompts: Path, chat_model: Path, tmp_path: Path) -> None:
    """Not as long as they may be; a broken row is a problem of the plan."""
    settings = config(prompts, chat_model, tmp_path, sequence_length=128)
    drawn = QUICK["steps"] * started(settings)[2].ids.numel()
    assert drawn / 2 <= estimate_rollouts(settings, {}).tokens <= 2 * drawn
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "nobody asks"}\n')
    problems = estimate_rollouts(config(broken, chat_model, tmp_path), {}).problems
    assert [problem for problem in problems if f'{broken}, line 1: no "prompt" in it' in problem]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("updates", [1, 2])
def test_the_first_ratio_is_one(
    updates: int, lora: bool, prompts: Path, chat_model: Path, tmp_path: Path
) -> None:
    """Packed by the trainer, drawn by the engine, with prefixes shared: the same policy to 1e-5."""
    settings = config(prompts, chat_model, tmp_path, updates=updates, kl=0.1)
    model, source, batch = started(settings, lora)
    source.loss(model, batch, float(source.count(batch)))
    assert source.shown["engine_gap"] < 1e-5
    assert source.shown["clipped"] == 0
    if lora:
        assert source.shown["kl"] != 0
    else:
        assert source.shown["kl"] == pytest.approx(0, abs=1e-5)
    n_replies = settings.batch_size * settings.group_size // updates
    assert source.count(batch) == n_replies
    assert batch.weights.sum() > n_replies


def test_every_reply_is_learnt_behind_its_prompt(prompts: Path, chat_model: Path, tmp_path: Path) -> None:
    settings = config(prompts, chat_model, tmp_path)
    _, source, batch = started(settings)
    loader = source.loader(settings)
    batch = next(loader)
    assert isinstance(batch, RolloutBatch)
    found = []
    for row in range(len(batch.ids)):
        for segment in batch.segments[row].unique().tolist():
            if segment >= 0:
                here = batch.segments[row] == segment
                whole = [int(batch.ids[row, here][0]), *batch.targets[row, here].tolist()]
                learnt = int(batch.weights[row, here].sum())
                found.append((whole[:-learnt], whole[-learnt:]))
                assert batch.weights[row, here][-learnt:].all()
                assert len(set(batch.advantages[row, here][-learnt:].tolist())) == 1
    assert sorted(found) == sorted((one.prompt, one.ids) for one in loader.last)


@pytest.mark.parametrize("averaging", ["reply", "token", "length"])
def test_how_a_batch_is_cut_changes_no_gradient(
    averaging: Any, prompts: Path, chat_model: Path, tmp_path: Path
) -> None:
    settings = config(prompts, chat_model, tmp_path, averaging=averaging, kl=0.1)
    model, source, batch = started(settings)
    gradients = []
    for parts in (1, 3):
        step = TrainStep(model, make_optimizer(model, settings.optim), objective=source)
        step.accumulate(batch.split(parts))
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    for whole, cut in zip(*gradients, strict=True):
        torch.testing.assert_close(cut, whole, atol=1e-6, rtol=1e-4)


def test_reinforce_pp_by_loops(prompts: Path, chat_model: Path, tmp_path: Path) -> None:
    """A token's advantage: the reward, less the divergence of what comes from it on, whitened."""
    settings = config(prompts, chat_model, tmp_path, advantage="global", kl=0.1)
    model = load(str(settings.init_from), dtype=torch.float32)[0]
    source = Grouped(settings)
    source.objective(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    loader = source.loader(settings)
    batch = next(loader)
    assert isinstance(batch, RolloutBatch)
    assert source.is_held
    found, expected = [], []
    rewards = {(*one.prompt, *one.ids): one.reward for one in loader.last}
    for row in range(len(batch.ids)):
        for segment in batch.segments[row].unique().tolist():
            here = batch.segments[row] == segment
            if segment < 0:
                continue
            whole = (int(batch.ids[row, here][0]), *batch.targets[row, here].tolist())
            learnt = batch.weights[row, here] > 0
            found += batch.advantages[row, here][learnt].tolist()
            later, own = 0.0, []
            gaps = (batch.engine - batch.reference)[row, here][learnt].tolist()
            for gap in gaps[::-1]:
                later += gap
                own.append(rewards[whole] - 0.1 * later)
            expected += own[::-1]
    mean = sum(expected) / len(expected)
    deviation = (sum((x - mean) ** 2 for x in expected) / (len(expected) - 1)) ** 0.5
    assert found == pytest.approx([(x - mean) / deviation for x in expected], abs=1e-4)


def test_truncated_importance_weights(prompts: Path, chat_model: Path, tmp_path: Path) -> None:
    """Where the engine drew a token with another probability, its loss counts by the ratio, up to the cap."""
    losses = {}
    for cap in (0.0, 1.5):
        settings = config(prompts, chat_model, tmp_path, engine_cap=cap, averaging="token")
        model, source, batch = started(settings)
        gaps = torch.where(torch.arange(batch.weights.shape[1]) % 2 == 0, -1.0, 0.3) * batch.weights
        batch.engine = batch.engine + gaps
        losses[cap] = source.loss(model, batch, float(source.count(batch))).item()
    weights = torch.where(gaps < 0, 1.5, (-gaps).exp())
    n = batch.weights.sum().item()
    assert losses[0] == pytest.approx(-(batch.advantages * batch.weights).sum().item() / n, abs=1e-6)
    expected = -(batch.advantages * weights * batch.weights).sum().item() / n
    assert losses[1.5] == pytest.approx(expected, abs=1e-5)
    assert abs(losses[1.5] - losses[0]) > 1e-3


def test_a_reward_that_is_only_measured(prompts: Path, chat_model: Path, tmp_path: Path) -> None:
    """Of weight 0: it stands beside the sum, and changes nothing."""
    both = [{"regex": "^[a-m ]"}, {"rule": "length", "weight": 0}]
    grpo(config(prompts, chat_model, tmp_path / "one", held_out=0.3))
    grpo(config(prompts, chat_model, tmp_path / "two", held_out=0.3, rewards=both))
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    for ours, theirs in zip(one, two, strict=True):
        for name in ("reward", "held_out_reward"):
            assert theirs.get(name) == ours.get(name)
            assert theirs.get(f"{name}: ^[a-m ]") == pytest.approx(ours[name]) if name in ours else True
    assert all(row["reward: length"] > 0 for row in two if "reward" in row)
    assert any(row.get("held_out_reward: length", 0) > 0 for row in two)


def test_a_run_that_strays_is_stopped(prompts: Path, chat_model: Path, tmp_path: Path) -> None:
    """Its last checkpoint is the result; a run that doesn't stray goes on to its end."""
    values: dict[str, Any] = {"optim": {"lr": 3e-2, "weight_decay": 0.0}, "checkpoint_every": 2}
    settings = config(prompts, chat_model, tmp_path, steps=40, stop_kl=1.0, **values)
    result = grpo(settings)
    rows = [row for row in read_metrics(tmp_path) if "reply_kl" in row]
    assert result.steps < 40
    assert result.steps % 2 == 0
    assert all(row["reply_kl"] <= 1 for row in rows)
    assert "nats from the reference, stop_kl is 1; the model of step" in (tmp_path / "logbook.md").read_text()
    checkpoint = sorted((tmp_path / "checkpoints").iterdir())[-1]
    assert checkpoint.name == f"step-{result.steps:08}"
    other = load(result.model)[0]
    optimizer = make_optimizer(other, settings.optim)
    saved = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    load_weights_and_moments(checkpoint, other, optimizer)
    assert all(torch.equal(saved[name], tensor) for name, tensor in other.state_dict().items())
    calm = grpo(config(prompts, chat_model, tmp_path / "calm", steps=2, stop_kl=100.0))
    assert calm.steps == 2


def test_rewards_that_are_all_alike_end_a_run(prompts: Path, chat_model: Path, tmp_path: Path) -> None:
    result = grpo(config(prompts, chat_model, tmp_path, rewards=[{"regex": "^"}], steps=9, stop_alike=4))
    assert result.steps == 0  # the only checkpoint
    assert (
        "all rewards were alike in 4 rollouts, the last 1: nothing can be learnt"
        in (tmp_path / "logbook.md").read_text()
    )
    assert len([row for row in read_metrics(tmp_path) if "reward" in row]) == 3


def test_a_policy_that_says_nothing(prompts: Path, chat_model: Path, tmp_path: Path) -> None:
    """Its replies are the token that ends them; they are rewarded and learnt from like any other."""
    model, tokenizer = load(str(chat_model), dtype=torch.float32)
    with torch.no_grad():
        model.embedding.weight[tokenizer.eos_id] *= 1e3
        model.embedding.weight[tokenizer.eos_id].abs_()
        for layer in model.layers:
            layer.ffn.down.weight.zero_()
    save_model(model, tmp_path / "mute", tokenizer)
    result = grpo(config(prompts, tmp_path / "mute", tmp_path / "out", steps=2, rewards=[{"rule": "length"}]))
    rows = [row for row in read_metrics(tmp_path / "out") if "reward" in row]
    assert result.steps == 2
    assert all(0 <= row["reward"] < 1 for row in rows)


@pytest.mark.parametrize("advantage", ["group", "centred", "leave_one_out", "global"])
def test_a_rule_is_learnt(advantage: str, prompts: Path, chat_model: Path, tmp_path: Path) -> None:
    """Replies that begin with a letter of the alphabet's first half, for prompts that were held out too."""
    settings = {"advantage": advantage, "steps": 45, "held_out": 0.3}
    result = grpo(config(prompts, chat_model, tmp_path, **settings))
    rows = [row for row in read_metrics(tmp_path) if "reward" in row]
    assert rows[0]["reward"] < 0.6
    assert sum(row["reward"] for row in rows[-5:]) / 5 > 0.9
    assert result.held_out_reward is not None
    assert result.held_out_reward_before is not None
    assert result.held_out_reward > max(0.8, result.held_out_reward_before)


def test_a_run_that_was_cut_resumes_to_the_bit(prompts: Path, chat_model: Path, tmp_path: Path) -> None:
    """Also in the middle of a rollout, whose replies can't be drawn again."""

    class Stop(Hooks):
        def batches(self, index: int, batches: list[Batch]) -> list[Batch]:
            if index == 6:
                raise RuntimeError("killed")
            return batches

    settings: dict[str, Any] = {"steps": 7, "checkpoint_every": 3, "updates": 2, "kl": 0.05}
    whole = grpo(config(prompts, chat_model, tmp_path / "whole", **settings))
    with pytest.raises(RuntimeError, match="killed"):
        grpo(config(prompts, chat_model, tmp_path / "cut", **settings), Stop())
    again = grpo(config(prompts, chat_model, tmp_path / "cut", **settings))
    weights = [load(result.model)[0].state_dict() for result in (whole, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    figures = [
        [
            {k: v for k, v in row.items() if "second" not in k and k not in ("time", "memory")}
            for row in read_metrics(run)
        ]
        for run in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert figures[0] == figures[1]


def test_prompts_of_prepared_conversations(chat_model: Path, tmp_path: Path) -> None:
    """The last reply is the answer; the parts stay what they are."""
    prepare(DataConfig(source="sums", out=tmp_path / "data", held_out=0.3))
    settings = config(tmp_path / "data", chat_model, tmp_path, rewards=[{"rule": "exact_text"}], max_tokens=6)
    prompts = Grouped(settings).prompts
    assert len(prompts.train) + len(prompts.held_out) <= len(prompts.rows) == 20_000
    assert len(prompts.held_out) == 256
    for number in (prompts.train[0], prompts.held_out[0]):
        messages, row, _ = prompts.rows[number]
        a, b = messages[-1]["content"].removesuffix("=").split("+")
        assert int(row["answer"]) == int(a) + int(b)


def test_rows_in_which_nobody_asks_are_left_out_and_counted(
    prompts: Path, chat_model: Path, tmp_path: Path
) -> None:
    talk = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "At the mill."}]
    rows = [{"text": "Nobody answered."}, {"messages": talk}, {"messages": talk[1:]}]
    for part in ("train", "held_out"):
        write_documents(
            (to_document(row, part, part) for row in rows), tmp_path / "data" / f"{part}.jsonl.zst"
        )
    found = Grouped(config(tmp_path / "data", chat_model, tmp_path)).prompts
    assert [row["answer"] for _, row, _ in found.rows] == ["At the mill."] * 2
    assert found.note == "in 4 of 6 rows nobody asks: left out"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_size": 1}, "no others to be compared with"),
        ({"stop_loss": 0.5}, "no held-out loss is measured"),
        ({"rewards": []}, "no reward is given"),
        ({"sequence_length": 20}, "no prompt to learn from; 24 are longer than 8 tokens"),
    ],
)
def test_what_can_t_be_trained_is_said(
    values: Any, message: str, prompts: Path, chat_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        grpo(config(prompts, chat_model, tmp_path, **values))


def test_prompts_without_room_are_left_out_and_counted(
    prompts: Path, chat_model: Path, tmp_path: Path
) -> None:
    long = {"prompt": "Where is the fox? " * 40}
    data = tmp_path / "prompts.jsonl"
    data.write_text(prompts.read_text() + 3 * (json.dumps(long) + "\n"))
    settings = config(data, chat_model, tmp_path / "out", steps=1)
    grpo(settings)
    assert Grouped(settings).prompts.left_out == 3
    assert "3 of 27 prompts leave no room" in (tmp_path / "out" / "logbook.md").read_text()


def test_prompts_that_are_none(chat_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    for row, message in (
        ({"text": "a"}, 'line 1: no "prompt" in it'),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, "nobody asks in it"),
    ):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=message):
            grpo(config(path, chat_model, tmp_path / "out"))


def test_a_run_is_reported(
    prompts: Path, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies to held-out prompts, before and after; how often the later one wins; the page of it."""
    monkeypatch.chdir(tmp_path)
    options = {**QUICK, "steps": 30, "held_out": 0.3, "stop_kl": 100.0}
    stage = {
        "name": "grpo",
        "verb": "grpo",
        "options": {**options, "data": str(prompts), "init_from": str(chat_model)},
    }
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump({"name": "small", "seed": 1, "stages": [stage]}))
    run(RunConfig(recipe=str(recipe)), VERBS)
    out = tmp_path / "runs" / "small" / "grpo"
    rows = read_jsonl(out / "held_out.jsonl")
    before, after = ([row for row in rows if row["step"] == step] for step in (0, 30))
    assert [row["prompt"] for row in before] == [row["prompt"] for row in after]
    wins = sum(
        (b["reward"] > a["reward"]) + 0.5 * (b["reward"] == a["reward"])
        for a, b in zip(before, after, strict=True)
    )
    found = [row for row in read_metrics(out) if "wins" in row][-1]
    assert found["wins"] == pytest.approx(wins / len(before))
    assert found["wins_low"] < found["wins"] < found["wins_high"]
    page = (tmp_path / "runs" / "small" / "report.html").read_text()
    assert "Before and after" in page
    assert f"<strong>{100 * found['wins']:.1f} %</strong>" in page
    assert html.escape(after[0]["reply"].strip()[:20]) in page
    assert "Reward of grpo over the divergence" in page
