"""Models in and out, and the resolution of a model reference."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from danlu.core.artefacts import artefacts, digest
from danlu.core.errors import UserError
from danlu.core.files import atomic_folder, read_json
from danlu.model import families, hub, meta, weights
from danlu.model.adapters import ADAPTER, load_adapter, write_adapter
from danlu.model.aliases import ALIASES, alias_of, packaged
from danlu.model.config import ModelConfig
from danlu.model.count import parameters
from danlu.model.gguf import GgufFile, load_gguf, read_config
from danlu.model.meta import META, MetaFiles
from danlu.model.quantised import quantise
from danlu.model.transformer import Transformer
from danlu.tokens.load import load_tokenizer
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
    if model.config.scores and tokenizer is not None:
        # transformers reads the score of the last token that isn't padding: never of one that ends a reply.
        ends = {*tokenizer.stop_ids, tokenizer.eos_id}
        others = [number for number in tokenizer.special_ids.values() if number not in ends]
        special["pad_token_id"] = min(others, default=None)
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
    if tokenizer is None:
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    eos = None if tokenizer.eos is None else tokenizer.eos_id
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos, "pad_token_id": eos}


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
    """Loads a Hugging Face folder of a family that danlu knows (`families.py`), or one of Meta's.

    dtype None keeps the saved one, and is float32 where there are several. Raises UserError naming a
    setting that danlu does not implement, or a tensor that is missing, unknown, of another shape, or beyond
    the range of `dtype`.
    """
    folder = Path(folder)
    model = weights.empty_model(folder_sizes(folder), str(folder), dtype)
    if is_meta(folder):
        state = weights.to_ours(META, model.config, model.state_dict(), MetaFiles(folder))
    else:
        family = families.find(read_json(folder / "config.json"), str(folder / "config.json"))
        with weights.TensorFiles(folder) as files:
            state = weights.to_ours(family, model.config, model.state_dict(), files)
    dtypes = {tensor.dtype for tensor in state.values()}
    saved = dtypes.pop() if len(dtypes) == 1 else torch.float32
    weights.check_range(state, dtype or saved, str(folder))
    model.load_state_dict(state, assign=True)
    return model.to(device=device, dtype=dtype or saved).eval()


def folder_sizes(folder: Path) -> ModelConfig:
    """The sizes of the model in a folder of Hugging Face's or Meta's."""
    if is_meta(folder):
        return meta.read_config(MetaFiles(folder))
    return families.from_hf(read_json(folder / "config.json"), str(folder / "config.json"))


def is_meta(folder: Path) -> bool:
    """Whether it is a folder as Meta gives LLaMA out."""
    return (folder / meta.PARAMS).is_file() and not (folder / "config.json").is_file()


def resolve(ref: str | Path) -> Path:
    """The Hugging Face folder or GGUF file that a model reference means.

    A Hugging Face folder, or one of Meta's; a folder of PEFT's with an adapter; a stage folder with `model/`
    or `adapter/` in it; a run folder, whose last finished model is meant; a `.gguf` file; an alias; an id of
    the Hugging Face hub (owner/name), which is fetched. Raises UserError when there is none.
    """
    path = Path(ref)
    if str(ref) in ALIASES and not path.exists():
        return packaged(str(ref))
    if path.suffix == ".gguf" or (path / "config.json").is_file() or is_adapter(path) or is_meta(path):
        return path
    if made := _made_by(path):
        return made
    stages = [done.parent for done in path.glob("*/DONE") if _made_by(done.parent)]
    if not stages and not path.exists() and hub.is_hub_id(str(ref)):
        return hub.fetch(str(ref))
    if not stages:
        what = "holds no model" if path.exists() else "does not exist"
        raise UserError(f"{path}: {what}", "name a Hugging Face folder, a run folder or a .gguf file")
    latest = max(stages, key=lambda stage: (stage / "DONE").stat().st_mtime_ns)
    return _made_by(latest) or latest


def _made_by(stage: Path) -> Path | None:
    """The model, or the adapter, that a stage has written."""
    if (stage / "model" / "config.json").is_file():
        return stage / "model"
    return stage / "adapter" if is_adapter(stage / "adapter") else None


def is_adapter(path: Path) -> bool:
    """Whether it is a folder with an adapter instead of a model of its own."""
    return (path / ADAPTER).is_file() and not (path / "config.json").is_file()


def load(
    ref: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer that `ref` means: see `resolve`. dtype None keeps the saved one."""
    path = resolve(ref)
    if path.suffix == ".gguf":
        return load_gguf(path, dtype, device)
    if is_adapter(path):
        return _load_adapted(path, dtype, device)
    return load_model(path, dtype, device), load_tokenizer(_tokenizer_of(path))


def _tokenizer_of(folder: Path) -> Path:
    """Meta gives out one tokenizer.model for several sizes, in the folder above theirs."""
    above = folder.absolute().parent / meta.TOKENIZER
    alone = is_meta(folder) and not (folder / meta.TOKENIZER).is_file()
    return above if alone and above.is_file() else folder


def sizes_of(ref: str | Path) -> ModelConfig:
    """The sizes of the model that `ref` means, without its weights."""
    path = resolve(ref)
    if is_adapter(path):
        path = find_base(path)[0]
    if path.suffix == ".gguf":
        return read_config(GgufFile(path))[1]
    return folder_sizes(path)


BASE = "danlu_base.json"
"""In an adapter's folder: what it stands on. PEFT's own file can't say which content, nor how it was kept."""


def base_digest(base: Path) -> str:
    """SHA-256 of what decides a model's logits: weights and config, not its README."""
    files = artefacts(base)
    kinds = ("config.json", ".safetensors", ".bin")
    return digest({name: facts for name, facts in files.items() if base.is_file() or name.endswith(kinds)})


def save_adapted(
    model: Transformer, folder: Path, tokenizer: Tokenizer, base: Path, kept: Literal["none", "int8", "nf4"]
) -> None:
    """Writes an adapter with all that `load` needs: PEFT's files, the tokenizer's, and `danlu_base.json`.

    `base`: the model that it was trained on, as `resolve` gives it; `kept`: how its matrices were quantised.
    """
    alias = alias_of(base)
    made = {
        "reference": alias or str(base.absolute()),
        "relative": None if alias else os.path.relpath(base, folder),
        "sha256": base_digest(base),
        "quantise": kept,
    }
    with atomic_folder(folder) as out:
        write_adapter(model, out, base=made["reference"] or "")
        tokenizer.save(out)
        _write_json(out / BASE, made)


def find_base(folder: Path) -> tuple[Path, Literal["none", "int8", "nf4"]]:
    """The base of an adapter's folder, and how its matrices are kept.

    Raises UserError where it is gone, is an adapter itself, or isn't what the adapter was trained on.
    """
    if not (folder / BASE).is_file():
        named = read_json(folder / ADAPTER).get("base_model_name_or_path")
        return _plain(resolve(named or ""), folder), "none"
    made = read_json(folder / BASE)
    places = [folder / made["relative"]] if made["relative"] else []
    found = [place for place in [*places, Path(made["reference"])] if place.exists() or str(place) in ALIASES]
    if not found:
        raise UserError(
            f"{folder}: its base {made['reference']} is gone",
            f"bring it back, or write where it is now as reference into {folder / BASE}",
        )
    base = _plain(resolve(found[0]), folder)
    if base_digest(base) != made["sha256"]:
        raise UserError(
            f"{base} has another content than the base that {folder} was trained on",
            f"bring the old one back, and write where it is as reference into {folder / BASE}",
        )
    return base, made["quantise"]


def _plain(base: Path, folder: Path) -> Path:
    if is_adapter(base):
        raise UserError(f"{folder}: its base {base} is an adapter itself", "merge that first: danlu merge")
    return base


def _load_adapted(
    folder: Path, dtype: torch.dtype | None, device: torch.device | str
) -> tuple[Transformer, Tokenizer]:
    """The base with the adapter on it, kept as it was in training."""
    base, kept = find_base(folder)
    model, own = load(base, dtype if kept == "none" else torch.float32)
    quantise(model, kept)
    load_adapter(model, folder)
    model.to(device=device, dtype=dtype)
    return model.eval(), load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else own
