"""Model folders: transformers reads what we write, we read what it writes, and damage has a name."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from danlu.core.errors import UserError
from danlu.model.checkpoint import load_model, resolve, save_model
from danlu.model.config import ModelConfig
from danlu.model.families import to_hf
from danlu.model.transformer import Transformer
from danlu.tokens.bpe import bpe

IDS = torch.arange(40)[None]


TOKENIZER = bpe(["the cat sat"], 260)


def sizes(**changes: object) -> ModelConfig:
    values = {"vocab_size": 260, "width": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_width": 48}
    return ModelConfig(**{**values, **changes})


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_our_folder(tmp_path: Path, tied: bool) -> None:
    model = Transformer(sizes(tied_embeddings=tied, norm_eps=1e-4, rope_theta=5e4))
    save_model(model, tmp_path / "m", TOKENIZER)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert theirs.dtype == torch.float32
    assert theirs.generation_config.eos_token_id == TOKENIZER.stop_ids == [2, 0]
    assert (tmp_path / "m/README.md").read_text().startswith("---\nlibrary_name: transformers")
    torch.testing.assert_close(theirs(IDS).logits, model(IDS), atol=1e-4, rtol=0)
    back = load_model(tmp_path / "m")
    assert back.config == model.config
    assert torch.equal(back(IDS), model(IDS))


@pytest.mark.parametrize("tied", [True, False])
def test_we_load_the_folder_of_transformers(tmp_path: Path, tied: bool) -> None:
    config = LlamaConfig(**to_hf(sizes(tied_embeddings=tied)))
    theirs = LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    torch.testing.assert_close(load_model(tmp_path)(IDS), theirs(IDS).logits, atol=1e-4, rtol=0)


def test_what_no_family_can_say_is_saved_for_danlu_alone(tmp_path: Path) -> None:
    odd = sizes(
        n_experts=3, expert_ffn="gelu", ffn="geglu", qk_norm=True, norm_place="both", positions="alibi"
    )
    model = Transformer(odd)
    save_model(model, tmp_path / "m", TOKENIZER)
    assert json.loads((tmp_path / "m/config.json").read_text())["architectures"] == ["DanluForCausalLM"]
    assert "AutoModel" not in (tmp_path / "m/README.md").read_text()
    back = load_model(tmp_path / "m")
    assert back.config == ModelConfig(**{**odd.model_dump(), "family": "danlu"})
    assert torch.equal(back(IDS), model(IDS))
    with pytest.raises(ValueError, match="danlu"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_dtype_is_the_saved_one_or_the_one_asked_for(tmp_path: Path) -> None:
    save_model(Transformer(sizes()).bfloat16(), tmp_path / "m")
    assert load_model(tmp_path / "m").head_weight.dtype == torch.bfloat16
    assert load_model(tmp_path / "m", torch.float32).head_weight.dtype == torch.float32
    assert json.loads((tmp_path / "m/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "no tensor model.norm.weight"),
        (lambda t: t.update(extra=torch.ones(1)), "unknown tensor extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"model.norm.weight has shape \(7,\)"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, change: object, message: str) -> None:
    save_model(Transformer(sizes()), tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "m/model.safetensors")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "m")


def test_a_cut_file_is_an_error(tmp_path: Path) -> None:
    save_model(Transformer(sizes()), tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors.*incomplete"):
        load_model(tmp_path / "m")


def test_a_model_reference_is_resolved(tmp_path: Path) -> None:
    model = Transformer(sizes())
    for number, stage in enumerate(["pretrain", "chat", "unfinished"]):
        save_model(model, tmp_path / stage / "model")
        if stage != "unfinished":
            (tmp_path / stage / "DONE").touch()
            os.utime(tmp_path / stage / "DONE", (number, number))
    assert resolve(tmp_path / "chat" / "model") == tmp_path / "chat" / "model"
    assert resolve(tmp_path / "pretrain") == tmp_path / "pretrain" / "model"
    assert resolve(tmp_path) == tmp_path / "chat" / "model"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="does not exist"):
        resolve(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no model"):
        resolve(tmp_path / "empty")


def test_a_model_that_memory_cannot_hold_is_refused_before_it_is_read(tmp_path: Path) -> None:
    config = ModelConfig(width=65536, n_layers=200, n_heads=64, n_kv_heads=64, ffn_width=262144)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(config)))
    with pytest.raises(UserError, match=r"billion parameters take [\d,.]+ GB, this machine has [\d,.]+ GB"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("Llama", {"num_key_value_heads": 2}),
        ("Qwen2", {"num_key_value_heads": 2}),
        ("GPT2", {}),
        ("OPT", {"word_embed_proj_dim": 32}),
    ],
)
@pytest.mark.parametrize("n_scores", [1, 3])
def test_models_with_scores(kind: str, sizes: dict[str, Any], n_scores: int, tmp_path: Path) -> None:
    """transformers' classifiers, in and out again: the same scores, and the same bytes."""
    torch.manual_seed(0)
    plain = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    named = {"n_embd": 32, "n_layer": 2, "n_head": 4} if kind == "GPT2" else {**plain, "ffn_dim": 48}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, pad_token_id=1, num_labels=n_scores, **named, **sizes
    )
    theirs = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    ids = torch.randint(2, 64, (3, 9))
    assert ours.score is not None
    found = ours.score(ours.hidden(ids)[:, -1])
    torch.testing.assert_close(found, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    save_model(ours, tmp_path / "ours")
    back = getattr(transformers, f"{kind}ForSequenceClassification").from_pretrained(tmp_path / "ours")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
