from collections.abc import Iterator

import pytest
from some_texts import TEXTS

from danlu.tokens.bpe import train_bpe
from danlu.tokens.tokenizer import Tokenizer


def texts() -> Iterator[str]:
    for _ in range(4):
        yield from TEXTS


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe(texts(), 480)
