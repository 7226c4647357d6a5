"""Losses of preferences against TRL's trainers, with the same weights and the same batch; by loops beside."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
import trl
from datasets import Dataset
from torch import Tensor
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from danlu.align.config import PreferenceLossConfig
from danlu.align.preference_losses import PAIR_LOSSES, Pairs, bradley_terry, kto
from danlu.model.checkpoint import load_model
from danlu.model.cross_entropy import log_probabilities
from danlu.model.transformer import Transformer
from danlu.tokens.bpe import train_bpe
from danlu.tokens.loader import Batch

TEXT = "the furnace is hot and the gold melts in the night "
ROWS = [
    {"prompt": "the furnace", "chosen": " is hot" + " and" * n, "rejected": " melts gold" * (4 - n)}
    for n in range(4)
]
PLAIN: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": len(ROWS),
    "report_to": [],
    "gradient_checkpointing": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([TEXT * 20], 280).save_folder(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def pair(tokenizer: Any, tmp_path: Path) -> tuple[Any, Any, Transformer, Transformer]:
    """Policy and reference, theirs and ours."""
    found: list[Any] = []
    for seed in range(2):
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer), num_attention_heads=2, initializer_range=0.2, **sizes
        )
        found.append(transformers.LlamaForCausalLM(config).eval())
        found[-1].save_pretrained(tmp_path / str(seed))
    return (*found, *(load_model(tmp_path / str(seed)) for seed in range(2)))  # type: ignore[return-value]


def sums(model: Transformer, ids: Tensor, mask: Tensor, attention: Tensor) -> Tensor:
    """log π of each row's tokens that count."""
    segments = torch.where(attention[:, :-1] > 0, 0, -1).int()
    positions = torch.arange(ids.shape[1] - 1).expand(len(ids), -1)
    weights = mask[:, 1:].float()
    batch = Batch(ids[:, :-1], ids[:, 1:], weights, positions, segments)
    return (log_probabilities(model, batch) * weights).sum(1)


def as_pairs(policy: Transformer, reference: Transformer, batch: dict[str, Tensor]) -> Pairs:
    ids, mask, attention = (batch[name] for name in ("input_ids", "completion_mask", "attention_mask"))
    ours = sums(policy, ids, mask, attention).chunk(2)
    with torch.no_grad():
        theirs = sums(reference, ids, mask, attention).chunk(2)
    return Pairs(*ours, *theirs, *mask.sum(1).chunk(2))


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("dpo", {"beta": 0.2}, {"loss_type": "sigmoid", "beta": 0.2}),
        ("ipo", {"beta": 0.3}, {"loss_type": "ipo", "beta": 0.3}),
    ],
)
def test_with_a_reference(
    name: str, ours: Any, theirs: Any, pair: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """The loss, and the gradient of the first layer's matrix."""
    their_policy, their_reference, policy, reference = pair
    trainer = trl.DPOTrainer(
        their_policy,
        their_reference,
        args=trl.DPOConfig(tmp_path, **theirs, **PLAIN),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(their_policy, batch)
    found = PAIR_LOSSES[name](as_pairs(policy, reference, batch), PreferenceLossConfig(**ours)).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    found.backward()
    theirs_grad = their_policy.model.layers[0].mlp.down_proj.weight.grad
    ours_grad = policy.layers[0].get_parameter("ffn.down.weight").grad
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-4, atol=1e-6)


def made_up(n: int = 6) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 20, (2, n), generator=generator)
    logs = [-torch.rand(n, generator=generator) * 3 * lengths[i % 2] for i in range(4)]
    return Pairs(*logs, *lengths)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.4])
def test_labels_that_may_be_wrong(noise: float) -> None:
    """The conservative loss is the mean over both labels."""
    pairs = made_up()
    other = Pairs(
        pairs.rejected,
        pairs.chosen,
        pairs.ref_rejected,
        pairs.ref_chosen,
        pairs.rejected_tokens,
        pairs.chosen_tokens,
    )
    dpo, plain = PAIR_LOSSES["dpo"], PreferenceLossConfig(beta=0.3)
    expected = (1 - noise) * dpo(pairs, plain) + noise * dpo(other, plain)
    found = dpo(pairs, PreferenceLossConfig(beta=0.3, label_smoothing=noise))
    torch.testing.assert_close(found, expected)


def unmade(trainer: Any, **attributes: Any) -> Any:
    """A trainer of which only the loss is used."""
    found = object.__new__(trainer)
    for name, value in attributes.items():
        object.__setattr__(found, name, value)
    return found


def test_simpo() -> None:
    pairs, config = made_up(), CPOConfig("x", loss_type="simpo", beta=2.0, simpo_gamma=0.7, bf16=False)
    trainer = unmade(
        CPOTrainer,
        beta=config.beta,
        simpo_gamma=config.simpo_gamma,
        loss_type="simpo",
        label_smoothing=0.0,
        alpha=0.0,
        accelerator=type("Device", (), {"device": "cpu"}),
    )
    expected = trainer.cpo_loss(pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens)[0]
    found = PAIR_LOSSES["simpo"](pairs, PreferenceLossConfig(beta=2.0, gamma=0.7))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_orpo() -> None:
    """TRL's own sum has the prompt's tokens in its first part; the paper, and danlu, the reply's alone."""
    pairs = made_up()
    beta = ORPOConfig("x", bf16=False).beta
    trainer = unmade(ORPOTrainer, beta=beta, accelerator=type("Device", (), {"device": "cpu"}))
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    expected = -chosen - trainer.odds_ratio_loss(chosen, rejected)[0]
    found = PAIR_LOSSES["orpo"](pairs, PreferenceLossConfig(beta=beta))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_kto(pair: Any, tokenizer: Any, tmp_path: Path) -> None:
    their_policy, their_reference, policy, reference = pair
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": n != 1} for n, row in enumerate(ROWS)
    ]
    trainer = trl.KTOTrainer(
        their_policy,
        their_reference,
        args=trl.KTOConfig(tmp_path, beta=0.3, undesirable_weight=1.5, **PLAIN),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(their_policy, batch)

    def log_ratios(prefix: str) -> Tensor:
        names = ("input_ids", "completion_mask", "attention_mask")
        args = [batch[prefix + name] for name in names]
        return sums(policy, *args) - sums(reference, *args).detach()

    kl = log_ratios("KL_").detach().mean().clamp(min=0)
    good = torch.as_tensor(batch["label"], dtype=torch.bool)
    config = PreferenceLossConfig(beta=0.3, bad_weight=1.5)
    assert kto(log_ratios(""), good, kl, config).mean().item() == pytest.approx(expected.item(), rel=1e-5)


def test_reward(tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            num_attention_heads=2,
            initializer_range=0.2,
            num_labels=1,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **sizes,
        )
    )
    rows = [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in ROWS
    ]
    trainer = trl.RewardTrainer(
        model,
        args=trl.RewardConfig(tmp_path, **PLAIN),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(model.eval(), dict(batch)).item()
    rewards = model(**batch).logits[:, 0]
    assert bradley_terry(*rewards.chunk(2)).mean().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_step_down_prefers_what_was_chosen(name: str) -> None:
    """Each loss falls where the chosen reply becomes more probable and the rejected one less."""
    pairs = made_up()
    chosen, rejected = pairs.chosen.clone().requires_grad_(), pairs.rejected.clone().requires_grad_()
    moved: Callable[[Tensor, Tensor], Pairs] = lambda a, b: Pairs(  # noqa: E731
        a, b, pairs.ref_chosen, pairs.ref_rejected, pairs.chosen_tokens, pairs.rejected_tokens
    )
    config = PreferenceLossConfig()
    loss = PAIR_LOSSES[name](moved(chosen, rejected), config).sum()
    d_chosen, d_rejected = torch.autograd.grad(loss, (chosen, rejected))
    stepped = moved(chosen - 0.01 * d_chosen, rejected - 0.01 * d_rejected)
    assert PAIR_LOSSES[name](stepped, config).sum() < loss
    if name != "ipo":  # which pulls back what has gone too far
        assert (d_chosen < 0).all()
        assert (d_rejected > 0).all()
    assert F.relu(d_rejected).sum() > 0
