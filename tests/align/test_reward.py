"""Models of rewards: losses by loops, what transformers makes of them, rules learnt, text as the border."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import danlu
from danlu.align.config import RewardConfig
from danlu.align.replies import replies_of
from danlu.align.reward import RewardModel, Rewards, reward, rewards_at
from danlu.core.errors import UserError
from danlu.data.conversations import Messages
from danlu.model.checkpoint import load
from danlu.model.transformer import Transformer
from danlu.tokens.chat import render_reply
from danlu.tokens.load import load_tokenizer
from danlu.tokens.loader import Batch, PackedLoader
from danlu.tokens.shards import Shards
from danlu.train.optim import make_optimizer
from danlu.train.step import TrainStep

QUICK: dict[str, Any] = {
    "steps": 40,
    "batch_size": 4,
    "sequence_length": 128,
    "dtype": "float32",
    "compile": "off",
    "optim": {"lr": 3e-3, "weight_decay": 0.0},
}
ASKED: Messages = [{"role": "user", "content": "Where is the owl 7?"}]


def config(preferences: Path, chat_model: Path, out: Path, **values: Any) -> RewardConfig:
    return RewardConfig(**{"data": preferences, "init_from": chat_model, "out": out, **QUICK, **values})


@pytest.fixture(scope="module")
def trained(preferences: Path, chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return reward(config(preferences, chat_model, tmp_path_factory.mktemp("reward")))


def fresh(chat_model: Path, settings: RewardConfig) -> tuple[Transformer, Rewards]:
    torch.manual_seed(0)
    model = load(chat_model, dtype=torch.float32)[0]
    return model, Rewards(model, settings)


def one_batch(preferences: Path) -> Batch:
    return next(PackedLoader(Shards(preferences / "train"), 6, 128, seed=3))


@pytest.mark.parametrize("weighting", ["pair", "ranking"])
def test_the_loss_by_a_loop(weighting: Any, preferences: Path, chat_model: Path, tmp_path: Path) -> None:
    """Each reply by a pass of its own, its reward at the token that ends it."""
    values = {"weighting": weighting, "margin": 0.2, "centre": 0.1, "lm_weight": 0.5}
    model, objective = fresh(chat_model, config(preferences, chat_model, tmp_path, **values))
    assert model.score is not None
    batch = one_batch(preferences)
    stop = load_tokenizer(preferences / "tokenizer").stop_ids
    groups: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for row in range(len(batch.ids)):
        for segment in batch.segments[row].unique().tolist():
            if segment < 0:
                continue
            here = batch.segments[row] == segment
            ids, targets, learnt = (part[row, here] for part in (batch.ids, batch.targets, batch.weights > 0))
            assert ids[-1].item() in stop
            assert not learnt[-1]
            hidden = model.hidden(ids[None])
            logs = model.logits(hidden)[0].log_softmax(-1)
            nats = -logs.gather(1, targets[:, None])[:, 0][learnt].mean().item()
            groups.setdefault((row, segment // 64), []).append((model.score(hidden[0, -1]).item(), nats))
    expected, n = 0.0, 0
    for replies in groups.values():
        losses = [
            math.log1p(math.exp(-(a - b - 0.2))) + 0.1 * (a + b) ** 2
            for place, (a, _) in enumerate(replies)
            for b, _ in replies[place + 1 :]
        ]
        expected += sum(losses) if weighting == "pair" else sum(losses) / len(losses)
        expected += 0.5 * replies[0][1]
        n += len(losses) if weighting == "pair" else 1
    assert objective.count(batch).item() == n
    assert objective.loss(model, batch, n).item() == pytest.approx(expected / n, rel=1e-4)


def test_how_a_batch_is_cut_changes_no_gradient(preferences: Path, chat_model: Path, tmp_path: Path) -> None:
    def gradients(parts: int) -> list[torch.Tensor]:
        settings = config(preferences, chat_model, tmp_path, weighting="ranking", lm_weight=0.3)
        model, objective = fresh(chat_model, settings)
        step = TrainStep(model, make_optimizer(model, settings.optim), objective=objective)
        step.accumulate(one_batch(preferences).split(parts))
        return [p.grad for p in model.parameters() if p.grad is not None]

    for whole, cut in zip(gradients(1), gradients(6), strict=True):
        torch.testing.assert_close(cut, whole, atol=1e-6, rtol=1e-4)


def test_a_rule_is_learnt(trained: Any) -> None:
    """On prompts that the model has not seen; and of replies that nobody compared."""
    assert trained.accuracy > 0.9
    assert trained.held_out_loss < trained.held_out_loss_before
    model = RewardModel(trained.model)
    replies = [
        "The owl is at the mill.",
        "The owl is at the mill. Thank you.",
        "The fox is by the river. Thank you.",
    ]
    plain, *thanks = model([ASKED] * 3, replies)
    assert min(thanks) > plain


def test_transformers_gives_the_same_rewards(trained: Any) -> None:
    ours = RewardModel(trained.model, dtype=torch.float32)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(trained.model)
    replies = [
        "The owl is at the mill.",
        "No. Thank you.",
        "The crane is in the garden. Thank you. Thank you.",
    ]
    rows = []
    for reply in replies:
        rendered = render_reply(ASKED, reply, ours.tokenizer)
        rows.append(rendered.ids[: len(rendered.mask) - rendered.mask[::-1].index(True)])
    longest, padding = max(map(len, rows)), theirs.config.pad_token_id
    ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows])
    seen = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    expected = theirs(ids, attention_mask=seen.long()).logits[:, 0].tolist()
    assert ours([ASKED] * 3, replies) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_rewards_in_bfloat16_are_close(trained: Any) -> None:
    replies = [
        f"The {animal} is at the mill.{end}" for animal in ("owl", "fox") for end in ("", " Thank you.")
    ]
    found, wanted = (
        RewardModel(trained.model, dtype)([ASKED] * 4, replies) for dtype in (torch.bfloat16, torch.float32)
    )
    assert found == pytest.approx(wanted, abs=0.05 * (max(wanted) - min(wanted)))
    assert found != wanted


def test_rewards_of_texts_are_those_of_packed_tokens(trained: Any, preferences: Path) -> None:
    model = RewardModel(trained.model, dtype=torch.float32, batch_tokens=100)
    batch = one_batch(preferences)
    replies = replies_of(batch)
    with torch.no_grad():
        hidden = model.model.hidden(batch.ids, batch.positions, batch.segments).flatten(0, 1)
        packed = rewards_at(model.model, hidden, replies).tolist()
        rows = []
        for end in replies.ends.tolist():
            row, place = divmod(end, batch.ids.shape[1])
            begin = place - int(batch.positions[row, place])
            rows.append(batch.ids[row, begin : place + 1].tolist())
        alone = [model.of_rows([row])[0] for row in rows]
        assert packed == pytest.approx(alone, abs=1e-4)
        assert model.of_rows(rows) == pytest.approx(alone, abs=1e-4)


def test_a_model_of_rewards_goes_on_learning(trained: Any, preferences: Path, tmp_path: Path) -> None:
    """Its head stays, and says from the first step what it has learnt."""
    again = reward(config(preferences, Path(trained.model), tmp_path, steps=1))
    assert again.accuracy_before == pytest.approx(trained.accuracy, abs=0.02)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora": {"rank": 2}}, "reward with lora"),
        ({"parallel": "tensor"}, "its head isn't split"),
    ],
)
def test_what_can_t_be_trained_is_said(
    values: Any, message: str, preferences: Path, chat_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        reward(config(preferences, chat_model, tmp_path, **values))


def test_models_that_give_no_reward_are_refused(chat_model: Path, trained: Any) -> None:
    with pytest.raises(UserError, match="no model of rewards"):
        RewardModel(chat_model)
    long = [{"role": "user", "content": "gold " * 600}]
    with pytest.raises(UserError, match="reads 512"):
        RewardModel(trained.model)([long], ["No."])


def test_a_model_of_rewards_has_no_words(trained: Any) -> None:
    model, tokenizer = danlu.load(trained.model)
    with pytest.raises(UserError, match="gives rewards"):
        danlu.Engine(model, tokenizer)
