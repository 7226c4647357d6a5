"""A small chat model and preferences by a known rule, as every user would have them on disk."""

import json
import random
from pathlib import Path

import pytest
import torch
from small_models import save_random_model

from danlu.data.config import DataConfig
from danlu.data.prepare import prepare
from danlu.tokens.bpe import train_tokenizer
from danlu.tokens.config import TokenizeConfig, TokenizerConfig
from danlu.tokens.load import load_tokenizer
from danlu.tokens.tokenize import tokenize

ANIMALS = ["cat", "dog", "fox", "owl", "hare", "goose", "otter", "heron", "crane", "mole"]
PLACES = ["in the garden", "by the river", "under the bridge", "at the mill"]


def preference(chance: random.Random, n_replies: int) -> dict[str, object]:
    """People here prefer whoever thanks; of several the one who does it most."""
    animal = chance.choice(ANIMALS)
    question = f"Where is the {animal} {chance.randrange(100)}?"
    replies = [
        f"The {chance.choice(ANIMALS)} is {chance.choice(PLACES)}." + " Thank you." * thanks
        for thanks in range(n_replies - 1, -1, -1)
    ]
    return {"prompt": question, "replies": replies}


@pytest.fixture(scope="session")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of preferences: pairs, and some rankings of three."""
    folder = tmp_path_factory.mktemp("preferences")
    chance = random.Random(0)
    rows = [preference(chance, 3 if n % 5 == 0 else 2) for n in range(300)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(DataConfig(source=str(folder / "rows.jsonl"), held_out=0.2, out=folder / "data"))
    train_tokenizer(TokenizerConfig(data=folder / "data", vocab_size=320, out=folder / "tokenizer"))
    tokenize(
        TokenizeConfig(
            data=folder / "data", tokenizer=folder / "tokenizer", kind="preferences", out=folder / "tokens"
        )
    )
    return folder / "tokens"


@pytest.fixture(scope="session")
def chat_model(preferences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = load_tokenizer(preferences / "tokenizer")
    torch.manual_seed(0)  # the same whatever other tests have drawn
    return save_random_model(tmp_path_factory.mktemp("model") / "chat", tokenizer, noise=0.05)


@pytest.fixture(scope="session")
def text_tokens(preferences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of text, with the chat model's tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    chance = random.Random(1)
    rows = [
        {"text": " ".join(f"The {chance.choice(ANIMALS)} sleeps {chance.choice(PLACES)}." for _ in range(9))}
        for _ in range(60)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(DataConfig(source=str(folder / "rows.jsonl"), held_out=0.1, out=folder / "data"))
    tokenize(TokenizeConfig(data=folder / "data", tokenizer=preferences / "tokenizer", out=folder / "tokens"))
    return folder / "tokens"


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four questions, each with a number as its answer."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    animals = ("cat", "dog", "fox", "owl", "hare", "goose", "otter", "heron")
    rows = [{"prompt": f"Where is the {name}{n * '!'}?", "answer": n} for name in animals for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
