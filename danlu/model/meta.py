"""LLaMA's weights as Meta gives them out: params.json and consolidated.NN.pth, one file for each process of
the tensor parallelism that they were trained with.
"""

import math
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from danlu.core.config import Config, explain, make_config
from danlu.core.errors import UserError
from danlu.core.files import read_json
from danlu.model.config import ModelConfig, RopeScaling
from danlu.model.families import Family
from danlu.model.family_names import names
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


_LARGEST = 2**31
_Size = Annotated[int, Field(ge=1, le=_LARGEST)]
_Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Params(Config):
    """params.json, of LLaMA 1 to 3.2. A key that stands in none of theirs is an error."""

    dim: _Size = Field(description="width of the residual stream")
    n_layers: _Size = Field(description="blocks of attention and feed-forward")
    n_heads: _Size = Field(description="query heads")
    n_kv_heads: _Size | None = Field(None, description="key and value heads; null = n_heads")
    vocab_size: int = Field(-1, description="-1: that of the tokenizer")
    multiple_of: _Size = Field(256, description="of this the feed-forward's width is a multiple")
    ffn_dim_multiplier: _Factor | None = Field(None, description="factor of the feed-forward's width")
    norm_eps: _Factor = Field(1e-5, description="epsilon of the norms")
    rope_theta: _Factor = Field(10000.0, description="base of the rotary angles")
    max_seq_len: _Size | None = Field(None, description="longest sequence, in tokens")
    max_batch_size: int | None = Field(None, description="of Meta's own program")
    use_scaled_rope: bool = Field(False, description="whether the angles are LLaMA 3.1's")
    rope_scaling_factor: _Factor = Field(8.0, description="how many times longer the context becomes")
    high_freq_factor: _Factor = Field(4.0, description="turns from which a frequency stays as it is")


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
        self.params = _read_params(folder / PARAMS)
        self._parts: list[dict[str, Tensor]] = [open_pickled(file) for file in files]
        for file, part in zip(files, self._parts, strict=True):
            if part.keys() != self._parts[0].keys():
                raise UserError(f"{file}: holds other tensors than {files[0].name}", _APART)

    @property
    def names(self) -> set[str]:
        return set(self._parts[0])

    def read(self, name: str) -> Tensor:
        parts = [part[name] for part in self._parts]
        if parts[0].ndim < 2 or len(parts) == 1:
            if not all(_is_copy(part, parts[0]) for part in parts[1:]):
                raise UserError(f"{self.where}: {name} differs from part to part", _APART)
            return parts[0]
        by_input = name.endswith(_CUT_BY_INPUT)
        if name == "tok_embeddings.weight":  # by width before LLaMA 3, by entries since
            by_input = parts[0].shape[1] < self.params.dim
        try:
            return torch.cat(parts, dim=1 if by_input else 0)
        except (RuntimeError, IndexError):
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise UserError(f"{self.where}: the parts of {name} have shapes {shapes}", _APART) from None


def _is_copy(a: Tensor, b: Tensor) -> bool:
    """Whether two parts hold one vector; processes that each train their copy may drift apart a little."""
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-3)


_APART = "they don't belong together; fetch them again"


def _read_params(file: Path) -> Params:
    try:
        return make_config(Params, read_json(file), str(file))
    except UserError as error:
        remedy = error.remedy or "the file is incomplete, damaged, or of another model"
        raise UserError(error.message, remedy) from None


def read_config(files: MetaFiles) -> ModelConfig:
    """The sizes in params.json, and those that only the tensors tell. Raises UserError."""
    where, params = f"{files.where}/{PARAMS}", files.params
    # Before anything is made for each layer: a lying number would eat time and memory.
    layers = {name.split(".")[1] for name in files.names if name.startswith("layers.")}
    if params.n_layers > len(layers):
        raise UserError(
            f"{where}: tensors of {len(layers)} layers, and n_layers is {params.n_layers}",
            "the folder is incomplete",
        )
    own_head = "output.weight" in files.names
    name = "output.weight" if own_head else "tok_embeddings.weight"
    if name not in files.names:
        raise UserError(f"{files.where}: no tensor {name}", "the folder is incomplete")
    head = files.read(name)
    if head.ndim != 2:
        raise UserError(f"{files.where}: {name} has shape {tuple(head.shape)}", "the folder is damaged")
    if params.vocab_size not in (-1, head.shape[0]):
        raise UserError(
            f"{where}: vocab_size is {params.vocab_size}, and {name} has {head.shape[0]} rows", _APART
        )
    try:
        return ModelConfig(
            vocab_size=head.shape[0],
            width=params.dim,
            n_layers=params.n_layers,
            n_heads=params.n_heads,
            n_kv_heads=params.n_kv_heads or params.n_heads,
            ffn_width=ffn_width(params.dim, params.multiple_of, params.ffn_dim_multiplier),
            max_positions=_max_positions(params),
            rope_theta=params.rope_theta,
            rope_scaling=_scaling(params),
            norm_eps=params.norm_eps,
            tied_embeddings=not own_head,
        )
    except ValidationError as error:
        raise UserError(
            explain(error, ModelConfig, where), "the file is damaged, or of another model"
        ) from None
    except OverflowError:
        raise UserError(
            f"{where}: ffn_dim_multiplier is {params.ffn_dim_multiplier}", "the file is damaged"
        ) from None


def ffn_width(width: int, multiple_of: int, factor: float | None) -> int:
    """Two thirds of four widths (Touvron et al. 2023, section 2.2), times a factor, up to a multiple."""
    inner = 2 * 4 * width // 3
    if factor is not None:
        inner = int(factor * inner)
    return multiple_of * math.ceil(inner / multiple_of)


def _max_positions(params: Params) -> int:
    """No file says it: 2,048 of LLaMA 1 (which alone has an epsilon of 1e-6), 4,096 of 2, then 8,192."""
    if params.max_seq_len:
        return params.max_seq_len
    if params.use_scaled_rope:
        return 131072
    if params.rope_theta > 10000:
        return 8192
    return 2048 if params.norm_eps == 1e-6 else 4096


def _scaling(params: Params) -> RopeScaling | None:
    """LLaMA 3.1's, whose numbers stand in Meta's code; 3.2 writes its factor down."""
    if not params.use_scaled_rope:
        return None
    factor, high = params.rope_scaling_factor, params.high_freq_factor
    return RopeScaling(kind="llama3", factor=factor, original=8192, low=1.0, high=high)
