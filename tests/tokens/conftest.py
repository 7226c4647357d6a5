from collections.abc import Iterator

import pytest

from danlu.tokens.bpe import train_bpe
from danlu.tokens.tokenizer import Tokenizer

TEXTS = [
    "The furnace is hot, and the alchemist waits for the gold to appear.\n",
    "丹炉里的火很旺，炼丹的人在等金子出现。今天天气很好，我们去散步吧。",
    "Печь горячая, и алхимик ждёт золота. Сегодня хорошая погода.",
    "الفرن ساخن والكيميائي ينتظر الذهب. الطقس جميل اليوم.",
    "def furnace(heat: float) -> float:\n    return heat * 2  # twice as hot\n",
    "かまどは熱く、錬金術師は金を待つ。今日はいい天気です。",
    "Naïve café, Übermaß, señor, Ångström, œuvre, façade; 1234567890 3.14159 €5 🔥🧪👩‍🔬\n\n\ttabs",
]


def texts() -> Iterator[str]:
    for _ in range(4):
        yield from TEXTS


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe(texts(), 480)
