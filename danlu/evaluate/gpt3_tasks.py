"""GPT-3's own tasks (Brown et al. 2020, sections 3.9.1 and 3.9.2): arithmetic, and words put back in order.

They are drawn, not stored, so that no training text can hold them all. Prompts as in the paper's appendix G.
"""

import random
import string
from collections.abc import Callable, Iterator
from typing import Any

from danlu.core.errors import UserError
from danlu.evaluate.chat_quality import english_words

Row = dict[str, Any]

ASKED = 2000
"""Questions of an arithmetic task, as in the paper; its word tasks have 10,000."""
SHOWN = 100
"""Examples beside them, of other numbers and words."""


def rows(kind: str, digits: int = 0, n: int = ASKED, seed: int = 0, **_: Any) -> Any:
    """The splits `test` and `shots` of one task, for lm-eval. Raises UserError for an unknown kind."""
    import datasets

    if kind not in KINDS:
        raise UserError(f'kind "{kind}" is unknown', f"one of {', '.join(KINDS)}")
    chance = random.Random(f"{kind} {digits} {seed}")
    seen: dict[str, Row] = {}
    for question, answer in KINDS[kind](chance, digits):
        seen.setdefault(question, {"question": question, "passage": "", "answers": [answer]})
        if len(seen) == n + SHOWN:
            break
    found = list(seen.values())
    parts = {"shots": found[:SHOWN], "test": found[SHOWN:]}
    return datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in parts.items()})


def _sums(word: str, operation: Callable[[int, int], int]) -> Callable[..., Iterator[tuple[str, str]]]:
    """Numbers up to `digits` digits, drawn evenly; differences may be negative."""

    def draw(chance: random.Random, digits: int) -> Iterator[tuple[str, str]]:
        while True:
            a, b = (chance.randrange(10**digits) for _ in range(2))
            yield f"What is {a} {word} {b}?", str(operation(a, b))

    return draw


def _composite(chance: random.Random, _: int) -> Iterator[tuple[str, str]]:
    """Three numbers of one digit, the last two in brackets."""
    operations: dict[str, Callable[[int, int], int]] = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
    }
    while True:
        a, b, c = (chance.randrange(10) for _ in range(3))
        one, other = (chance.choice("+-*") for _ in range(2))
        yield f"What is {a}{one}({b}{other}{c})?", str(operations[one](a, operations[other](b, c)))


def _words(change: Callable[[random.Random, str], str]) -> Callable[..., Iterator[tuple[str, str]]]:
    """Words of 5 to 14 letters, changed; those that the change leaves as they are don't count."""

    def draw(chance: random.Random, _: int) -> Iterator[tuple[str, str]]:
        known = sorted(word for word in english_words() if 5 <= len(word) <= 14 and word.isalpha())
        chance.shuffle(known)
        for word in known:
            changed = change(chance, word)
            if changed != word:
                yield changed, word

    return draw


def cycled(chance: random.Random, word: str) -> str:
    """The word from some letter on, and then its beginning."""
    at = chance.randrange(1, len(word))
    return word[at:] + word[:at]


def mixed(kept: int) -> Callable[[random.Random, str], str]:
    """All letters but the first and the last `kept` in another order."""

    def change(chance: random.Random, word: str) -> str:
        inner = [*word[kept:-kept]]
        chance.shuffle(inner)
        return word[:kept] + "".join(inner) + word[-kept:]

    return change


def inserted(chance: random.Random, word: str) -> str:
    """A sign or a blank behind each letter but the last."""
    return "".join(letter + chance.choice(string.punctuation + " ") for letter in word[:-1]) + word[-1]


def reversed_word(_: random.Random, word: str) -> str:
    return word[::-1]


KINDS: dict[str, Callable[[random.Random, int], Iterator[tuple[str, str]]]] = {
    "plus": _sums("plus", lambda a, b: a + b),
    "minus": _sums("minus", lambda a, b: a - b),
    "times": _sums("times", lambda a, b: a * b),
    "composite": _composite,
    "cycled": _words(cycled),
    "anagrams1": _words(mixed(1)),
    "anagrams2": _words(mixed(2)),
    "inserted": _words(inserted),
    "reversed": _words(reversed_word),
}
