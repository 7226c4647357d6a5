"""`danlu ppo`: its whole loss by loops in float64, on-policy to rounding, rules learnt, runs resumed."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from danlu.align.config import PPOConfig
from danlu.align.ppo import Critic, ppo
from danlu.align.rewards import RULES
from danlu.align.rollouts import Drawn, RolloutBatch
from danlu.core.errors import UserError
from danlu.core.metrics import read_metrics
from danlu.data.config import DataConfig
from danlu.data.prepare import prepare
from danlu.model.checkpoint import load
from danlu.tokens.bpe import train_tokenizer
from danlu.tokens.config import TokenizeConfig, TokenizerConfig
from danlu.tokens.loader import Batch
from danlu.tokens.tokenize import tokenize
from danlu.train.loop import Hooks

QUICK: dict[str, Any] = {
    "steps": 4,
    "batch_size": 16,
    "updates": 2,
    "max_tokens": 12,
    "sequence_length": 96,
    "dtype": "float32",
    "compile": "off",
    "optim": {"lr": 1e-2, "weight_decay": 0.0},
    "schedule": {"name": "constant", "warmup": 0},
    "rewards": [{"regex": "^[a-m ]"}],
}


def config(prompts: Path, chat_model: Path, out: Path, **values: Any) -> PPOConfig:
    return PPOConfig(**{"data": prompts, "init_from": chat_model, "out": out, **QUICK, **values})


def rolled_out(settings: PPOConfig) -> tuple[Any, Critic, list[RolloutBatch], list[Drawn]]:
    """A policy that has moved away from its reference, with a value head that says something.

    Its replies, which would hardly ever end by themselves, are cut to different lengths.
    """
    model = load(str(settings.init_from), dtype=torch.float32)[0]
    source = Critic(settings)
    source.objective(model)
    draw = source.drawer.draw

    def cut(*asked: Any) -> list[Drawn]:
        return [
            replace(one, ids=one.ids[: 3 + place % 9], log_probs=one.log_probs[: 3 + place % 9])
            for place, one in enumerate(draw(*asked))
        ]

    source.drawer.draw = cut  # type: ignore[method-assign]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        torch.nn.init.normal_(model.score.weight, std=0.2)
    loader = source.loader(settings)
    batches = [next(loader) for _ in range(settings.updates)]
    return model, source, batches, loader.last  # type: ignore[return-value]


def by_loops(
    settings: PPOConfig, model: Any, source: Critic, drawn: list[Drawn], share: list[Drawn], changed: Any
) -> Any:
    """The loss of `share` after the policy has become `changed`, reply by reply and token by token.

    A float64 scalar with a gradient for the weights of `changed`.
    """

    def look_with_gradient(which: Any, one: Drawn) -> tuple[list[Any], list[Any]]:
        ids = torch.tensor([[*one.prompt, *one.ids]])
        double = which.double()
        hidden = double.hidden(ids[:, :-1])
        logs = double.logits(hidden)[0].log_softmax(-1)
        first = len(one.prompt) - 1
        chosen = [logs[t, ids[0, t + 1]] for t in range(first, ids.shape[1] - 1)]
        values = list(double.score(hidden[0])[:, 0]) if double.score is not None else [0.0] * len(logs)
        return chosen, values[first:]

    def look(which: Any, one: Drawn) -> tuple[list[float], list[float]]:
        with torch.no_grad():
            chosen, values = look_with_gradient(which, one)
        return [float(x) for x in chosen], [float(x) for x in values]

    reference = load(str(settings.init_from), dtype=torch.float64)[0]
    deviation = torch.tensor([one.reward for one in drawn], dtype=torch.float64).std().item()
    tokens: dict[int, list[dict[str, float]]] = {}
    for number, one in enumerate(drawn):
        old, values = look(model, one)
        ref = look(reference, one)[0]
        rewards = [0.0] * len(old)
        rewards[-1] = one.reward / (deviation if settings.whiten_rewards else 1)
        if settings.kl_in == "reward":
            rewards = [r - settings.kl * (a - b) for r, a, b in zip(rewards, old, ref, strict=True)]
        following, found = 0.0, []
        for t in range(len(old) - 1, -1, -1):
            after = values[t + 1] if t + 1 < len(old) else 0.0
            delta = rewards[t] + settings.discount * after - values[t]
            following = delta + settings.discount * settings.decay * following
            found.append(
                {
                    "advantage": following,
                    "old": old[t],
                    "value": values[t],
                    "return": following + values[t],
                    "ref": ref[t],
                }
            )
        tokens[number] = found[::-1]
    if settings.whiten_advantages:
        every = [token["advantage"] for reply in tokens.values() for token in reply]
        mean = sum(every) / len(every)
        variance = sum((a - mean) ** 2 for a in every) / (len(every) - 1)
        for reply in tokens.values():
            for token in reply:
                token["advantage"] = (token["advantage"] - mean) / math.sqrt(variance + 1e-8)
    losses: list[Any] = []
    by_reply: list[Any] = []
    for one in share:
        now, values = look_with_gradient(changed, one)
        mine = []
        for t, token in enumerate(tokens[drawn.index(one)]):
            ratio = torch.exp(now[t] - token["old"])
            cut = min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high)
            policy = -min(ratio * token["advantage"], cut * token["advantage"])
            near = token["value"] + min(
                max(values[t] - token["value"], -settings.value_clip), settings.value_clip
            )
            errors = [(values[t] - token["return"]) ** 2]
            errors += [(near - token["return"]) ** 2] if settings.value_clip else []
            loss = policy + settings.value_weight * max(errors) / 2
            if settings.kl_in == "loss":
                gap = token["ref"] - now[t]
                loss = loss + settings.kl * (torch.exp(gap) - 1 - gap)
            mine.append(loss)
        losses += mine
        by_reply.append(sum(mine) / len(mine))
    chosen = losses if settings.averaging == "token" else by_reply
    return sum(chosen) / len(chosen)


DETAILS: list[dict[str, Any]] = [
    {},
    {"kl_in": "loss"},
    {"whiten_rewards": True},
    {"whiten_advantages": False},
    {"value_clip": 0.0},
    {"value_clip": 0.01},
    {"discount": 0.9},
    {"decay": 0.5},
    {"clip_low": 0.02, "clip_high": 0.02},
    {"kl": 0.5},
    {"value_weight": 1.0},
    {"averaging": "reply"},
]


def test_the_whole_loss_and_its_gradients_by_loops(prompts: Path, chat_model: Path, tmp_path: Path) -> None:
    """Every detail, and that it matters: without it the number is another one."""
    found = {}
    for detail in DETAILS:
        settings = config(prompts, chat_model, tmp_path, **detail)
        model, source, batches, drawn = rolled_out(settings)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.03)
            model.score.weight.mul_(0.3)  # nearer to the returns, by more than the clip
        batch = batches[0]
        loss = source.loss(model, batch, float(source.count(batch)))
        loss.backward()
        changed = load(str(settings.init_from), dtype=torch.float64)[0]
        old = load(str(settings.init_from), dtype=torch.float64)[0]
        for which, state in ((changed, model.state_dict()), (old, before)):
            which.give_values()
            which.load_state_dict(state)
            which.double()
        rows = len(batch.ids)
        share = [one for one in drawn if _is_in(one, batch, rows)]
        assert len({len(one.ids) for one in share}) > 4
        expected = by_loops(settings, old, source, drawn, share, changed)
        assert loss.item() == pytest.approx(expected.item(), rel=2e-4, abs=1e-5), detail
        expected.backward()
        for ours, theirs in zip(model.parameters(), changed.parameters(), strict=True):
            assert (ours.grad - theirs.grad).norm() <= 2e-4 * theirs.grad.norm(), detail
        found[json.dumps(detail)] = loss.item()
    assert len({round(value, 5) for value in found.values()}) == len(DETAILS), json.dumps(found, indent=1)


def _is_in(one: Drawn, batch: Batch, rows: int) -> bool:
    whole = torch.tensor([*one.prompt, *one.ids])
    for row in range(rows):
        for segment in batch.segments[row].unique().tolist():
            here = batch.segments[row] == segment
            if segment >= 0 and torch.equal(batch.ids[row, here], whole[:-1]):
                return bool(batch.targets[row, here][-1] == whole[-1])
    return False


def test_the_first_ratio_is_one(prompts: Path, chat_model: Path, tmp_path: Path) -> None:
    settings = config(prompts, chat_model, tmp_path, updates=1)
    model, source, batches, _ = rolled_out(settings)
    source.loss(model, batches[0], 1.0)
    assert source.shown["engine_gap"] < 1e-5
    assert source.shown["clipped"] == 0
    assert source.shown["kl"] != 0


def test_a_rule_is_learnt(prompts: Path, chat_model: Path, tmp_path: Path) -> None:
    """And the value head goes at the end."""
    result = ppo(config(prompts, chat_model, tmp_path, steps=100, held_out=0.3, kl=0.01))
    rows = [row for row in read_metrics(tmp_path) if "reward" in row]
    assert rows[0]["reward"] < 0.6
    assert sum(row["reward"] for row in rows[-6:]) / 6 > 0.85
    assert result.held_out_reward is not None
    assert result.held_out_reward_before is not None
    assert result.held_out_reward > max(0.7, result.held_out_reward_before)
    assert load(result.model)[0].score is None


def test_the_value_head_foresees_what_the_prompt_decides(
    prompts: Path, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_prompt(replies: Any) -> list[float]:
        return [float(reply.prompt[-1]["content"].split()[3][0] in "cdf") for reply in replies]

    monkeypatch.setitem(RULES, "ended", by_prompt)
    values: dict[str, Any] = {
        "held_out": 0.0,
        "value_weight": 3.0,
        "value_clip": 0.0,
        "kl": 0.01,
        "rewards": [{"rule": "ended"}],
    }
    ppo(config(prompts, chat_model, tmp_path, steps=120, **values))
    explained = [row["explained"] for row in read_metrics(tmp_path) if "explained" in row]
    assert explained[0] < 0.1
    assert sum(explained[-8:]) / 8 > 0.5


def test_the_weight_of_the_divergence_adapts(prompts: Path, chat_model: Path, tmp_path: Path) -> None:
    """Up while a reply is farther from the reference than wanted, down else."""
    ppo(config(prompts, chat_model, tmp_path, steps=16, kl=0.05, kl_target=0.5))
    rows = [row for row in read_metrics(tmp_path) if "kl_weight" in row][::2]
    weight = 0.05
    for row in rows:
        error = min(max(row["reply_kl"] / 0.5 - 1, -0.2), 0.2)
        weight *= 1 + 0.1 * error
        assert row["kl_weight"] == pytest.approx(weight)
    assert rows[0]["kl_weight"] < 0.05


def test_text_is_learnt_beside(prompts: Path, chat_model: Path, text_tokens: Path, tmp_path: Path) -> None:
    """By its mean loss a token, once, however a batch is cut; replies count as without it."""
    values: dict[str, Any] = {"pretraining": text_tokens, "pretraining_rows": 3, "pretraining_weight": 0.7}
    model, source, batches, _ = rolled_out(config(prompts, chat_model, tmp_path, **values))
    batch = batches[0]
    rows = batch.text.sum(1) > 0
    assert int(rows.sum()) == 3
    assert not (batch.weights[rows] > 0).any()
    logs = model(batch.ids[rows], batch.positions[rows], batch.segments[rows]).log_softmax(-1)
    nats = -logs.gather(2, batch.targets[rows][..., None])[..., 0]
    mean = nats[batch.text[rows] > 0].mean()
    bare = RolloutBatch(**{name: value[~rows] for name, value in vars(batch).items()})
    wanted = source.loss(model, bare, 7.0) + 0.7 * mean
    wanted.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for parts in (1, 2):
        model.zero_grad()
        assert float(source.count(batch)) == float(source.count(bare))
        whole = sum(source.loss(model, part, 7.0) for part in batch.split(parts))
        assert whole.item() == pytest.approx(wanted.item(), rel=1e-5)
        assert source.shown["pretraining_loss"] == pytest.approx(mean.item(), rel=1e-5)
        whole.backward()
        for found, right in zip(
            (p.grad for p in model.parameters() if p.grad is not None), gradients, strict=True
        ):
            torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-3)


def test_text_of_another_tokenizer(prompts: Path, chat_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    rows = [{"text": f"Something else, number {n}: {'word ' * n}"} for n in range(40)]
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(DataConfig(source=str(folder / "rows.jsonl"), held_out=0.2, out=folder / "data"))
    train_tokenizer(TokenizerConfig(data=folder / "data", vocab_size=270, out=folder / "tokenizer"))
    tokenize(TokenizeConfig(data=folder / "data", tokenizer=folder / "tokenizer", out=folder / "tokens"))
    with pytest.raises(UserError, match="another tokenizer"):
        ppo(config(prompts, chat_model, tmp_path / "out", pretraining=folder / "tokens"))


def test_a_reference_that_follows(prompts: Path, chat_model: Path, tmp_path: Path) -> None:
    """After each rollout it is so much of itself, and the rest of the policy that drew."""
    model, source, _, _ = rolled_out(config(prompts, chat_model, tmp_path, reference_decay=0.75))
    assert source.reference is not None
    first = load(str(chat_model), dtype=torch.float32)[0].state_dict()
    policy = {name: one.detach() for name, one in model.named_parameters()}
    for name, one in source.reference.named_parameters():
        torch.testing.assert_close(one, 0.75 * first[name] + 0.25 * policy[name])
    with pytest.raises(UserError, match="nothing is held to a reference"):
        ppo(config(prompts, chat_model, tmp_path / "out", reference_decay=0.75, kl=0.0))
    lora = {"rank": 4, "alpha": 8.0}
    with pytest.raises(UserError, match="the base below the adapter, which stays"):
        ppo(config(prompts, chat_model, tmp_path / "out", reference_decay=0.75, lora=lora))


@pytest.mark.parametrize("follows", [False, True])
def test_a_run_that_was_cut_resumes_to_the_bit(
    follows: bool, prompts: Path, chat_model: Path, text_tokens: Path, tmp_path: Path
) -> None:
    """Policy, value head, the adapted weight, what is left of a rollout; a reference that moves, and text."""

    class Stop(Hooks):
        def batches(self, index: int, batches: list[Batch]) -> list[Batch]:
            if index == 6:
                raise RuntimeError("killed")
            return batches

    settings: dict[str, Any] = {"steps": 9, "checkpoint_every": 3, "kl_target": 0.5}
    if follows:
        settings |= {"reference_decay": 0.8, "pretraining": text_tokens}
    whole = ppo(config(prompts, chat_model, tmp_path / "whole", **settings))
    with pytest.raises(RuntimeError, match="killed"):
        ppo(config(prompts, chat_model, tmp_path / "cut", **settings), Stop())
    again = ppo(config(prompts, chat_model, tmp_path / "cut", **settings))
    weights = [load(result.model)[0].state_dict() for result in (whole, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
