"""Adapters in and out as PEFT's files: adapter_config.json and adapter_model.safetensors.

Where a family keeps several of our matrices as one (GPT-2's c_attn), one adapter of theirs is one of each of
ours with the same A; ours with different A become one of theirs with all of them under one another.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from danlu.core.errors import UserError
from danlu.core.files import atomic_folder, read_json
from danlu.model import families
from danlu.model.config import LoraConfig, ModelConfig
from danlu.model.layouts import Layout, Stacked
from danlu.model.lora import Adapter, Frozen, adapted_layers, add_adapter, name_in_layer
from danlu.model.transformer import Transformer
from danlu.model.weights import Entry, entries

ADAPTER = "adapter_config.json"
"""The file that tells an adapter's folder."""
_PREFIX = "base_model.model."
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "modules_to_save": None,
    "layers_to_transform": None,
}
"""Settings of PEFT, with the only value of each that danlu reads."""


def save_adapter(model: Transformer, folder: Path, name: str = "default", base: str = "") -> None:
    """Writes a folder with an adapter of `model`: see `write_adapter`."""
    with atomic_folder(Path(folder)) as out:
        write_adapter(model, out, name, base)


def write_adapter(model: Transformer, folder: Path, name: str = "default", base: str = "") -> None:
    """PEFT's files into an existing folder. `base`: the model reference of what the adapter belongs to.

    Raises UserError where PEFT's files can't say what the adapter is.
    """
    layers = {key: layer for key, layer in adapted_layers(model).items() if name in layer.adapters}
    if not layers:
        raise UserError(f'no adapter is called "{name}"', "name one that was added")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for entry, modules in _matrices(model):
        adapters = [layers[module].adapter(name) for module in modules if module in layers]
        if not adapters:
            continue
        if len(adapters) < len(modules):
            raise UserError(
                f"{entry.theirs}: only a part of it is adapted",
                f"adapt all of {', '.join(name_in_layer(module) for module in modules)}",
            )
        a, b, m = _join(adapters, _rows(entry.layout), model.config)
        matrix = entry.theirs.removesuffix(".weight")
        tensors |= {f"{_PREFIX}{matrix}.lora_A.weight": a, f"{_PREFIX}{matrix}.lora_B.weight": b}
        tensors |= {} if m is None else {f"{_PREFIX}{matrix}.lora_magnitude_vector": m}
        ranks[matrix] = len(a)
        alphas[matrix] = _alpha(adapters[0].config, len(a))
    config = next(iter(layers.values())).adapter(name).config
    rank, alpha = min(ranks.values()), min(alphas.values())
    settings = {
        **_PLAIN,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {matrix: own for matrix, own in ranks.items() if own != rank},
        "alpha_pattern": {matrix: own for matrix, own in alphas.items() if own != alpha},
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": any(entry.layout == Stacked(True) for entry, _ in _matrices(model)),
        "inference_mode": True,
    }
    saved = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(saved, folder / "adapter_model.safetensors")
    (folder / ADAPTER).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def _alpha(config: LoraConfig, rank: int) -> float:
    """PEFT's α with which a matrix of this rank has the adapter's scale."""
    return config.scale * (rank**0.5 if config.rslora else rank)


def load_adapter(model: Transformer, folder: Path, name: str = "default") -> None:
    """Adds the adapter of a PEFT folder to `model`, and makes it active.

    Raises UserError for settings that danlu doesn't implement, and for an adapter of another base.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = _read(folder / "adapter_model.safetensors")
    wanted: dict[str, tuple[LoraConfig, tuple[Tensor, Tensor, Tensor | None]]] = {}
    for entry, modules in _matrices(model):
        key = _PREFIX + entry.theirs.removesuffix(".weight")
        a, b = tensors.pop(f"{key}.lora_A.weight", None), tensors.pop(f"{key}.lora_B.weight", None)
        m = tensors.pop(f"{key}.lora_magnitude_vector", None)
        if a is None or b is None:
            continue
        bases = [_base(model, module) for module in modules]
        n_in = bases[0].in_features
        own = _own_config(folder, config, entry.theirs.removesuffix(".weight"))
        rows = [torch.Size([base.out_features, own.rank]) for base in bases]
        parts = _rows(entry.layout).split(b, rows, model.config)
        if a.shape != (own.rank, n_in) or [part.shape for part in parts] != rows:
            raise UserError(
                f"{folder}: {key} is {tuple(b.shape)} × {tuple(a.shape)}, and the model's matrix "
                f"{sum(base.out_features for base in bases)} × {n_in}",
                "the adapter belongs to another base model",
            )
        lengths: Sequence[Tensor | None] = [None] * len(modules)
        if m is not None:
            lengths = _rows(entry.layout).split(m, [row[:1] for row in rows], model.config)
        for module, part, n in zip(modules, parts, lengths, strict=True):
            wanted[module] = own, (a, part, n)
    if tensors:
        raise UserError(
            f"{folder}: the model has nothing called {min(tensors).removeprefix(_PREFIX)}",
            "the adapter belongs to another base model",
        )
    if not wanted:
        raise UserError(f"{folder}: holds no matrix", "the file is damaged; fetch it again")
    targets = tuple(name_in_layer(module) for module in wanted)
    add_adapter(model, config.model_copy(update={"targets": tuple(sorted(set(targets)))}), name)
    for module, layer in adapted_layers(model).items():
        if name not in layer.adapters:
            continue
        if module not in wanted:
            raise UserError(f"{folder}: no matrix for {module}", "adapters of some layers only aren't read")
        own, values = wanted[module]
        adapter = layer.adapters[name] = Adapter(layer.base, own)
        with torch.no_grad():
            for parameter, value in zip((adapter.a, adapter.b, adapter.m), values, strict=True):
                if parameter is not None and value is not None:
                    parameter.copy_(value)


def read_config(folder: Path) -> LoraConfig:
    """The adapter_config.json of a PEFT folder. Raises UserError for what danlu doesn't implement."""
    path = Path(folder) / ADAPTER
    hf = read_json(path)
    for key, known in _PLAIN.items():
        if (found := hf.get(key, known) or known) != known:
            raise UserError(f"{path}: {key} is {found!r}", f"danlu knows {known!r} only")
    try:
        return LoraConfig(
            rank=hf["r"],
            alpha=hf["lora_alpha"],
            dropout=hf.get("lora_dropout", 0.0),
            rslora=hf.get("use_rslora", False),
            dora=hf.get("use_dora", False),
        )
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: {error}", "the file is incomplete or damaged") from None


def _own_config(folder: Path, config: LoraConfig, module: str) -> LoraConfig:
    """The settings of one of their matrices: of each kind the first pattern that matches, as PEFT does."""
    hf = read_json(folder / ADAPTER)
    own: dict[str, float] = {}
    try:
        for field, key in (("rank", "rank_pattern"), ("alpha", "alpha_pattern")):
            for pattern, value in reversed((hf.get(key) or {}).items()):
                if re.fullmatch(rf"(.*\.)?({pattern})", module):
                    own[field] = value
        return LoraConfig.model_validate({**config.model_dump(), **own})
    except (AttributeError, ValueError, re.error) as error:
        raise UserError(
            f"{folder / ADAPTER}: rank_pattern or alpha_pattern: {error}",
            "the file is damaged; fetch it again",
        ) from None


def _matrices(model: Transformer) -> list[tuple[Entry, list[str]]]:
    """The matrices of the layers by their names, each with the modules of ours that it holds."""
    with torch.device("meta"):  # the base alone, whatever stands on it or is packed in it
        names = Transformer(model.config).state_dict()
    found = []
    for entry in entries(families.family_of(model.config), model.config, names):
        matrix = entry.theirs.endswith(".weight") and all(names[our].ndim == 2 for our in entry.ours)
        if matrix and entry.ours[0].startswith("layers."):
            found.append((entry, [our.removesuffix(".weight") for our in entry.ours]))
    return found


def _base(model: Transformer, module: str) -> Frozen:
    layer = model.get_submodule(module)
    return cast(Frozen, getattr(layer, "base", layer))


def _rows(layout: Layout) -> Layout:
    """The layout of B, whose rows are those of the matrix, also where the matrix is kept transposed."""
    return Stacked() if layout == Stacked(transposed=True) else layout


def _join(
    adapters: list[Adapter], layout: Layout, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A, B and lengths of one of their matrices."""
    lengths = [adapter.m for adapter in adapters if adapter.m is not None]
    m = layout.join([length.detach() for length in lengths], config) if lengths else None
    b = [adapter.b.detach() for adapter in adapters]
    a = [adapter.a.detach() for adapter in adapters]
    if all(torch.equal(a[0], other) for other in a):
        return a[0], layout.join(b, config), m
    places = [torch.zeros(len(part), len(adapters), part.shape[1]) for part in b]
    for number, (place, part) in enumerate(zip(places, b, strict=True)):
        place[:, number] = part
    return torch.cat(a), layout.join([place.flatten(1) for place in places], config), m


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise UserError(f"{file}: not there", "name a folder with adapter_model.safetensors")
    try:
        tensors: Mapping[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file}: {error}", "the file is damaged; fetch it again") from None
    lengths = ".lora_magnitude_vector"
    return {name.replace(f"{lengths}.weight", lengths): tensor for name, tensor in tensors.items()}
