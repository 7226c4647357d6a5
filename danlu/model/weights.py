"""Tensors of a published model and ours: names, layouts, and what may not be missing.

Reads and writes Hugging Face folders: one or several safetensors files, or PyTorch's `.bin`, which is
loaded as weights only, so that no code in it runs.
"""

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from danlu.core.errors import UserError
from danlu.core.files import read_json
from danlu.core.host import memory_bytes
from danlu.model.config import ModelConfig
from danlu.model.families import Family
from danlu.model.family_names import SCORE
from danlu.model.layouts import ByHead, Interleaved, Layout, PlusOne, Stacked, Together
from danlu.model.transformer import Transformer

LAYOUTS: dict[str, Layout] = {
    "stacked": Stacked(),
    "transposed": Stacked(transposed=True),
    "by_head": ByHead(),
    "interleaved": Interleaved(),
    "together": Together(),
    "plus_one": PlusOne(),
}


@dataclass(frozen=True)
class Entry:
    """One of their tensors, and ours that it holds."""

    theirs: str
    ours: tuple[str, ...]
    layout: Layout


def entries(family: Family, config: ModelConfig, ours: Mapping[str, Tensor]) -> list[Entry]:
    """The table's rows for a model with the tensors `ours`, each of which is in one entry."""
    found = []
    for row in (*family.names, SCORE):
        for place in _places(row.theirs, config):
            modules = [module.format(**place) for module in row.ours]
            if row.layout == "together":
                modules = [row.ours[0].format(**{**place, "e": e}) for e in range(config.n_experts)]
            for kind in ("weight", "bias"):
                tensors = tuple(f"{module}.{kind}" for module in modules)
                if tensors and all(name in ours for name in tensors):
                    layout = LAYOUTS[row.layout]
                    found.append(Entry(f"{row.theirs.format(**place)}.{kind}", tensors, layout))
    covered = {name for entry in found for name in entry.ours}
    if missing := ours.keys() - covered:
        raise UserError(
            f"{family.architecture} has no name for {min(missing)}", "danlu can't save this model as that"
        )
    return found


def _places(template: str, config: ModelConfig) -> Iterator[dict[str, int]]:
    layers = range(config.n_layers) if "{i}" in template else range(1)
    experts = range(config.n_experts) if "{e}" in template else range(1)
    for layer in layers:
        for expert in experts:
            yield {"i": layer, "e": expert}


def to_theirs(family: Family, config: ModelConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names, in their layout."""
    return {
        entry.theirs: entry.layout.join([ours[name] for name in entry.ours], config).contiguous()
        for entry in entries(family, config, ours)
    }


def to_ours(
    family: Family, config: ModelConfig, ours: Mapping[str, Tensor], files: "Tensors"
) -> dict[str, Tensor]:
    """Tensors from `files` under our names; `ours` gives names and shapes.

    Raises UserError naming a tensor that is missing, unknown, or of another shape.
    """
    state: dict[str, Tensor] = {}
    used = set()
    names = files.names
    for entry in entries(family, config, ours):
        name = entry.theirs if entry.theirs in names else entry.theirs.removeprefix(family.prefix)
        if name not in names:
            raise UserError(
                f"{files.where}: no tensor {entry.theirs}", "the file is cut, or not of this model"
            )
        used.add(name)
        tensor = files.read(name)
        shapes = [ours[our].shape for our in entry.ours]
        parts = entry.layout.split(tensor, shapes, config)
        if [part.shape for part in parts] != shapes:
            rows = sum(shape[0] for shape in shapes)
            expected = (rows, *shapes[0][1:])
            raise UserError(
                f"{files.where}: {name} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(reversed(expected)) if entry.layout == LAYOUTS['transposed'] else expected}",
                "its sizes and its weights don't belong together",
            )
        state |= dict(zip(entry.ours, parts, strict=True))
    _refuse_unknown(family, config, names - used, files, state)
    return state


def _refuse_unknown(
    family: Family, config: ModelConfig, rest: set[str], files: "Tensors", state: dict[str, Tensor]
) -> None:
    for name in sorted(rest):
        if name.endswith(family.ignored):
            continue
        head = name.removeprefix(family.prefix) in ("lm_head.weight", "embed_out.weight")
        if head and config.tied_embeddings and not config.scores:
            if torch.equal(files.read(name), state["embedding.weight"]):
                continue
            raise UserError(
                f"{files.where}: {name} differs from the embedding, and tie_word_embeddings is true",
                "set tie_word_embeddings to false in config.json, or mend the weights",
            )
        raise UserError(f"{files.where}: unknown tensor {name}", "the weights are of another architecture")


def empty_model(config: ModelConfig, where: str, dtype: torch.dtype | None = None) -> Transformer:
    """A model without memory, whose names and shapes `to_ours` goes by.

    Raises UserError for mad sizes, and for a model that this machine can't hold in `dtype`.
    """
    try:
        with torch.device("meta"):
            model = Transformer(config)
    except (RuntimeError, TypeError, OverflowError):
        raise UserError(f"{where}: its sizes make a matrix that no memory holds", _DAMAGED) from None
    count = sum(parameter.numel() for parameter in model.parameters())
    needed = count * (dtype or torch.bfloat16).itemsize
    if needed > memory_bytes():
        raise UserError(
            f"{where}: {count / 1e9:,.1f} billion parameters take {needed / 1e9:,.1f} GB, this machine has "
            f"{memory_bytes() / 1e9:,.1f} GB",
            "take a smaller model, or a machine with more memory",
        )
    return model


def check_range(tensors: Mapping[str, Tensor], dtype: torch.dtype, where: str) -> None:
    """Raises UserError naming a tensor with a number that would become infinite in `dtype`."""
    most = torch.finfo(dtype).max
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{where}: {name} is of {kind}", "danlu knows weights that are not quantised")
        if torch.finfo(tensor.dtype).max <= most or not tensor.numel():
            continue
        if (largest := tensor.abs().max().item()) > most:
            kind = str(dtype).removeprefix("torch.")
            raise UserError(
                f"{where}: {name} holds {largest:.6g}, and {kind} keeps no more than {most:,.6g}",
                "choose another dtype: bfloat16 or float32",
            )


class Tensors(Protocol):
    """Tensors by their names in a file or folder, which `where` names."""

    where: str

    @property
    def names(self) -> set[str]: ...

    def read(self, name: str) -> Tensor: ...


_DAMAGED = "the file is damaged; fetch or train it again"


def open_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of PyTorch's, which may hold nothing else. Raises UserError."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:
        raise UserError(
            f"{file}: holds more than tensors, which danlu does not load: it could run code",
            "ask for the weights as safetensors",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}", _DAMAGED) from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{file}: is no table of tensors", "ask for the weights as safetensors")
    return content


class TensorFiles:
    """The tensors of a folder, read when asked for; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        for file in _weight_files(folder):
            opened = self._open(file)
            self._files |= dict.fromkeys(opened.keys(), opened)

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str) -> Tensor:
        file = self._files[name]
        return file[name] if isinstance(file, dict) else file.get_tensor(name)

    def _open(self, file: Path) -> Any:
        if file.suffix != ".safetensors":
            return open_pickled(file)
        try:
            return self._stack.enter_context(safe_open(file, "pt"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: {error}", _DAMAGED) from None

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def _weight_files(folder: Path) -> list[Path]:
    """Those that an index names, else all of one kind; safetensors before `.bin`."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / name).is_file():
            index = read_json(folder / name)
            files = sorted({folder / str(file) for file in index.get("weight_map", {}).values()})
            for file in files:
                if not file.is_file():
                    raise UserError(f"{file}: named in {name}, and not there", "fetch the missing part")
            return files
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise UserError(f"{folder}: no model.safetensors", "name a folder that holds a model")


def write_shards(tensors: Mapping[str, Tensor], folder: Path, largest: int = 5 * 10**9) -> None:
    """safetensors files of at most `largest` bytes (a larger tensor has one of its own), with their index."""
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > largest:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
