"""Adapter files: PEFT reads ours, we read PEFT's, and what doesn't belong is refused."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families_table import CASES, make_theirs
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from danlu.core.errors import UserError
from danlu.model.adapters import load_adapter, save_adapter
from danlu.model.checkpoint import load_model
from danlu.model.lora import LoraConfig, add_adapter, use_adapter
from danlu.model.transformer import Transformer

IDS = torch.randint(0, 128, (2, 30), generator=torch.Generator().manual_seed(1))
TARGETS = {
    "LlamaConfig": (["q_proj", "v_proj", "down_proj"], ("attention.q", "attention.v", "ffn.down")),
    "GPT2Config": (["c_attn"], ("attention.[qkv]",)),
    "GPTNeoXConfig": (["query_key_value"], ("attention.[qkv]",)),
    "GPTJConfig": (["q_proj", "k_proj"], ("attention.q", "attention.k")),
    "Phi3Config": (["qkv_proj"], ("attention.[qkv]",)),
}
KINDS: list[dict[str, Any]] = [{}, {"use_rslora": True}, {"use_dora": True}]


def bases(name: str, folder: Path) -> tuple[nn.Module, Transformer]:
    make_theirs(name, CASES[name][0]).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder), load_model(folder)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got / want.abs().max(), want / want.abs().max(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TARGETS)
@torch.no_grad()
def test_we_read_what_peft_writes(name: str, kind: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = bases(name, tmp_path / "base")
    plain = ours(IDS)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[name][0], **kind)
    wrapped = peft.get_peft_model(theirs, config).eval()
    for parameter_name, p in wrapped.named_parameters():
        if "lora_" in parameter_name:
            p.add_(0.1 * torch.randn_like(p))
    wrapped.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    close(ours(IDS), wrapped(IDS).logits)
    assert (ours(IDS) - plain).abs().max() > 0.1
    save_adapter(ours, tmp_path / "again")
    before = load_file(tmp_path / "adapter/adapter_model.safetensors")
    after = load_file(tmp_path / "again/adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("kind", [{}, {"rslora": True}, {"dora": True}])
@pytest.mark.parametrize("name", TARGETS)
@torch.no_grad()
def test_peft_reads_what_we_write(name: str, kind: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = bases(name, tmp_path / "base")
    for p in add_adapter(ours, LoraConfig(rank=4, targets=TARGETS[name][1], **kind)):
        p.add_(0.1 * torch.randn_like(p))
    save_adapter(ours, tmp_path / "adapter", base=str(tmp_path / "base"))
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    close(ours(IDS), wrapped(IDS).logits)


FUSED = ["GPT2Config", pytest.param("GPTNeoXConfig", marks=pytest.mark.slow), "Phi3Config"]
OUR_KINDS: list[dict[str, Any]] = [{}, {"rslora": True}, {"dora": True}]


@pytest.mark.parametrize(
    "kind", [{}, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OUR_KINDS[1:])]
)
@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_fused_and_plain_matrices_are_adapted_together(
    name: str, kind: dict[str, Any], tmp_path: Path
) -> None:
    """Ours of one rank; theirs of three times or twice the rank where a matrix is fused. Both read it."""
    theirs, ours = bases(name, tmp_path / "base")
    plain = ours(IDS)
    for p in add_adapter(ours, LoraConfig(rank=4, alpha=6.0, **kind)):
        p.add_(0.05 * torch.randn_like(p))
    save_adapter(ours, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["r"] == 4
    assert set(settings["rank_pattern"].values()) == ({8, 12} if name == "Phi3Config" else {12})
    wanted = ours(IDS)
    assert (wanted - plain).abs().max() > 0.05 * plain.abs().max()
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    close(wrapped(IDS).logits, wanted)
    again = load_model(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    close(again(IDS), wanted)


@pytest.mark.parametrize(
    "kind", [KINDS[1], *(pytest.param(KINDS[i], marks=pytest.mark.slow) for i in (0, 2))]
)
@torch.no_grad()
def test_patterns_that_peft_writes(kind: dict[str, Any], tmp_path: Path) -> None:
    """Ranks and alphas by names and by regular expressions: the first in the file that matches counts.

    PEFT sorts them when it writes, so what counts is how it reads its own file.
    """
    theirs, ours = bases("LlamaConfig", tmp_path / "base")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={r"layers\.0\.self_attn\..*": 2, "q_proj": 6},
        alpha_pattern={"layers.0.*": 3, "layers.1.mlp.up_proj": 20, "self_attn.v_proj": 5, "v_proj": 9},
        **kind,
    )
    wrapped = peft.get_peft_model(theirs, config).eval()
    for parameter_name, p in wrapped.named_parameters():
        if "lora_" in parameter_name:
            p.add_(0.1 * torch.randn_like(p))
    wrapped.save_pretrained(tmp_path / "adapter")
    wanted = peft_logits(tmp_path / "base", tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    close(ours(IDS), wanted)
    save_adapter(ours, tmp_path / "again")
    close(peft_logits(tmp_path / "base", tmp_path / "again"), wanted)


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, adapter).eval()(IDS).logits


@torch.no_grad()
def test_two_adapters_from_files_on_one_base(tmp_path: Path) -> None:
    """Of other ranks and on other matrices; each gives what it gives alone."""
    _, ours = bases("LlamaConfig", tmp_path / "base")
    plain, wanted = ours(IDS), {}
    for name, matrices, rank in (("first", ["q_proj", "up_proj"], 3), ("second", ["down_proj"], 5)):
        config = peft.LoraConfig(r=rank, target_modules=matrices, init_lora_weights=False)
        wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
        wrapped.save_pretrained(tmp_path / name)
        wanted[name] = wrapped.eval()(IDS).logits
        load_adapter(ours, tmp_path / name, name)
        close(ours(IDS), wanted[name])  # the last one is active
    use_adapter(ours, "first")
    close(ours(IDS), wanted["first"])
    assert not torch.allclose(wanted["first"], wanted["second"], atol=0.1)
    use_adapter(ours, None)
    assert torch.equal(ours(IDS), plain)


def change(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_what_does_not_belong_is_refused(tmp_path: Path) -> None:
    _, ours = bases("LlamaConfig", tmp_path / "base")
    _, other = bases("GPT2Config", tmp_path / "other")
    add_adapter(ours, LoraConfig(rank=4))
    save_adapter(ours, tmp_path / "adapter")
    with pytest.raises(UserError, match="another base model"):
        load_adapter(other, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "q_proj.lora_A" in key)
    save_file({**tensors, key: tensors[key][:, :-1].contiguous()}, file)
    with pytest.raises(UserError, match=r"another base model"):
        load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        load_adapter(ours, tmp_path / "adapter")
    for broken in ({"(": 2}, {"q_proj": 0}, ["q_proj"]):
        save_adapter(ours, tmp_path / "adapter")
        change(tmp_path / "adapter", rank_pattern=broken)
        with pytest.raises(UserError, match=r"adapter_config\.json: rank_pattern"):
            load_adapter(ours, tmp_path / "adapter")
    change(tmp_path / "adapter", peft_type="LOHA")
    with pytest.raises(UserError, match="peft_type is 'LOHA'"):
        load_adapter(ours, tmp_path / "adapter")
    with pytest.raises(UserError, match='no adapter is called "x"'):
        save_adapter(ours, tmp_path / "x", "x")
