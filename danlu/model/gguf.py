"""Models in llama.cpp's GGUF files: read with their quantised tensors unpacked, written as asked for.

The package `gguf` (extra [gguf]) knows the container and the quantisations, `gguf_architectures.py` what
llama.cpp calls a model's sizes and tensors. A key of the architecture that no rule asks for is an error,
unless its value changes nothing.
"""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from danlu.core.config import explain
from danlu.core.errors import UserError
from danlu.core.files import atomic_path
from danlu.model.config import ModelConfig
from danlu.model.families import Family
from danlu.model.gguf_architectures import (
    ARCHITECTURES,
    DAMAGED,
    DIVISORS,
    NEUTRAL,
    ROPE_LISTS,
    SAY_NOTHING,
    rope_divisors,
)
from danlu.model.gguf_header import check_header
from danlu.model.transformer import Transformer
from danlu.model.weights import check_range, empty_model, to_ours, to_theirs
from danlu.tokens.from_gguf import tokenizer_from_gguf
from danlu.tokens.to_gguf import tokenizer_to_gguf
from danlu.tokens.tokenizer import Tokenizer


class GgufFile:
    """An open GGUF file: `metadata` by full key, and its tensors in float32. Raises UserError."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        gguf = _library()
        if not path.is_file():
            raise UserError(f"{path}: no such file", "check the path")
        try:
            check_header(path, gguf.GGML_QUANT_SIZES)
            reader = gguf.GGUFReader(path)
            self.metadata = {key: field.contents() for key, field in reader.fields.items()}
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        except Exception as error:  # of a damaged file the library raises whatever comes up
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path}: not a whole GGUF file: {text}", "fetch it again") from None
        if (parts := self.metadata.get("split.count", 1)) not in (0, 1):
            raise UserError(
                f"{path}: one of {parts} parts", "put them together first: llama-gguf-split --merge"
            )
        for name in ROPE_LISTS:
            if f"{name}.weight" in self._tensors:
                self.metadata[name] = self.read(f"{name}.weight").flatten().tolist()
                del self._tensors[f"{name}.weight"]

    @property
    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

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


class _Asked(dict[str, Any]):
    """Remembers which keys the rules have asked for."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)


def read_config(file: GgufFile) -> tuple[Family, ModelConfig]:
    """The sizes of the model. Raises UserError for an architecture or setting that danlu doesn't know."""
    kind = file.metadata.get("general.architecture")
    family = next((row for row in ARCHITECTURES if row.model_type == kind), None)
    if family is None:
        known = ", ".join(row.model_type for row in ARCHITECTURES)
        raise UserError(f"{file.where}: architecture {kind!r}", f"danlu reads {known} from GGUF")
    prefix = f"{kind}."
    sizes = _Asked(
        {key.removeprefix(prefix): v for key, v in file.metadata.items() if key.startswith(prefix)}
    )
    entries = len(file.metadata.get("tokenizer.ggml.tokens") or [])
    sizes["tied"] = "output.weight" not in file.names
    sizes.setdefault("vocab_size", entries)
    for name in ROPE_LISTS:
        if name in file.metadata:
            sizes[name] = file.metadata[name]
    _check_layers(file, sizes)
    fields: dict[str, Any] = {"family": kind}
    try:
        for rule in family.rules:
            fields |= rule.read(sizes)
        config = ModelConfig(**fields)
    except UserError as error:
        remedy = DAMAGED if error.message.endswith("is missing") else error.remedy
        raise UserError(f"{file.where}: {kind}.{error.message}", remedy) from None
    except ValidationError as error:
        raise UserError(explain(error, ModelConfig, file.where), DAMAGED) from None
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        text = f"{kind}.{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{file.where}: {text}", DAMAGED) from None
    _check_silent(file, family.model_type, sizes)
    if entries > config.vocab_size:
        raise UserError(
            f"{file.where}: the tokenizer has {entries} entries, the model {config.vocab_size}", DAMAGED
        )
    if config.n_experts:
        _check_experts(file, config.n_experts)
    if (divisors := sizes.get(DIVISORS)) is not None:
        _check_divisors(file, config, torch.tensor(divisors))
    return family, config


def _check_layers(file: GgufFile, sizes: Mapping[str, Any]) -> None:
    """Before anything is made for each layer: a lying count would eat time and memory."""
    layers = {name.split(".")[1] for name in file.names if name.startswith("blk.")}
    count = sizes.get("block_count", 0)
    if not isinstance(count, int) or count > len(layers):
        raise UserError(f"{file.where}: tensors of {len(layers)} layers, and block_count is {count}", DAMAGED)


def _check_silent(file: GgufFile, kind: str, sizes: _Asked) -> None:
    """Refuses what the file says and no rule has asked for."""
    for key in sorted(sizes.keys() - sizes.asked):
        if key in ROPE_LISTS:
            raise UserError(f"{file.where}: unknown tensor {key}.weight", f"danlu knows none in {kind}")
        if key not in SAY_NOTHING and sizes[key] not in NEUTRAL.get(key, (0,)):
            raise UserError(
                f"{file.where}: {kind}.{key} is {reprlib.repr(sizes[key])}",
                f"danlu doesn't know that in {kind}",
            )


def _check_experts(file: GgufFile, n_experts: int) -> None:
    name = "blk.0.ffn_gate_exps.weight"
    if name not in file.names:
        raise UserError(f"{file.where}: no tensor {name}", "the file is cut, or not of this model")
    if (shape := file.shape(name))[0] != n_experts:
        raise UserError(f"{file.where}: {name} has shape {shape}, and expert_count is {n_experts}", DAMAGED)


def _check_divisors(file: GgufFile, config: ModelConfig, divisors: Tensor) -> None:
    rotated = config.rope_width or config.head_width
    where = f"{file.where}: {DIVISORS}.weight"
    if len(divisors) != rotated // 2:
        raise UserError(f"{where} holds {len(divisors)} numbers, expected {rotated // 2}", DAMAGED)
    if not torch.allclose(divisors, rope_divisors(config), rtol=1e-4):
        raise UserError(f"{where} is not that of LLaMA 3", "danlu knows no other")


def load_gguf(
    path: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer of a GGUF file; dtype None = float32, to which its tensors are unpacked.

    Raises UserError naming a setting that danlu doesn't know, or a tensor that is missing, unknown, of
    another shape, or beyond the range of `dtype`.
    """
    file = GgufFile(path)
    family, config = read_config(file)
    tokenizer = tokenizer_from_gguf(file.metadata, str(path))
    model = empty_model(config, str(path), dtype)
    state = to_ours(family, config, model.state_dict(), file)
    check_range(state, dtype or torch.float32, str(path))
    model.load_state_dict(state, assign=True)
    return model.to(device=device, dtype=dtype or torch.float32).eval(), tokenizer


Kind = Literal["float32", "float16", "bfloat16", "q8_0"]
_KINDS: dict[Kind, tuple[str, str]] = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
"""The kind of the matrices, and what the file calls itself."""
_LARGEST = {
    "F16": torch.finfo(torch.float16).max,
    "BF16": torch.finfo(torch.bfloat16).max,
    "Q8_0": 127 * torch.finfo(torch.float16).max,
    "F32": torch.finfo(torch.float32).max,
}
"""The largest number that a kind keeps; a block of Q8_0 has a scale in float16."""


def save_gguf(model: Transformer, tokenizer: Tokenizer, path: Path, kind: Kind = "float16") -> None:
    """Writes a file that llama.cpp runs. Matrices are of `kind`; norms, biases and routers are float32.

    Raises UserError where llama.cpp has no architecture, or no way to cut words, for what this model does,
    and naming a tensor that `kind` can't hold.
    """
    gguf = _library()
    if kind not in _KINDS:
        raise UserError(f"GGUF keeps no weights as {kind}", f"choose a dtype: {', '.join(_KINDS)}")
    family, values = _express(model.config)
    arch = family.model_type
    lists = {name: values[name] for name in ROPE_LISTS if name in values}
    keys = {
        **{f"{arch}.{key}": value for key, value in values.items() if key not in ("tied", *lists)},
        "general.name": path.stem,
        "general.file_type": int(gguf.LlamaFileType[_KINDS[kind][1]]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **tokenizer_to_gguf(tokenizer, model.config.vocab_size),
    }
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    tensors = to_theirs(family, model.config, state)
    tensors |= {f"{name}.weight": torch.tensor(values) for name, values in lists.items()}
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, arch)
        try:
            _add_keys(writer, keys)
            for name, tensor in tensors.items():
                chosen = _tensor_kind(name, tensor, kind)
                _check_largest(name, tensor, chosen)
                packed = gguf.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[chosen])
                writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType[chosen])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _check_largest(name: str, tensor: Tensor, chosen: str) -> None:
    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    if largest > _LARGEST[chosen]:
        raise UserError(
            f"{name} holds {largest:.6g}, and {chosen} keeps no more than {_LARGEST[chosen]:,.6g}",
            "choose another dtype: bfloat16 or float32",
        )


def _express(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The architecture that can say all of a config, and its keys."""
    ours, differing = _said(config), set(ModelConfig.model_fields)
    for family in ARCHITECTURES:
        fields: dict[str, Any] = {"family": config.family}
        values: dict[str, Any] = {}
        try:
            for rule in family.rules:
                values |= rule.write(config)
            for rule in family.rules:
                fields |= rule.read(values)
            theirs = _said(ModelConfig(**fields))
        except (UserError, KeyError, TypeError, ValueError, ArithmeticError):
            continue
        if theirs == ours:
            return family, values
        differing = min(differing, {key for key in ours if ours[key] != theirs[key]}, key=len)
    known = ", ".join(family.model_type for family in ARCHITECTURES)
    fault = "GGUF has no architecture with these settings together"
    raise UserError(
        f"{fault}; the nearest differs in {', '.join(sorted(differing))}",
        f"danlu writes {known}, and nothing that llama.cpp would ignore in them",
    )


def _said(config: ModelConfig) -> Any:
    """What a config says, to the digits that a file's float32 keeps."""
    return _digits({**config.model_dump(exclude={"family"}), "attention_scale": config.score_scale})


def _digits(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _digits(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_digits(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


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
