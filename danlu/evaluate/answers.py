"""The answer in a model's text, and the one that several texts agree on."""

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TypeVar

A = TypeVar("A", bound=Hashable)

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


def stated_answer(text: str) -> str:
    """What stands behind the last "the answer is", else the text's first line; without the full stop.

    The end of a chain of thought as Wei et al. 2022 write their examples.
    """
    _, found, rest = text.rpartition("the answer is ")
    line = (rest if found else text).partition("\n")[0].strip()
    return line.removesuffix(".")


def last_number(text: str) -> str | None:
    """The last number, as `plain_number` writes it; None where there is none."""
    found = _NUMBER.findall(text)
    return plain_number(found[-1]) if found else None


def plain_number(text: str) -> str:
    """One number's canonical text: "$1,200.00" is "1200"."""
    number = text.replace(",", "").replace("$", "")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    sign, digits = ("-", number[1:]) if number.startswith("-") else ("", number)
    digits = digits.lstrip("0") or "0"
    digits = f"0{digits}" if digits.startswith(".") else digits
    return "0" if digits == "0" else sign + digits


def majority(answers: Sequence[A | None]) -> A | None:
    """The most frequent answer, of equals the first: self-consistency (Wang et al. 2022). None is no vote."""
    counts = Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else None


def longest_chains_majority(chains: Sequence[str], answers: Sequence[A | None], kept: int) -> A | None:
    """The vote of the `kept` chains of thought with the most steps, which are lines (Fu et al. 2022)."""
    steps = [sum(1 for line in chain.splitlines() if line.strip()) for chain in chains]
    order = sorted(range(len(chains)), key=lambda place: -steps[place])[:kept]
    return majority([answers[place] for place in sorted(order)])
