"""A small chat model with random weights, on disk as every model is."""

from pathlib import Path

import pytest
from small_models import save_random_model
from transformers import LlamaForCausalLM

from danlu.generate.engine import Engine
from danlu.model.checkpoint import load
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
    return save_random_model(
        tmp_path_factory.mktemp("random") / "model",
        tokenizer,
        noise=0.2,
        max_positions=CONTEXT,
        tied_embeddings=False,
    )


@pytest.fixture(scope="session")
def engine(folder: Path) -> Engine:
    return Engine(*load(folder))


@pytest.fixture(scope="session")
def theirs(folder: Path) -> LlamaForCausalLM:
    """The same model, read by transformers."""
    return LlamaForCausalLM.from_pretrained(folder)
