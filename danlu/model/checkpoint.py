"""Models in and out as Hugging Face folders, and the resolution of a model reference."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from danlu.core.errors import UserError
from danlu.core.files import atomic_folder, read_json
from danlu.model.config import ModelConfig
from danlu.model.count import parameters
from danlu.model.transformer import Transformer
from danlu.tokens.tokenizer import Tokenizer

# Ours -> Hugging Face's, piece by piece of a dotted name.
_NAMES = {
    "embedding": "model.embed_tokens",
    "layers": "model.layers",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "out": "o_proj",
    "ffn": "mlp",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}


def hf_name(name: str) -> str:
    """Hugging Face's name of one of our tensors."""
    return ".".join(_NAMES.get(piece, piece) for piece in name.split("."))


def save_model(
    model: Transformer,
    folder: Path,
    tokenizer: Tokenizer | None = None,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes a folder that transformers, vLLM and llama.cpp's converter load unchanged.

    config.json, model.safetensors, generation_config.json (every stop id), README.md and, if given, the
    tokenizer's files. `state` stands in for the model's own weights where these are sharded.
    """
    state = state or model.state_dict()
    tensors = {hf_name(name): tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    special = {} if tokenizer is None else _special_ids(tokenizer)
    with atomic_folder(Path(folder)) as out:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        _write_json(out / "config.json", {**model.config.to_hf(), **special, "dtype": dtype})
        if tokenizer is not None:
            tokenizer.save(out)
            stops = {**special, "eos_token_id": tokenizer.stop_ids}
            _write_json(out / "generation_config.json", stops)
        (out / "README.md").write_text(model_card(model.config), encoding="utf-8")


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def model_card(config: ModelConfig) -> str:
    """README.md of a model folder: what it is and how it is used."""
    return (
        "---\nlibrary_name: transformers\ntags: [danlu]\n---\n"
        f"# A language model of {parameters(config) / 1e6:.1f} million parameters\n\n"
        f"Trained with danlu. {config.n_layers} layers of width {config.width}, {config.n_heads} heads "
        f"({config.n_kv_heads} for keys and values), vocabulary {config.vocab_size}, "
        f"{config.max_positions} positions.\n\n"
        "```python\nimport danlu\nmodel, tokenizer = danlu.load('path/of/this/folder')\n```\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('path/of/this/folder')\n```\n\n"
        "What it was trained on, and how, is in `lineage.json` and `config.yaml` of its run folder.\n"
    )


def load_model(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """Loads a Hugging Face folder (one or several safetensors files).

    dtype None keeps the saved one. Raises UserError naming a tensor that is missing, unknown or of another
    shape.
    """
    folder = Path(folder)
    config = ModelConfig.from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    tensors = _read_tensors(folder)
    with torch.device("meta"):
        model = Transformer(config)
    state = _match(model, tensors, folder)
    saved = next(iter(state.values())).dtype
    model.load_state_dict(state, assign=True)
    return model.to(device=device, dtype=dtype or saved).eval()


def _match(model: Transformer, tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    state = {}
    for name, parameter in model.state_dict().items():
        tensor = tensors.pop(hf_name(name), None)
        if tensor is None:
            raise UserError(f"{folder}: no tensor {hf_name(name)}", "the file is cut, or not of this model")
        if tensor.shape != parameter.shape:
            shapes = f"{tuple(tensor.shape)}, expected {tuple(parameter.shape)}"
            raise UserError(f"{folder}: {hf_name(name)} has shape {shapes}", "compare with config.json")
        state[name] = tensor
    if model.config.tied_embeddings:
        tensors.pop("lm_head.weight", None)
    unknown = [name for name in tensors if not name.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise UserError(f"{folder}: unknown tensor {unknown[0]}", "the weights are of another architecture")
    return state


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no model.safetensors", "name a folder that holds a model")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors.update(load_file(file))
        except SafetensorError as error:
            raise UserError(f"{file}: {error}", "the file is damaged; fetch or train it again") from None
    return tensors


def resolve(ref: str | Path) -> Path:
    """The Hugging Face folder that a model reference means.

    A Hugging Face folder; a stage folder with `model/` in it; a run folder, whose last finished model is
    meant. Raises UserError when there is none.
    """
    path = Path(ref)
    if (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    stages = [done.parent for done in path.glob("*/DONE") if (done.parent / "model/config.json").is_file()]
    if not stages:
        what = "holds no model" if path.exists() else "does not exist"
        raise UserError(f"{path}: {what}", "name a Hugging Face folder or a run folder")
    return max(stages, key=lambda stage: (stage / "DONE").stat().st_mtime_ns) / "model"


def load(
    ref: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer that `ref` means: see `resolve`. dtype None keeps the saved one."""
    folder = resolve(ref)
    return load_model(folder, dtype, device), Tokenizer.load(folder)
