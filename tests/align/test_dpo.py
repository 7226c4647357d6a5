"""`danlu dpo`: what is packed counts as if it stood alone, references stay, rules are learnt, runs resume."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from danlu.align.config import DPOConfig
from danlu.align.dpo import Judged, PreferencePairs, dpo, make_objective
from danlu.align.replies import replies_of
from danlu.core.errors import UserError
from danlu.core.metrics import read_metrics
from danlu.model.checkpoint import load
from danlu.model.config import LoraConfig
from danlu.model.lora import add_adapter
from danlu.model.transformer import Transformer
from danlu.tokens.loader import Batch, PackedLoader
from danlu.tokens.shards import Shards
from danlu.train.optim import make_optimizer
from danlu.train.step import TrainStep

QUICK: dict[str, Any] = {
    "steps": 30,
    "batch_size": 4,
    "sequence_length": 128,
    "dtype": "float32",
    "compile": "off",
    "optim": {"lr": 3e-3, "weight_decay": 0.0},
}


def config(preferences: Path, chat_model: Path, out: Path, **values: Any) -> DPOConfig:
    return DPOConfig(**{"data": preferences, "init_from": chat_model, "out": out, **QUICK, **values})


def one_batch(preferences: Path, size: int = 6) -> Batch:
    return next(PackedLoader(Shards(preferences / "train"), size, 128, seed=3))


def test_packed_replies_count_as_if_alone(preferences: Path, chat_model: Path, tmp_path: Path) -> None:
    """Log-probabilities of each reply by a pass of its own; pairs by going through them."""
    model = load(chat_model, dtype=torch.float32)[0]
    batch = one_batch(preferences)
    objective = PreferencePairs(model, config(preferences, chat_model, tmp_path, loss="simpo"))
    pairs = objective._pairs(model, batch)
    alone: list[tuple[int, int, int, float, int]] = []
    for row in range(len(batch.ids)):
        for segment in batch.segments[row].unique().tolist():
            if segment < 0:
                continue
            here = batch.segments[row] == segment
            logs = model(batch.ids[row, here][None])[0].log_softmax(-1)
            chosen = logs.gather(1, batch.targets[row, here][:, None])[:, 0]
            learnt = batch.weights[row, here] > 0
            alone.append((row, segment // 64, segment % 64, chosen[learnt].sum().item(), int(learnt.sum())))
    expected = [(a[3], b[3], a[4], b[4]) for a in alone for b in alone if a[:2] == b[:2] and a[2] < b[2]]
    assert len(expected) == int(objective.count(batch)) == len(pairs.chosen) > 5
    found = torch.stack([pairs.chosen, pairs.rejected, pairs.chosen_tokens, pairs.rejected_tokens], 1)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-3, rtol=1e-5)
    assert max(replies_of(batch).rank) == 2


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_is_the_model_before(
    lora: bool, preferences: Path, chat_model: Path, tmp_path: Path
) -> None:
    """At first the loss is log 2; when the policy has moved, the reference has not."""
    model = load(chat_model, dtype=torch.float32)[0]
    if lora:
        add_adapter(model, LoraConfig(rank=4))
    objective = PreferencePairs(model, config(preferences, chat_model, tmp_path))
    batch = one_batch(preferences)
    before = objective._pairs(model, batch)
    loss = objective.loss(model, batch, float(objective.count(batch)))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    after = objective._pairs(model, batch)
    assert (after.chosen - before.chosen).abs().max() > 0.1
    torch.testing.assert_close(after.ref_chosen, before.chosen.detach())
    torch.testing.assert_close(after.ref_rejected, before.rejected.detach())


@pytest.mark.parametrize("loss", ["dpo", "orpo", "kto"])
def test_how_a_batch_is_cut_changes_no_gradient(
    loss: Any, preferences: Path, chat_model: Path, tmp_path: Path
) -> None:
    def gradients(parts: int) -> list[torch.Tensor]:
        model = load(chat_model, dtype=torch.float32)[0]
        objective = make_objective(model, config(preferences, chat_model, tmp_path, loss=loss))
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        step = TrainStep(model, make_optimizer(model, objective.config.optim), objective=objective)
        step.accumulate(one_batch(preferences).split(parts))
        return [p.grad for p in model.parameters() if p.grad is not None]

    for whole, cut in zip(gradients(1), gradients(6), strict=True):
        torch.testing.assert_close(cut, whole, atol=1e-6, rtol=1e-4)


def test_kto_by_loops(preferences: Path, chat_model: Path, tmp_path: Path) -> None:
    """Its divergence from replies behind the next prompt of their sequence, and the loss of each reply."""
    model = load(chat_model, dtype=torch.float32)[0]
    settings = config(preferences, chat_model, tmp_path, loss="kto", numbers={"beta": 0.3, "bad_weight": 1.5})
    objective = Judged(model, settings)
    reference = objective.reference
    assert reference is not None
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():  # and not the policy: the estimate is to be above 0
            parameter.add_(torch.randn_like(parameter) * 0.05)
    batch = next(PackedLoader(Shards(preferences / "train"), 3, 256, seed=3))

    def log_ratio(prompt: list[int], reply: list[int]) -> float:
        ids = torch.tensor([[*prompt, *reply]])
        found = []
        for which in (model, reference):
            logs = which(ids[:, :-1])[0].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            found.append(float(logs[len(prompt) - 1 :].sum()))
        return found[0] - found[1]

    own: list[tuple[bool, float]] = []
    crossed: list[float] = []
    with torch.no_grad():
        for row in range(len(batch.ids)):
            first: dict[int, tuple[list[int], list[int]]] = {}
            for segment in sorted(set(batch.segments[row].tolist()) - {-1}):
                places = [t for t in range(batch.ids.shape[1]) if batch.segments[row, t] == segment]
                learnt = [t for t in places if batch.weights[row, t] > 0]
                prompt = batch.ids[row, places[0] : learnt[0] + 1].tolist()
                reply = batch.targets[row, learnt[0] : learnt[-1] + 1].tolist()
                own.append((segment % 64 == 0, log_ratio(prompt, reply)))
                first.setdefault(segment // 64, (prompt, reply))
            inside = list(first.values())
            if len(inside) > 1:
                crossed += [
                    log_ratio(inside[(n + 1) % len(inside)][0], reply) for n, (_, reply) in enumerate(inside)
                ]
    kl = max(0.0, sum(crossed) / len(crossed))
    assert kl > 0
    expected = [
        (1.0 if good else 1.5) * (1 - 1 / (1 + math.exp((-1 if good else 1) * 0.3 * (ratio - kl))))
        for good, ratio in own
    ]
    loss = objective.loss(model, batch, float(objective.count(batch)))
    assert objective._kl == pytest.approx(kl, abs=1e-3)
    assert loss.item() == pytest.approx(sum(expected) / len(expected), abs=1e-4)


@pytest.mark.parametrize(
    ("loss", "numbers"),
    [
        ("dpo", {"beta": 0.3}),
        ("dpo", {"beta": 0.3, "label_smoothing": 0.1}),
        ("ipo", {"beta": 0.3}),
        ("simpo", {"beta": 2.0}),
        ("orpo", {"beta": 0.5}),
        ("kto", {"beta": 0.3}),
    ],
    ids=["dpo", "cdpo", "ipo", "simpo", "orpo", "kto"],
)
def test_a_rule_is_learnt(
    loss: str, numbers: Any, preferences: Path, chat_model: Path, tmp_path: Path
) -> None:
    """On prompts that the model has not seen."""
    steps = 60 if loss == "orpo" else 30  # which learns the replies at the same time
    result = dpo(config(preferences, chat_model, tmp_path, loss=loss, numbers=numbers, steps=steps))
    assert result.accuracy is not None
    assert result.accuracy > 0.9
    assert result.held_out_loss is not None
    assert result.held_out_loss_before is not None
    assert result.held_out_loss < result.held_out_loss_before
    rows = [row for row in read_metrics(tmp_path) if "reward_margin" in row]
    assert rows[-1]["reward_margin"] > rows[0]["reward_margin"]
    assert isinstance(load(result.model)[0], Transformer)


def test_a_run_that_was_cut_resumes_to_the_bit(preferences: Path, chat_model: Path, tmp_path: Path) -> None:
    """Its reference is the model before the run, not the one that it resumes with."""
    from danlu.train.loop import Hooks

    class Stop(Hooks):
        def batches(self, index: int, batches: list[Batch]) -> list[Batch]:
            if index == 9:
                raise RuntimeError("killed")
            return batches

    settings: dict[str, Any] = {"steps": 12, "checkpoint_every": 4}
    whole = dpo(config(preferences, chat_model, tmp_path / "whole", **settings))
    with pytest.raises(RuntimeError, match="killed"):
        dpo(config(preferences, chat_model, tmp_path / "cut", **settings), Stop())
    again = dpo(config(preferences, chat_model, tmp_path / "cut", **settings))
    weights = [load(result.model)[0].state_dict() for result in (whole, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert whole.held_out_loss == again.held_out_loss


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parallel": "fsdp"}, "its reference isn't spread"),
        ({"sequence_length": 8}, "within sequence_length 8"),
    ],
)
def test_what_can_t_be_trained_is_said(
    values: Any, message: str, preferences: Path, chat_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        dpo(config(preferences, chat_model, tmp_path, **values))
