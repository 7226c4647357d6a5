"""Small real tokens for training, made by danlu's own stages from generated text with something to learn."""

import json
import random
from pathlib import Path

import pytest

from danlu.data.config import DataConfig
from danlu.data.prepare import prepare
from danlu.tokens.bpe import train_tokenizer
from danlu.tokens.config import TokenizeConfig, TokenizerConfig
from danlu.tokens.tokenize import tokenize

VOCABULARY = 300
ANIMALS = ["cat", "dog", "fox", "owl", "hare", "goose", "otter", "heron"]
VERBS = ["saw", "fed", "followed", "woke", "painted", "lost"]
PLACES = ["in the garden", "by the river", "under the bridge", "at the mill", "behind the old wall"]
TIMES = ["in the morning", "at noon", "before the rain", "after dinner"]


def sentence(chance: random.Random) -> str:
    """Who and what are free; the place follows from the one, the time from the other."""
    who, what = chance.choice(ANIMALS), chance.choice(ANIMALS)
    place, time = PLACES[len(who) % len(PLACES)], TIMES[len(what) % len(TIMES)]
    return f"It was {time}: the {who} {chance.choice(VERBS)} the {what} {place}. "


def story(chance: random.Random) -> str:
    return "".join(sentence(chance) for _ in range(chance.randint(1, 30))) + "\n"


def conversation(chance: random.Random) -> list[dict[str, str]]:
    """One to six questions, each with the one right answer."""
    messages = []
    for _ in range(chance.randint(1, 6)):
        animal = chance.choice(ANIMALS)
        question, answer = chance.choice(
            [
                (f"Where is the {animal}?", f"The {animal} is {PLACES[len(animal) % len(PLACES)]}."),
                (f"When does the {animal} eat?", f"{TIMES[len(animal) % len(TIMES)].capitalize()}."),
                (f"Is there a {animal}?", "Yes."),
            ]
        )
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def tokens(folder: Path, source: Path, kind: str, tokenizer: Path | None = None) -> Path:
    """`source` through data prepare, tokenizer train (unless one is given) and tokenize."""
    prepare(DataConfig(source=str(source), held_out=0.1, out=folder / "data"))
    if tokenizer is None:
        tokenizer = folder / "tokenizer"
        train_tokenizer(TokenizerConfig(data=folder / "data", vocab_size=VOCABULARY, out=tokenizer))
    values = {"data": folder / "data", "tokenizer": tokenizer, "kind": kind, "out": folder / "tokens"}
    tokenize(TokenizeConfig.model_validate(values))
    return folder / "tokens"


@pytest.fixture(scope="session")
def text_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tokenize` folder of some 200 stories."""
    folder = tmp_path_factory.mktemp("text")
    chance = random.Random(0)
    rows = [json.dumps({"text": story(chance)}) for _ in range(200)]
    (folder / "stories.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    return tokens(folder, folder / "stories.jsonl", "text")


@pytest.fixture(scope="session")
def chat_tokens(text_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tokenize` folder of ragged conversations, by the tokenizer of `text_tokens`."""
    folder = tmp_path_factory.mktemp("chat")
    chance = random.Random(1)
    rows = [json.dumps({"messages": conversation(chance)}) for _ in range(300)]
    (folder / "chats.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    return tokens(folder, folder / "chats.jsonl", "chat", text_tokens / "tokenizer")
