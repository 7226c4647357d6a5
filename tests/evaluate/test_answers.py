"""Answers read out of texts, and votes among them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.evaluate.answers import (
    last_number,
    longest_chains_majority,
    majority,
    plain_number,
    stated_answer,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("First … So the answer is False.", "False"),
        ("the answer is (A). Or rather, the answer is (B).\n\nQ: next", "(B)"),
        (" 42\nA: 43", "42"),
        ("the answer is 3.50.", "3.50"),
        ("", ""),
    ],
)
def test_the_stated_answer(text: str, answer: str) -> None:
    assert stated_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9 + 9 = 18 dollars", "18"),
        ("It costs $1,200.00.", "1200"),
        ("#### 72", "72"),
        ("-3.50 degrees", "-3.5"),
        ("half: .5", "0.5"),
        ("-0.0", "0"),
        ("007", "7"),
        ("it was in 2014.", "2014"),
        ("no number", None),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


@given(st.integers(-(10**9), 10**9), st.integers(0, 3))
def test_however_a_number_is_written_it_is_the_same(value: int, zeros: int) -> None:
    written = f"${value:,}" + ("." + "0" * zeros if zeros else "")
    assert plain_number(written.replace("$-", "-$")) == str(value)


def test_votes() -> None:
    assert majority(["a", "b", "b", None, None, None]) == "b"
    assert majority(["b", "a"]) == "b", "of equals the first"
    assert majority([None]) is None
    chains = ["one", "one\ntwo\nthree", "one\ntwo", "one\n\n\n\n"]
    assert longest_chains_majority(chains, ["x", "y", "z", "x"], kept=1) == "y"
    assert longest_chains_majority(chains, ["x", "y", "y", "x"], kept=4) == "x"
