"""A small chat model with random weights, on disk as every model is."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from danlu.generate.engine import Engine
from danlu.model.checkpoint import load, save_model
from danlu.model.config import ModelConfig
from danlu.model.transformer import Transformer
from danlu.tokens.bpe import train_bpe
from danlu.tokens.tokenizer import Tokenizer

CONTEXT = 128
TEXTS = [
    "The furnace is hot, and the alchemist waits for the gold to appear.\n",
    "丹炉里的火很旺，炼丹的人在等金子出现。",
    "Fire 🔥, glass 🧪 and patience 🙂 make gold, said the alchemist.\n",
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS * 4, 330)


@pytest.fixture(scope="session")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights large enough that a token's neighbours decide what comes next."""
    torch.manual_seed(0)
    sizes = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=48, n_layers=2, n_heads=4, n_kv_heads=2, ffn_width=64,
        max_positions=CONTEXT, tied_embeddings=False,
    )  # fmt: skip
    model = Transformer(sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    folder = tmp_path_factory.mktemp("random") / "model"
    save_model(model, folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def engine(folder: Path) -> Engine:
    return Engine(*load(folder))


@pytest.fixture(scope="session")
def theirs(folder: Path) -> LlamaForCausalLM:
    """The same model, read by transformers."""
    return LlamaForCausalLM.from_pretrained(folder)
