"""LLaMA's weights as Meta gives them out: params.json and consolidated.NN.pth, one file for each process of
the tensor parallelism that they were trained with.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danlu.core.errors import UserError
from danlu.core.files import read_json
from danlu.model.config import ModelConfig, RopeScaling
from danlu.model.families import Family, names
from danlu.model.weights import open_pickled

PARAMS = "params.json"
TOKENIZER = "tokenizer.model"
_OUTER = {"embedding": "tok_embeddings", "norm": "norm", "head": "output"}
_INNER = {
    "layers.{i}.attention_norm": "layers.{i}.attention_norm",
    "layers.{i}.ffn_norm": "layers.{i}.ffn_norm",
    "layers.{i}.attention.v": "layers.{i}.attention.wv",
    "layers.{i}.attention.out": "layers.{i}.attention.wo",
    "layers.{i}.ffn.gate": "layers.{i}.feed_forward.w1",
    "layers.{i}.ffn.up": "layers.{i}.feed_forward.w3",
    "layers.{i}.ffn.down": "layers.{i}.feed_forward.w2",
}
_QK = {
    "layers.{i}.attention.q": "layers.{i}.attention.wq",
    "layers.{i}.attention.k": "layers.{i}.attention.wk",
}
META = Family(
    "meta", "Meta's LLaMA", (), names(_QK, "interleaved") + names({**_OUTER, **_INNER}), "", ("rope.freqs",)
)
_CUT_BY_INPUT = ("wo.weight", "w2.weight")
"""Matrices of which a file holds columns; of the others it holds rows, and norms are whole in each."""


class MetaFiles:
    """The tensors of a folder of Meta's, put together from their parts. Raises UserError."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        files = sorted(folder.glob("consolidated.*.pth"))
        for number, file in enumerate(files):
            if file.name != f"consolidated.{number:02}.pth":
                raise UserError(f"{folder}: consolidated.{number:02}.pth is not there", "fetch all its parts")
        if not files:
            raise UserError(f"{folder}: no consolidated.00.pth beside {PARAMS}", "fetch the weights too")
        self.params = read_json(folder / PARAMS)
        self._parts: list[dict[str, Tensor]] = [open_pickled(file) for file in files]
        for file, part in zip(files, self._parts, strict=True):
            if part.keys() != self._parts[0].keys():
                raise UserError(
                    f"{file}: holds other tensors than {files[0].name}", "they don't belong together"
                )

    @property
    def names(self) -> set[str]:
        return set(self._parts[0])

    def read(self, name: str) -> Tensor:
        parts = [part[name] for part in self._parts]
        if parts[0].ndim < 2 or len(parts) == 1:
            return parts[0]
        by_input = name.endswith(_CUT_BY_INPUT)
        if name == "tok_embeddings.weight":  # by width before LLaMA 3, by entries since
            by_input = parts[0].shape[1] < self.params.get("dim", 0)
        return torch.cat(parts, dim=1 if by_input else 0)


def read_config(files: MetaFiles) -> ModelConfig:
    """The sizes in params.json, and those that only the tensors tell. Raises UserError."""
    where, params = f"{files.where}/{PARAMS}", files.params
    try:
        width, heads = params["dim"], params["n_heads"]
        head = files.read("output.weight" if "output.weight" in files.names else "tok_embeddings.weight")
        return ModelConfig(
            vocab_size=head.shape[0],
            width=width,
            n_layers=params["n_layers"],
            n_heads=heads,
            n_kv_heads=params.get("n_kv_heads") or heads,
            ffn_width=ffn_width(width, params.get("multiple_of", 256), params.get("ffn_dim_multiplier")),
            max_positions=_max_positions(params),
            rope_theta=params.get("rope_theta", 10000.0),
            rope_scaling=_scaling(params),
            norm_eps=params.get("norm_eps", 1e-5),
            tied_embeddings="output.weight" not in files.names,
        )
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]} is missing", "the file is incomplete") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}", "the file is damaged, or of another model") from None


def ffn_width(width: int, multiple_of: int, factor: float | None) -> int:
    """Two thirds of four widths (Touvron et al. 2023, section 2.2), times a factor, up to a multiple."""
    inner = 2 * 4 * width // 3
    if factor is not None:
        inner = int(factor * inner)
    return multiple_of * math.ceil(inner / multiple_of)


def _max_positions(params: dict[str, Any]) -> int:
    """No file says it: 2,048 of LLaMA 1 (which alone has an epsilon of 1e-6), 4,096 of 2, then 8,192."""
    if params.get("max_seq_len"):
        return params["max_seq_len"]
    if params.get("use_scaled_rope"):
        return 131072
    if params.get("rope_theta", 10000.0) > 10000:
        return 8192
    return 2048 if params.get("norm_eps", 1e-5) == 1e-6 else 4096


def _scaling(params: dict[str, Any]) -> RopeScaling | None:
    """LLaMA 3.1's, whose numbers stand in Meta's code; 3.2 writes its factor down."""
    if not params.get("use_scaled_rope"):
        return None
    factor, high = params.get("rope_scaling_factor", 8.0), params.get("high_freq_factor", 4.0)
    return RopeScaling(kind="llama3", factor=factor, original=8192, low=1.0, high=high)
