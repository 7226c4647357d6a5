"""`danlu convert`: a model from one format into another, with its tokenizer."""

from pathlib import Path
from typing import Any

import torch

from danlu.core.errors import UserError
from danlu.model.checkpoint import is_adapter, load, resolve, save_model
from danlu.model.config import ConvertConfig
from danlu.model.count import parameters
from danlu.model.gguf import save_gguf
from danlu.model.weights import check_range


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Reads any model, writes a Hugging Face folder or, where `out` ends in .gguf, a file for llama.cpp.

    Raises UserError where something is there already, or the format can't say what the model is.
    """
    if config.out.exists():
        raise UserError(f"{config.out} is there already", "choose another name, or remove it")
    if is_adapter(resolve(config.source)):
        raise UserError(f"{config.source} is an adapter", "merge it into its base first: danlu merge")
    to_gguf = config.out.suffix == ".gguf"
    if config.dtype == "q8_0" and not to_gguf:
        raise UserError("q8_0 is a kind of GGUF's", "let the name end in .gguf, or choose another dtype")
    # As they are: `save_gguf` narrows the matrices alone, and a norm that was rounded here would stay so.
    model, tokenizer = load(config.source)
    saved = str(model.head_weight.dtype).removeprefix("torch.")
    if to_gguf:
        save_gguf(model, tokenizer, config.out, config.dtype or saved)  # type: ignore[arg-type]
    else:
        dtype = getattr(torch, config.dtype or saved)
        check_range(model.state_dict(), dtype, config.source)
        save_model(model.to(dtype=dtype), config.out, tokenizer)
    return {
        "source": config.source,
        "out": str(config.out),
        "parameters": parameters(model.config),
        "dtype": config.dtype or saved,
        "bytes": _size(config.out),
    }


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
