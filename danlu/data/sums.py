"""Sums of three digits, made up: a skill that a small model can learn, with answers that can be checked."""

import random
from collections.abc import Iterator

from danlu.data.conversations import plain_text
from danlu.data.documents import Document

COUNT = 20_000


def read_sums(count: int = COUNT, seed: int = 0) -> Iterator[Document]:
    """`count` different pairs of numbers from 100 to 999, each with its sum, as conversations."""
    for number, pair in enumerate(random.Random(seed).sample(range(900 * 900), count)):
        a, b = 100 + pair // 900, 100 + pair % 900
        messages = [
            {"role": "user", "content": f"{a}+{b}="},
            {"role": "assistant", "content": str(a + b)},
        ]
        yield Document(f"sum:{number}", plain_text(messages), messages)
