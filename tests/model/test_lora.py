"""Adapters against PEFT's, with the same matrices."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families_table import make_theirs
from torch import nn

from danlu.core.errors import UserError
from danlu.model.checkpoint import hf_tensors, load_model
from danlu.model.lora import LoraConfig, adapted_layers, add_adapter, merge, use_adapter
from danlu.model.transformer import Transformer

IDS = torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(1))
KINDS: list[dict[str, Any]] = [{}, {"rslora": True}, {"dora": True}, {"rslora": True, "dora": True}]
THEIR_NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
THEIR_NAMES |= {name: f"{name}_proj" for name in ("gate", "up", "down")}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[nn.Module, Transformer]:
    theirs = make_theirs("LlamaConfig", {"num_key_value_heads": 2, "attention_bias": True})
    with torch.no_grad():  # smaller matrices: rounding is not blown up from layer to layer
        for p in theirs.parameters():
            p.mul_(0.5 if p.ndim > 1 else 1)
    theirs.save_pretrained(tmp_path)
    return theirs, load_model(tmp_path)


def adapt_both(theirs: nn.Module, ours: Transformer, kind: dict[str, Any]) -> nn.Module:
    """The same random matrices, none of them zero, in both."""
    config = LoraConfig(rank=4, alpha=4.0, **kind)
    add_adapter(ours, config)
    wrapped = peft.get_peft_model(
        theirs,
        peft.LoraConfig(
            r=4,
            lora_alpha=4.0,
            target_modules=list(THEIR_NAMES.values()),
            use_rslora=config.rslora,
            use_dora=config.dora,
        ),
    )
    for name, layer in adapted_layers(ours).items():
        adapter, other = layer.adapters["default"], counterpart(wrapped, name)
        with torch.no_grad():
            adapter.b.copy_(torch.randn_like(adapter.b) * 0.1)
            adapter.a.copy_(torch.randn_like(adapter.a) * 0.2)
            other.lora_A["default"].weight.copy_(adapter.a)
            other.lora_B["default"].weight.copy_(adapter.b)
            if adapter.m is not None:
                adapter.m.mul_(1 + 0.3 * torch.rand_like(adapter.m))
                other.lora_magnitude_vector["default"].weight.copy_(adapter.m)
    return wrapped


def counterpart(wrapped: nn.Module, name: str) -> nn.Module:
    _, layer, block, matrix = name.split(".")
    part = {"attention": "self_attn", "ffn": "mlp"}[block]
    return wrapped.get_submodule(f"base_model.model.model.layers.{layer}.{part}.{THEIR_NAMES[matrix]}")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_peft(pair: tuple[nn.Module, Transformer], kind: dict) -> None:
    theirs, ours = pair
    plain = ours(IDS).detach()
    wrapped = adapt_both(theirs, ours, kind)
    got, want = ours(IDS), wrapped(IDS).logits
    torch.testing.assert_close(got / want.abs().max(), want / want.abs().max(), atol=1e-5, rtol=0)
    assert (got - plain).abs().max() > 0.1
    weight = torch.randn_like(want)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    trained = [name for name, p in ours.named_parameters() if p.grad is not None]
    assert trained
    assert all(".adapters.default." in name for name in trained)
    for name, layer in adapted_layers(ours).items():
        adapter, other = layer.adapters["default"], counterpart(wrapped, name)
        pairs = [
            (adapter.a, other.lora_A["default"].weight),
            (adapter.b, other.lora_B["default"].weight),
        ]
        if adapter.m is not None:
            pairs.append((adapter.m, other.lora_magnitude_vector["default"].weight))
        for mine, peer in pairs:
            assert (mine.grad - peer.grad).norm() <= 1e-5 * peer.grad.norm()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merged_logits_are_unmerged_logits(pair: tuple[nn.Module, Transformer], kind: dict) -> None:
    theirs, ours = pair
    names = set(ours.state_dict())
    wrapped = adapt_both(theirs, ours, kind)
    before = ours(IDS)
    merge(ours)
    assert set(ours.state_dict()) == names
    torch.testing.assert_close(ours(IDS) / before.abs().max(), before / before.abs().max(), atol=1e-5, rtol=0)
    reference = wrapped.merge_and_unload().state_dict()
    for name, tensor in hf_tensors(ours.config, ours.state_dict()).items():
        torch.testing.assert_close(tensor, reference[name], atol=1e-5, rtol=1e-5)


def test_a_new_adapter_changes_nothing_and_trains_little(pair: tuple[nn.Module, Transformer]) -> None:
    _, ours = pair
    before = ours(IDS).detach()
    trained = add_adapter(ours, LoraConfig(rank=2, targets=("attention.q", "attention.v")))
    assert torch.equal(ours(IDS), before)
    assert len(adapted_layers(ours)) == 2 * ours.config.n_layers
    assert {p for p in ours.parameters() if p.requires_grad} == set(trained)


@torch.no_grad()
def test_several_adapters_on_one_base(pair: tuple[nn.Module, Transformer]) -> None:
    _, ours = pair
    plain = ours(IDS)
    logits = {}
    for name, targets in (("first", ("attention.*",)), ("second", ("ffn.down",))):
        for p in add_adapter(ours, LoraConfig(targets=targets), name):
            p.copy_(torch.randn_like(p) * 0.1)
        logits[name] = ours(IDS)
    use_adapter(ours, "first")
    assert torch.equal(ours(IDS), logits["first"])
    assert not torch.equal(logits["first"], logits["second"])
    use_adapter(ours, None)
    assert torch.equal(ours(IDS), plain)
    with pytest.raises(UserError, match='no adapter is called "third"'):
        use_adapter(ours, "third")


def test_dropout_is_of_training_only(pair: tuple[nn.Module, Transformer]) -> None:
    _, ours = pair
    for p in add_adapter(ours, LoraConfig(dropout=0.5)):
        nn.init.normal_(p, std=0.1)
    assert torch.equal(ours(IDS), ours(IDS))
    training = copy.deepcopy(ours).train()
    assert not torch.equal(training(IDS), training(IDS))


def test_targets_that_match_nothing_are_an_error(pair: tuple[nn.Module, Transformer]) -> None:
    with pytest.raises(UserError, match=r"no matrix matches attention\.x"):
        add_adapter(pair[1], LoraConfig(targets=("attention.x",)))
