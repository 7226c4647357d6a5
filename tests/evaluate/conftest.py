"""A small model that has learnt a little text, on disk, and text to measure it on."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from danlu.model.checkpoint import load, save_model
from danlu.model.config import ModelConfig
from danlu.model.transformer import Transformer
from danlu.tokens.bpe import train_bpe
from danlu.tokens.load import load_tokenizer
from danlu.tokens.loader import Batch
from danlu.tokens.tokenizer import Tokenizer
from danlu.train.config import OptimConfig
from danlu.train.optim import make_optimizer
from danlu.train.step import TrainStep

CONTEXT = 64
WORDS = [
    "the", "a", "one", "no", "hot", "cold", "old", "red", "furnace", "alchemist",
    "gold", "fire", "glass", "river", "night", "door", "waits", "burns", "opens", "breaks",
    "shines", "sleeps", "near", "under", "without", "before", "slowly", "never", "again", "and",
    "but", "so", "丹炉", "很热", "等着", "金子",
]  # fmt: skip


def words(seed: int, size: int) -> str:
    """About `size` bytes of words; each word decides which eight may follow."""
    chance, text, last, length = random.Random(seed), [], 0, 0
    while length < size:
        last = (7 * last + chance.randrange(8)) % len(WORDS)
        text.append(WORDS[last] + (".\n" if chance.random() < 0.1 else ""))
        length += len(text[-1].encode()) + 1
    return " ".join(text)


@pytest.fixture(scope="session")
def make_text() -> Callable[[int, int], str]:
    return words


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model after a hundred updates."""
    text = words(0, 60_000)
    tokenizer = train_bpe([text], 320)
    torch.manual_seed(0)
    sizes = ModelConfig(
        vocab_size=320, width=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_width=128, max_positions=CONTEXT
    )
    model = Transformer(sizes)
    step = TrainStep(model, make_optimizer(model, OptimConfig(lr=5e-3)))
    for batch in batches(torch.tensor(tokenizer.encode(text)), 100):
        step.step([batch])
    folder = tmp_path_factory.mktemp("trained") / "model"
    save_model(model, folder, tokenizer)
    return folder


def batches(ids: torch.Tensor, count: int) -> Iterator[Batch]:
    """Random windows of a long row of ids."""
    chance = torch.Generator().manual_seed(0)
    for _ in range(count):
        starts = torch.randint(len(ids) - CONTEXT, (16, 1), generator=chance)
        rows = ids[starts + torch.arange(CONTEXT + 1)]
        positions = torch.arange(CONTEXT).expand(16, -1)
        segments = torch.zeros_like(positions, dtype=torch.int32)
        yield Batch(rows[:, :-1], rows[:, 1:], torch.ones(16, CONTEXT), positions, segments)


@pytest.fixture(scope="session")
def model(folder: Path) -> Transformer:
    return load(folder, torch.float32)[0]


@pytest.fixture(scope="session")
def theirs(folder: Path) -> LlamaForCausalLM:
    """The same model, read by transformers."""
    return LlamaForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture
def short_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream for each 40 tokens, so that a short text has many."""
    monkeypatch.setattr("danlu.evaluate.windows.TOKENS_PER_STREAM", 40)


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a file in a browser without a network; fails where the page complains or asks for anything."""
    contexts, said, asked = [], [], []

    def visit(path: Path, **options: Any) -> Any:
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield visit
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    for context in contexts:
        context.close()
