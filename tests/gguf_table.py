"""Small models of every architecture that danlu writes as GGUF, and files with something changed."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from danlu.model.config import ModelConfig
from danlu.model.transformer import Transformer
from danlu.tokens.bpe import train_bpe
from danlu.tokens.tokenizer import Tokenizer

IDS = torch.randint(0, 300, (2, 60), generator=torch.Generator().manual_seed(1))
SIZES = {
    "vocab_size": 300, "width": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_width": 96,
    "max_positions": 256, "tied_embeddings": False,
}  # fmt: skip
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original": 8192, "low": 1.0, "high": 4.0}
GPT = {
    "norm": "layernorm", "ffn": "gelu_tanh", "qkv_bias": True, "out_bias": True, "ffn_bias": True,
    "n_kv_heads": 4,
}  # fmt: skip
GEMMA = {
    "ffn": "geglu_tanh", "norm_plus_one": True, "norm_place": "both", "embedding_scale": 8.0,
    "attention_scale": 0.25, "tied_embeddings": True,
}  # fmt: skip
LONG: dict[str, Any] = {
    "kind": "longrope", "factor": 2.0, "short": tuple(round(1 + 0.05 * i, 2) for i in range(8)),
    "long": tuple(round(1 + 0.7 * i, 1) for i in range(8)),
}  # fmt: skip
WRITTEN: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied, wide heads": {"tied_embeddings": True, "head_width": 32},
    "llama 3.1": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "llama, linear": {"rope_scaling": {"kind": "linear", "factor": 4.0}},
    "llama, yarn": {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original": 64}},
    "llama, yarn, louder": {
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original": 64, "attention": 1.5},
    },
    "mixtral": {"n_experts": 4, "n_active": 2},
    "gpt2": {**GPT, "positions": "learned"},
    "bloom": {**GPT, "positions": "alibi", "embedding_norm": True, "tied_embeddings": True},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "qwen3moe": {"qk_norm": True, "n_experts": 4, "n_active": 2, "expert_width": 32},
    "gemma2": {
        **GEMMA,
        "n_layers": 3,
        "window": 16,
        "local_layers": (True, False),
        "attention_softcap": 20.0,
        "logit_softcap": 10.0,
    },
    "gemma2, wide heads, linear": {
        **GEMMA,
        "head_width": 32,
        "attention_scale": 32**-0.5,
        "window": 16,
        "attention_softcap": 50.0,
        "local_layers": (True, False),
        "logit_softcap": 30.0,
        "rope_scaling": {"kind": "linear", "factor": 4.0},
    },
    "gemma3": {
        **GEMMA,
        "n_layers": 7,
        "window": 16,
        "local_layers": (*(True,) * 5, False),
        "qk_norm": True,
        "local_rope_theta": 10000.0,
        "rope_theta": 1e6,
        "rope_scaling": {"kind": "linear", "factor": 8.0},
    },
    "gemma3, capped": {
        **GEMMA,
        "n_layers": 6,
        "window": 16,
        "local_layers": (*(True,) * 5, False),
        "qk_norm": True,
        "local_rope_theta": 20000.0,
        "logit_softcap": 10.0,
    },
    "phi3, short": {"max_positions": 512, "rope_scaling": {**LONG, "original": 256}},
    "phi3, long, a part rotated": {
        "max_positions": 256,
        "rope_width": 8,
        "rope_scaling": {
            **LONG,
            "original": 32,
            "factor": 8.0,
            "short": LONG["short"][:4],
            "long": LONG["long"][:4],
        },
    },
    "phi3, louder": {"max_positions": 512, "rope_scaling": {**LONG, "original": 256, "attention": 1.5}},
}


def drawn(**changes: Any) -> Transformer:
    """A model with every tensor at random, biases and norms included."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SIZES, **changes}))
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.1 + (p.ndim == 1)
    return model.eval()


def make_tokenizer() -> Tokenizer:
    return train_bpe(["The furnace is hot, and the alchemist waits for gold. 丹炉\n" * 9, "abc def"] * 3, 300)


def changed(
    source: Path,
    out: Path,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    without: Collection[str] = (),
) -> Path:
    """A copy of a GGUF file with other keys and tensors, written by llama.cpp's own package."""
    keys, tensors = keys or {}, tensors or {}
    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, keys.get("general.architecture", arch))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", *keys, *without):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for name, value in keys.items():
        kind = gguf.GGUFValueType.get_type(value)
        if isinstance(value, int) and not isinstance(value, bool):
            kind = gguf.GGUFValueType.UINT32 if value < 2**32 else gguf.GGUFValueType.UINT64
        if name != "general.architecture":
            inner = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
            writer.add_key_value(name, value, kind, inner)
    for tensor in reader.tensors:
        if tensor.name not in (*tensors, *without):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
