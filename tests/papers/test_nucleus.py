"""The measures of the nucleus experiment by brute force, and its verdicts on made-up arms."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.core.errors import UserError
from danlu.evaluate.text_measures import ends_in_a_loop, self_bleu, zipf_coefficient
from danlu.papers.nucleus import (
    AGAIN,
    BEAM,
    GREEDY,
    HUMAN,
    NUCLEI,
    PURE,
    Arm,
    Setup,
    claims,
    controls,
    nucleus,
    prompts_and_humans,
)


@given(st.lists(st.lists(st.integers(0, 2), min_size=8, max_size=8), min_size=2, max_size=6))
@settings(max_examples=50)
def test_self_bleu_is_bleu_with_the_others_as_references(texts: list[list[int]]) -> None:
    def grams(text: list[int], n: int) -> Counter[tuple[int, ...]]:
        return Counter(zip(*(text[i:] for i in range(n)), strict=False))

    for place, found in enumerate(self_bleu(texts, 3)):
        product = 1.0
        for n in (1, 2, 3):
            own = grams(texts[place], n)
            others = [grams(text, n) for other, text in enumerate(texts) if other != place]
            kept = sum(min(times, max(o[gram] for o in others)) for gram, times in own.items())
            product *= kept / sum(own.values())
        assert found == pytest.approx(product ** (1 / 3))


def test_a_loop_is_a_phrase_three_times_at_the_end() -> None:
    for text, loops in [
        ("abcabcabc", True), ("xyzababab", True), ("ababab!", False), ("xaaa", False), ("aaaaaa", True),
        ("abab", False), ("", False), ("abcabcab", False),
    ]:  # fmt: skip
        assert ends_in_a_loop([ord(c) for c in text]) == loops, text


def test_zipf_coefficient_is_the_exponent() -> None:
    texts = [[rank] * round(1e6 * rank**-1.3) for rank in range(1, 400)]
    assert zipf_coefficient(texts) == pytest.approx(1.3, abs=0.01)


def arm(nats: float, bleu: float, loops: float, seed: int, n: int = 100) -> Arm:
    noise = np.random.default_rng(seed)
    each = [list(noise.integers(0, 50, 20)) for _ in range(n)]
    spread = noise.normal(0, 0.1, (2, n))
    return Arm(each, list(nats + spread[0]), list(bleu + spread[1] / 5), list(noise.random(n) < loops))


def world(**changed: Arm) -> dict[str, Arm]:
    """As the paper has it, but for what is changed."""
    arms = {
        HUMAN: arm(3.4, 0.30, 0.0, 0), GREEDY: arm(0.6, 0.5, 0.7, 1), BEAM: arm(0.4, 0.45, 0.5, 2),
        PURE: arm(3.8, 0.25, 0.0, 3), AGAIN: arm(3.8, 0.25, 0.0, 4),
        **{nucleus(p): arm(3.3 + 0.1 * place, 0.29, 0.0, 5 + place) for place, p in enumerate(NUCLEI)},
    }  # fmt: skip
    return {**arms, **changed}


def verdicts(arms: dict[str, Arm]) -> list[bool]:
    return [claim.verdict == "holds" for claim in claims(arms)]


def test_each_verdict_can_come_out_either_way() -> None:
    assert verdicts(world()) == [True] * 7
    for place, changed in enumerate([
        {GREEDY: arm(0.6, 0.5, 0.2, 1)},
        {BEAM: arm(0.4, 0.45, 0.2, 2)},
        {GREEDY: arm(2.75, 0.5, 0.7, 1)},
        {BEAM: arm(2.75, 0.45, 0.5, 2)},
        {PURE: arm(2.0, 0.25, 0.0, 3)},
        {PURE: arm(3.405, 0.25, 0.0, 3)},
        {PURE: arm(3.8, 0.301, 0.0, 3)},
    ]):  # fmt: skip
        found = verdicts(world(**changed))
        assert not found[place]
        assert sum(found) >= 5, "the others are as they were, but for what hangs on the same arm"
    assert [control.null for control in controls(world())] == [True, True]
    assert [control.null for control in controls(world(**{AGAIN: arm(3.9, 0.25, 0, 4)}))] == [False, True]
    assert [control.null for control in controls(world(**{AGAIN: arm(3.8, 0.28, 0, 4)}))] == [True, False]


def test_the_nearest_nucleus_is_chosen_on_half_of_the_prompts_and_judged_on_the_other() -> None:
    """One that is good on the half where it is chosen only does not hold."""
    good, bad = arm(3.4, 0.3, 0, 9), arm(0.4, 0.9, 0, 9)
    nats = [
        one if n % 2 == 0 else other for n, (one, other) in enumerate(zip(good.nats, bad.nats, strict=True))
    ]
    halved = Arm(good.ids, nats, good.bleu, good.loops)
    far = {nucleus(p): arm(2.0, 0.3, 0, 10) for p in NUCLEI[1:]}
    assert not verdicts(world(**{nucleus(NUCLEI[0]): halved, **far}))[5]


def test_prompts_are_beginnings_of_long_enough_texts(tmp_path: Path) -> None:
    texts = ["a" * 3, "bcdefgh", "ijklmnopq", "rstuvwx"]
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8"
    )
    engine: Any = SimpleNamespace(prompt_ids=lambda text: [ord(c) for c in text])
    prompts, human = prompts_and_humans(tmp_path / "texts.jsonl", engine, Setup(texts=2, prompt=3, tokens=4))
    assert ["".join(map(chr, ids)) for ids in prompts + human] == ["bcd", "ijk", "efgh", "lmno"]
    with pytest.raises(UserError, match="3 texts of 7 tokens, of 4"):
        prompts_and_humans(tmp_path / "texts.jsonl", engine, Setup(texts=4, prompt=3, tokens=4))
