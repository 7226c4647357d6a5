"""GPT-3's own tasks: every answer is right, and the draws hang on the seed alone."""

import random
from collections import Counter

import pytest

from danlu.core.errors import UserError
from danlu.evaluate.gpt3_tasks import cycled, inserted, mixed, reversed_word, rows

OPERATIONS = {"plus": "+", "minus": "-", "times": "*"}


@pytest.mark.parametrize(
    ("kind", "digits"), [("plus", 2), ("minus", 3), ("plus", 5), ("times", 2), ("composite", 1)]
)
def test_answers_are_right(kind: str, digits: int) -> None:
    found = rows(kind, digits, n=300)
    for row in [*found["test"], *found["shots"]]:
        asked = row["question"].removeprefix("What is ").removesuffix("?")
        for word, sign in OPERATIONS.items():
            asked = asked.replace(word, sign)
        assert row["answers"] == [str(eval(asked))]  # what we drew ourselves
    assert len(found["test"]) == 300
    assert not {row["question"] for row in found["test"]} & {row["question"] for row in found["shots"]}


def test_numbers_are_drawn_evenly() -> None:
    asked = [row["question"].split()[2] for row in rows("plus", 2, n=2000)["test"]]
    counts = Counter(int(one) // 10 for one in asked)
    assert set(counts) == set(range(10))
    assert max(counts.values()) < 1.4 * min(counts.values())


def test_the_same_seed_draws_the_same() -> None:
    assert rows("plus", 3, n=50)["test"][7] == rows("plus", 3, n=50)["test"][7]
    assert rows("plus", 3, n=50)["test"][:] != rows("plus", 3, n=50, seed=1)["test"][:]


@pytest.mark.parametrize("kind", ["cycled", "anagrams1", "anagrams2", "inserted", "reversed"])
def test_words_can_be_put_back(kind: str) -> None:
    pytest.importorskip("spellchecker")
    for row in rows(kind, n=200)["test"]:
        changed, [word] = row["question"], row["answers"]
        assert changed != word
        assert 5 <= len(word) <= 14
        if kind == "cycled":
            assert word in changed + changed
        elif kind == "reversed":
            assert changed[::-1] == word
        elif kind == "inserted":
            assert changed[::2] == word
        else:
            kept = int(kind[-1])
            assert sorted(changed) == sorted(word)
            assert changed[:kept] == word[:kept]
            assert changed[-kept:] == word[-kept:]


def test_changes_by_hand() -> None:
    chance = random.Random(0)
    assert cycled(chance, "ab") == "ba"
    assert reversed_word(chance, "gold") == "dlog"
    assert mixed(1)(chance, "fire")[0::3] == "fe"
    assert len(inserted(chance, "fire")) == 7
    with pytest.raises(UserError, match="unknown"):
        rows("divide")
