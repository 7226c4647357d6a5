"""Losses of a policy against TRL's, from the same log-probabilities; advantages and KL against loops."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor

from danlu.align.advantages import gae, group_normalised, leave_one_out, whitened
from danlu.align.policy_losses import (
    KL_ESTIMATORS,
    clipped,
    clipped_values,
    count_of,
    k3,
    token_weights,
)
from danlu.tokens.bpe import train_bpe
from danlu.tokens.loader import Batch

B, T = 6, 9


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def replies() -> dict[str, Tensor]:
    """Log-probabilities of six replies of different lengths: now, when drawn, and the reference's."""
    lengths = torch.tensor([9, 4, 1, 7, 2, 9])
    now = -numbers(0, B, T).abs()
    return {
        "now": now.requires_grad_(),
        "old": now.detach() + 0.3 * numbers(1, B, T),
        "ref": now.detach() + 0.3 * numbers(2, B, T),
        "mask": (torch.arange(T) < lengths[:, None]).float(),
        "advantages": numbers(3, B),
    }


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What TRL's trainers are made of."""
    folder = tmp_path_factory.mktemp("parts")
    train_bpe(["the furnace is hot " * 20], 270).save_folder(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)  # from where the reference is read again
    return {
        "model": transformers.LlamaForCausalLM.from_pretrained(folder),
        "reward_funcs": lambda completions, **_: [0.0] * len(completions),
        "train_dataset": Dataset.from_list([{"prompt": "the"}] * B),
        "processing_class": tokenizer,
    }


PLAIN: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": B,
    "num_generations": 2,
    "report_to": [],
    "gradient_checkpointing": False,
}


def their_loss(trainer: Any, reply: dict[str, Tensor], **inputs: Any) -> Tensor:
    """What their trainer makes of these log-probabilities."""
    trainer._metrics = {name: defaultdict(list) for name in ("train", "eval")}
    trainer.current_gradient_accumulation_steps = 1
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        reply["now"],
        torch.zeros_like(reply["now"]),
        None,
    )
    tokens = torch.ones(B, T, dtype=torch.long)
    return trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": tokens[:, :2],
            "prompt_mask": tokens[:, :2],
            "completion_ids": tokens,
            "completion_mask": reply["mask"],
            "advantages": reply["advantages"],
            "num_items_in_batch": reply["mask"].sum(),
            **inputs,
        },
    )


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize(("beta", "weighted"), [(0.0, False), (0.3, False), (0.3, True)])
def test_grpo(kind: str, beta: float, weighted: bool, parts: dict[str, Any], tmp_path: Path) -> None:
    """`weighted`: the divergence of tokens that an older policy drew, by their ratio (DeepSeek-V3.2)."""
    args = trl.GRPOConfig(
        tmp_path,
        loss_type=kind,
        beta=beta,
        epsilon=0.1,
        epsilon_high=0.25,
        max_completion_length=T,
        use_bias_correction_kl=weighted,
        **PLAIN,
    )
    trainer = trl.GRPOTrainer(args=args, **parts)
    reply = replies()
    expected = their_loss(trainer, reply, old_per_token_logps=reply["old"], ref_per_token_logps=reply["ref"])
    losses = clipped(reply["now"] - reply["old"], reply["advantages"][:, None], 0.1, 0.25)
    ratio = (reply["now"] - reply["old"]).exp() if weighted else 1.0
    losses = losses + beta * ratio * k3(reply["now"], reply["ref"])
    averaging = {"grpo": "reply", "dr_grpo": "length", "dapo": "token"}[kind]
    nothing = torch.zeros(B, T, dtype=torch.long)
    batch = Batch(nothing, nothing, reply["mask"], nothing, nothing)
    found = (losses * token_weights(batch, averaging, T)).sum() / count_of(batch, averaging)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, reply["now"])[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_rloo(parts: dict[str, Any], tmp_path: Path) -> None:
    """A reply is one action there: its ratio is that of all its tokens together."""
    trainer = trl.RLOOTrainer(args=trl.RLOOConfig(tmp_path, epsilon=0.2, **PLAIN), **parts)
    reply = replies()
    old = (reply["old"] * reply["mask"]).sum(1)
    expected = their_loss(trainer, reply, old_logps=old)
    found = clipped((reply["now"] * reply["mask"]).sum(1) - old, reply["advantages"]).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, reply["now"])[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_values_by_a_loop() -> None:
    values, old, returns = (numbers(seed, B, T).double() for seed in range(3))
    found = clipped_values(values, old, returns, 0.2)
    for i in range(B):
        for j in range(T):
            v, o, r = (x[i, j].item() for x in (values, old, returns))
            near = min(max(v, o - 0.2), o + 0.2)
            assert found[i, j].item() == pytest.approx(max((v - r) ** 2, (near - r) ** 2) / 2)
    torch.testing.assert_close(clipped_values(values, old, returns, 0), (values - returns) ** 2 / 2)


# Advantages


def test_groups() -> None:
    rewards = numbers(0, 5, 4).double()
    rewards[2] = 1.5
    for row, scaled, centred, others in zip(
        rewards.tolist(),
        group_normalised(rewards).tolist(),
        group_normalised(rewards, scale=False).tolist(),
        leave_one_out(rewards).tolist(),
        strict=True,
    ):
        mean = sum(row) / 4
        std = (sum((x - mean) ** 2 for x in row) / 3) ** 0.5
        assert centred == pytest.approx([x - mean for x in row])
        assert scaled == pytest.approx([(x - mean) / (std + 1e-4) for x in row])
        assert others == pytest.approx([x - (sum(row) - x) / 3 for x in row])
    with pytest.raises(ValueError, match="group of one"):
        leave_one_out(rewards[:, :1])


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.9, 0.0)])
def test_gae_by_a_loop(discount: float, decay: float) -> None:
    """The definition: each token's sum over all that follow in its reply, wherever that begins and ends."""
    rewards, values = numbers(0, B, T).double(), numbers(1, B, T).double()
    mask = torch.zeros(B, T, dtype=torch.float64)
    for row, (begin, end) in enumerate([(0, 9), (2, 6), (8, 9), (0, 1), (3, 9), (1, 8)]):
        mask[row, begin:end] = 1
    found = gae(rewards, values, mask, discount, decay)
    for i in range(B):
        tokens = [t for t in range(T) if mask[i, t]]
        last = tokens[-1]
        delta = {
            t: rewards[i, t] + (discount * values[i, t + 1] if t < last else 0) - values[i, t] for t in tokens
        }
        for t in range(T):
            later = [(discount * decay) ** (u - t) * delta[u] for u in tokens if u >= t]
            expected = float(sum(later)) if mask[i, t] else 0.0
            assert found[i, t].item() == pytest.approx(expected)


def test_whitening() -> None:
    values, mask = 3 + 2 * numbers(0, B, T).double(), replies()["mask"].double()
    white = whitened(values, mask)[mask > 0]
    assert white.mean().item() == pytest.approx(0, abs=1e-9)
    assert white.std().item() == pytest.approx(1, rel=1e-6)
    kept = whitened(values, mask, shift=False)
    assert kept[mask > 0].mean().item() == pytest.approx(values[mask > 0].mean().item())
    assert (kept[mask == 0] == 0).all()


# Divergence


def test_estimators_agree_with_the_divergence() -> None:
    """Over draws from a vocabulary of seven; k2's gradient is that of the true divergence."""
    logits, ref = numbers(0, 7).double().requires_grad_(), (numbers(0, 7) + 0.4 * numbers(1, 7)).double()
    log_p, log_q = logits.log_softmax(0), ref.log_softmax(0)
    exact = (log_p.exp() * (log_p - log_q)).sum()
    weights = log_p.exp().detach()
    mean = {name: (weights * k(log_p, log_q)).sum() for name, k in KL_ESTIMATORS.items()}
    assert mean["k1"].item() == pytest.approx(exact.item())
    assert mean["k3"].item() == pytest.approx(exact.item())
    assert mean["k2"].item() == pytest.approx(exact.item(), rel=0.3)
    assert mean["k2"].item() != pytest.approx(exact.item(), rel=1e-3)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (mean["k2"], exact))
    )
    drawn = torch.multinomial(weights, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    spread = {}
    for name, k in KL_ESTIMATORS.items():
        values = k(log_p[drawn], log_q[drawn]).detach()
        spread[name] = values.std().item()
        assert values.mean().item() == pytest.approx(mean[name].item(), abs=4 * spread[name] / 20_000**0.5)
    assert spread["k3"] < spread["k1"]
    assert (k3(log_p, log_q) >= 0).all()
