"""Models in llama.cpp's GGUF files, read with their quantised tensors unpacked.

The package `gguf` (extra [gguf]) knows the container and the quantisations; this file knows what
llama.cpp calls a model's sizes and tensors, as rows like those of `families.py`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danlu.core.errors import UserError
from danlu.model.config import ModelConfig
from danlu.model.families import Family, names
from danlu.model.rules import HF, Always, Key, Only
from danlu.model.transformer import Transformer
from danlu.model.weights import to_ours
from danlu.tokens.from_gguf import tokenizer_from_gguf
from danlu.tokens.tokenizer import Tokenizer


def _head_width(metadata: HF) -> int:
    return metadata["embedding_length"] // metadata["attention.head_count"]


def _rounded(value: float) -> float:
    """A float32 as it was meant: 1e-5, not 9.99999975e-06."""
    return float(f"{value:.7g}")


_SIZES = (
    Key("vocab_size", "vocab_size"),
    Key("width", "embedding_length"),
    Key("n_layers", "block_count"),
    Key("n_heads", "attention.head_count"),
    Key("n_kv_heads", "attention.head_count_kv", lambda metadata: metadata["attention.head_count"]),
    Key("head_width", "attention.key_length", _head_width),
    Key("ffn_width", "feed_forward_length"),
    Key("max_positions", "context_length"),
    Key("norm_eps", "attention.layer_norm_rms_epsilon", 1e-5, _rounded),
    Key("rope_theta", "rope.freq_base", 10000.0, _rounded),
    Key("tied_embeddings", "tied"),
    Only(**{"rope.scaling.type": "none", "expert_count": 0}),
)
_OUTER = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}
_INNER = {
    "layers.{i}.attention_norm": "blk.{i}.attn_norm",
    "layers.{i}.ffn_norm": "blk.{i}.ffn_norm",
    "layers.{i}.attention.v": "blk.{i}.attn_v",
    "layers.{i}.attention.out": "blk.{i}.attn_output",
    "layers.{i}.attention.q_norm": "blk.{i}.attn_q_norm",
    "layers.{i}.attention.k_norm": "blk.{i}.attn_k_norm",
    "layers.{i}.ffn.gate": "blk.{i}.ffn_gate",
    "layers.{i}.ffn.up": "blk.{i}.ffn_up",
    "layers.{i}.ffn.down": "blk.{i}.ffn_down",
}
_QK = {"layers.{i}.attention.q": "blk.{i}.attn_q", "layers.{i}.attention.k": "blk.{i}.attn_k"}

ARCHITECTURES = (
    # Rotated pairs are neighbours, as in Meta's files.
    Family("llama", "llama", _SIZES, names(_QK, "interleaved") + names({**_OUTER, **_INNER}), ""),
    Family(
        "qwen2", "qwen2", (*_SIZES, Always(qkv_bias=True)), names({**_OUTER, **_INNER, **_QK}), ""
    ),
    Family("qwen3", "qwen3", (*_SIZES, Always(qk_norm=True)), names({**_OUTER, **_INNER, **_QK}), ""),
)  # fmt: skip


class GgufFile:
    """An open GGUF file: `metadata` by full key, and its tensors in float32. Raises UserError."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        gguf = _library()
        if not path.is_file():
            raise UserError(f"{path}: no such file", "check the path")
        try:
            reader = gguf.GGUFReader(path)
            self.metadata = {key: field.contents() for key, field in reader.fields.items()}
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        except Exception as error:  # of a damaged file the library raises whatever comes up
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path}: not a whole GGUF file: {text}", "fetch it again") from None

    @property
    def names(self) -> set[str]:
        return set(self._tensors)

    def read(self, name: str) -> Tensor:
        """The tensor in float32, in the usual order of dimensions."""
        tensor = self._tensors[name]
        try:
            values = _library().dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            kind = tensor.tensor_type.name
            raise UserError(
                f"{self.where}: {name} is of kind {kind}: {error}", "ask for another kind"
            ) from None
        return torch.from_numpy(values.astype("float32", copy=True))


def read_config(file: GgufFile) -> tuple[Family, ModelConfig]:
    """The sizes of the model. Raises UserError for an architecture or setting that danlu doesn't know."""
    kind = file.metadata.get("general.architecture")
    family = next((row for row in ARCHITECTURES if row.model_type == kind), None)
    if family is None:
        known = ", ".join(row.model_type for row in ARCHITECTURES)
        raise UserError(f"{file.where}: architecture {kind!r}", f"danlu reads {known} from GGUF")
    prefix = f"{kind}."
    sizes = {key.removeprefix(prefix): v for key, v in file.metadata.items() if key.startswith(prefix)}
    sizes["tied"] = "output.weight" not in file.names
    sizes.setdefault("vocab_size", len(file.metadata.get("tokenizer.ggml.tokens") or []))
    fields: dict[str, Any] = {"family": kind}
    try:
        for rule in family.rules:
            fields |= rule.read(sizes)
        return family, ModelConfig(**fields)
    except UserError as error:
        raise UserError(f"{file.where}: {kind}.{error.message}", error.remedy) from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file.where}: {error}", "the file is incomplete or damaged") from None


def load_gguf(
    path: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer of a GGUF file; dtype None = float32, to which its tensors are unpacked."""
    file = GgufFile(path)
    family, config = read_config(file)
    tokenizer = tokenizer_from_gguf(file.metadata, str(path))
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(to_ours(family, config, model.state_dict(), file), assign=True)
    return model.to(device=device, dtype=dtype or torch.float32).eval(), tokenizer


def _library() -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError("the package gguf is not installed", "pip install 'danlu[gguf]'") from None
    return gguf
