"""Small models of random weights, saved as every model lies on disk."""

from pathlib import Path
from typing import Any

import torch

from danlu.model.checkpoint import save_model
from danlu.model.config import ModelConfig
from danlu.model.transformer import Transformer
from danlu.tokens.tokenizer import Tokenizer


def save_random_model(folder: Path, tokenizer: Tokenizer, noise: float, **changes: Any) -> Path:
    """`noise` is added to every weight: with enough of it a token's neighbours decide what comes next."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": tokenizer.vocab_size,
        "width": 48,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "ffn_width": 64,
        "max_positions": 512,
    }
    model = Transformer(ModelConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    save_model(model, folder, tokenizer)
    return folder
