"""Models in llama.cpp's GGUF files: read with their quantised tensors unpacked, written as asked for.

The package `gguf` (extra [gguf]) knows the container and the quantisations; this file knows what
llama.cpp calls a model's sizes and tensors, as rows like those of `families.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from danlu.core.errors import UserError
from danlu.core.files import atomic_path
from danlu.model.config import ModelConfig, RopeScaling
from danlu.model.families import Family, names
from danlu.model.positions import rope_frequencies
from danlu.model.rules import HF, Always, Key
from danlu.model.transformer import Transformer
from danlu.model.weights import to_ours, to_theirs
from danlu.tokens.from_gguf import tokenizer_from_gguf
from danlu.tokens.to_gguf import tokenizer_to_gguf
from danlu.tokens.tokenizer import Tokenizer


def _head_width(metadata: HF) -> int:
    return metadata["embedding_length"] // metadata["attention.head_count"]


def _rounded(value: float) -> float:
    """A float32 as it was meant: 1e-5, not 9.99999975e-06."""
    return float(f"{value:.7g}")


class _Scaling:
    """Stretched rotary angles. LLaMA 3's are no keys but a tensor of divisors, here as a list."""

    def read(self, hf: HF) -> dict[str, Any]:
        kind, factor = hf.get("rope.scaling.type", "none"), hf.get("rope.scaling.factor", 1.0)
        if divisors := hf.get(_DIVISORS):
            return {"rope_scaling": _llama3(max(divisors))}
        if kind == "none" or (kind == "linear" and factor in (0, 1)):
            return {}
        if kind not in ("linear", "yarn"):
            raise UserError(f"rope.scaling.type is {kind!r}", "danlu knows none, linear and yarn")
        original = hf["rope.scaling.original_context_length"] if kind == "yarn" else 0
        return {"rope_scaling": RopeScaling(kind=kind, factor=_rounded(factor), original=original)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        scaling = config.rope_scaling
        if scaling is None:
            return {}
        if scaling.kind == "llama3":
            return {_DIVISORS: rope_divisors(config).tolist()}
        keys = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
        yarn = {"rope.scaling.original_context_length": scaling.original}
        return {**keys, **(yarn if scaling.kind == "yarn" else {})}


_DIVISORS, _DIVISORS_TENSOR = "rope_freqs", "rope_freqs.weight"
"""Of the rotary frequencies: a tensor of the file, beside the keys of the architecture."""


def _llama3(factor: float) -> RopeScaling:
    """The bounds stand in no file: they are the same in every LLaMA from 3.1 on."""
    return RopeScaling(kind="llama3", factor=_rounded(factor), original=8192, low=1.0, high=4.0)


def rope_divisors(config: ModelConfig) -> Tensor:
    """(rotated / 2,) float32: what LLaMA 3's scaling divides each frequency by."""
    plain, _ = rope_frequencies(config.rope_theta, config.head_width)
    scaled, _ = rope_frequencies(config.rope_theta, config.head_width, config.rope_scaling)
    return (plain / scaled).float()


@dataclass(frozen=True)
class _Experts:
    """Keys that a dense model must not have. `width`: the key of an expert's width, if it has its own."""

    width: str | None = None

    def read(self, hf: HF) -> dict[str, Any]:
        if not hf.get("expert_count"):
            return {}
        own = {} if self.width is None else {"expert_width": hf[self.width]}
        return {"n_experts": hf["expert_count"], "n_active": hf["expert_used_count"], **own}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        if not config.n_experts:
            return {}
        own = {} if self.width is None else {self.width: config.expert_width or config.ffn_width}
        return {"expert_count": config.n_experts, "expert_used_count": config.n_active, **own}


_SHARED = (
    Key("vocab_size", "vocab_size"),
    Key("width", "embedding_length"),
    Key("n_layers", "block_count"),
    Key("n_heads", "attention.head_count"),
    Key("n_kv_heads", "attention.head_count_kv", lambda metadata: metadata["attention.head_count"]),
    Key("ffn_width", "feed_forward_length"),
    Key("max_positions", "context_length"),
    Key("tied_embeddings", "tied"),
)
_SIZES = (
    *_SHARED,
    Key("head_width", "attention.key_length", _head_width),
    Key("norm_eps", "attention.layer_norm_rms_epsilon", 1e-5, _rounded),
    Key("rope_theta", "rope.freq_base", 10000.0, _rounded),
    _Scaling(),
)
_GPT = (
    *_SHARED,
    Key("norm_eps", "attention.layer_norm_epsilon", 1e-5, _rounded),
    Always(norm="layernorm", ffn="gelu_tanh", qkv_bias=True, out_bias=True, ffn_bias=True),
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
    "layers.{i}.ffn.router": "blk.{i}.ffn_gate_inp",
}
_QK = {"layers.{i}.attention.q": "blk.{i}.attn_q", "layers.{i}.attention.k": "blk.{i}.attn_k"}
_EXPERTS = names(
    {f"layers.{{i}}.ffn.experts.{{e}}.{n}": f"blk.{{i}}.ffn_{n}_exps" for n in ("gate", "up", "down")},
    "together",
)
_NAMES = names({**_OUTER, **_INNER})
_GPT_NAMES = names(
    {
        **_OUTER,
        **{ours: theirs for ours, theirs in _INNER.items() if not ours.endswith("attention.v")},
        "layers.{i}.attention.q layers.{i}.attention.k layers.{i}.attention.v": "blk.{i}.attn_qkv",
        "position_embedding": "position_embd",
        "embedding_norm": "token_embd_norm",
    }
)

ARCHITECTURES = (
    Family("gpt2", "gpt2", (*_GPT, Always(positions="learned")), _GPT_NAMES, ""),
    Family("bloom", "bloom", (*_GPT, Always(positions="alibi", embedding_norm=True)), _GPT_NAMES, ""),
    # Rotated pairs are neighbours, as in Meta's files. Mixtral is of this architecture too.
    Family("llama", "llama", (*_SIZES, _Experts()), names(_QK, "interleaved") + _NAMES + _EXPERTS, ""),
    Family("qwen2", "qwen2", (*_SIZES, Always(qkv_bias=True)), _NAMES + names(_QK), ""),
    Family("qwen3", "qwen3", (*_SIZES, Always(qk_norm=True)), _NAMES + names(_QK), ""),
    Family(
        "qwen3moe",
        "qwen3moe",
        (*_SIZES, _Experts("expert_feed_forward_length"), Always(qk_norm=True)),
        _NAMES + names(_QK) + _EXPERTS,
        "",
    ),
)


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
            if _DIVISORS_TENSOR in self._tensors:
                self.metadata[_DIVISORS] = self._tensors.pop(_DIVISORS_TENSOR).data.tolist()
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
    sizes |= {"tied": "output.weight" not in file.names, _DIVISORS: file.metadata.get(_DIVISORS)}
    sizes.setdefault("vocab_size", len(file.metadata.get("tokenizer.ggml.tokens") or []))
    fields: dict[str, Any] = {"family": kind}
    try:
        for rule in family.rules:
            fields |= rule.read(sizes)
        config = ModelConfig(**fields)
    except UserError as error:
        raise UserError(f"{file.where}: {kind}.{error.message}", error.remedy) from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file.where}: {error}", "the file is incomplete or damaged") from None
    divisors = sizes[_DIVISORS]
    if divisors and not torch.allclose(torch.tensor(divisors), rope_divisors(config), rtol=1e-4):
        raise UserError(f"{file.where}: {_DIVISORS_TENSOR} is not that of LLaMA 3", "danlu knows no other")
    return family, config


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


Kind = Literal["float32", "float16", "bfloat16", "q8_0"]
_KINDS: dict[Kind, tuple[str, str]] = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
"""The kind of the matrices, and what the file calls itself."""


def save_gguf(model: Transformer, tokenizer: Tokenizer, path: Path, kind: Kind = "float16") -> None:
    """Writes a file that llama.cpp runs. Matrices are of `kind`; norms, biases and routers are float32.

    Raises UserError where llama.cpp has no architecture, or no way to cut words, for what this model does.
    """
    gguf = _library()
    family, values = _express(model.config)
    arch = family.model_type
    keys = {f"{arch}.{key}": value for key, value in values.items() if key not in ("tied", _DIVISORS)}
    if model.config.positions == "rope":
        keys |= {
            f"{arch}.rope.dimension_count": model.config.head_width,
            f"{arch}.attention.value_length": model.config.head_width,
        }
    keys |= {
        "general.name": path.stem,
        "general.file_type": int(gguf.LlamaFileType[_KINDS[kind][1]]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **tokenizer_to_gguf(tokenizer, model.config.vocab_size),
    }
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    tensors = to_theirs(family, model.config, state)
    if divisors := values.get(_DIVISORS):
        tensors[_DIVISORS_TENSOR] = torch.tensor(divisors)
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, arch)
        try:
            _add_keys(writer, keys)
            for name, tensor in tensors.items():
                chosen = gguf.GGMLQuantizationType[_tensor_kind(name, tensor, kind)]
                writer.add_tensor(name, gguf.quantize(tensor.float().numpy(), chosen), raw_dtype=chosen)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _express(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The architecture that can say all of a config, and its keys."""
    for family in ARCHITECTURES:
        values: dict[str, Any] = {}
        for rule in family.rules:
            values |= rule.write(config)
        fields: dict[str, Any] = {"family": config.family}
        try:
            for rule in family.rules:
                fields |= rule.read(values)
            if ModelConfig(**fields) == config:
                return family, values
        except (UserError, KeyError, TypeError, ValueError):
            continue
    known = ", ".join(family.model_type for family in ARCHITECTURES)
    raise UserError("GGUF has no architecture with these settings together", f"danlu writes {known}")


def _tensor_kind(name: str, tensor: Tensor, kind: Kind) -> str:
    """Vectors, routers, positions are float32; a matrix whose rows are no whole blocks isn't quantised."""
    if tensor.ndim < 2 or name.endswith(("ffn_gate_inp.weight", "position_embd.weight")):
        return "F32"
    return "F16" if kind == "q8_0" and tensor.shape[-1] % 32 else _KINDS[kind][0]


def _add_keys(writer: Any, keys: Mapping[str, Any]) -> None:
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _library() -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError("the package gguf is not installed", "pip install 'danlu[gguf]'") from None
    return gguf
