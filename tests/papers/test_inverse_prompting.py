"""The relevance measure of the inverse-prompting experiment by its formula, and its verdicts."""

import json
import math
from pathlib import Path

import pytest

from danlu.core.errors import UserError
from danlu.evaluate.text_measures import bm25
from danlu.papers.inverse_prompting import (
    BEAM,
    INVERSE,
    LIKELIHOOD,
    OTHER,
    Row,
    Setup,
    claims,
    control,
    hits,
    read,
)

DOCUMENTS = ["Fire in the furnace", "Gold, gold and more gold", "The alchemist waits"]


def test_bm25_is_its_formula() -> None:
    """Three documents of 4, 5 and 3 words; "gold" three times in the second, "the" once in two."""
    first, second, third = bm25("The GOLD of the king", DOCUMENTS)
    the, gold = math.log(1 + 1.5 / 2.5), math.log(1 + 2.5 / 1.5)
    assert first == pytest.approx(2 * the * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 4 / 4)))
    assert second == pytest.approx(gold * 3 * 2.5 / (3 + 1.5 * (0.25 + 0.75 * 5 / 4)))
    assert third == pytest.approx(2 * the * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 3 / 4)))


def test_a_hit_is_the_own_document_alone_at_the_top_of_its_group() -> None:
    texts = ["the furnace burns", "the gold", "nothing", "the furnace burns", "gold!", "alchemist"]
    assert hits(texts, DOCUMENTS * 2, 3) == [True, True, False, True, True, True]
    assert hits(["gold"], ["gold", "gold"], 2) == [False], "a tie is no hit"
    assert hits(texts[::-1], DOCUMENTS * 2, 3)[0] is False


def test_verdicts_and_control_can_come_out_either_way() -> None:
    many, few = [True] * 40 + [False] * 20, [True] * 20 + [False] * 40
    world = {INVERSE: many, BEAM: few, LIKELIHOOD: few, OTHER: few}
    for changed, verdicts, null in [
        ({}, ["holds", "holds"], True),
        ({BEAM: many}, ["does not hold", "holds"], True),
        ({LIKELIHOOD: many}, ["holds", "does not hold"], True),
        ({INVERSE: few}, ["does not hold", "does not hold"], True),
        ({OTHER: many}, ["holds", "holds"], False),
        ({OTHER: [False] * 60}, ["holds", "holds"], True),
    ]:
        found = {**world, **changed}
        assert [claim.verdict for claim in claims(found)] == verdicts
        assert control(found).null == null


def test_headlines_are_neither_short_nor_long(tmp_path: Path) -> None:
    words = [3, 10, 40, 41, 12, 20]
    rows = [{"document": f"text {n}", "summary": " ".join(["word"] * size)} for n, size in enumerate(words)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    found = read(file, Setup(prompts=4, group=2))
    assert [row.article for row in found] == ["text 1", "text 2", "text 4", "text 5"]
    assert found[0] == Row(" ".join(["word"] * 10), "text 1")
    with pytest.raises(UserError, match="4 articles with a headline, of 6"):
        read(file, Setup(prompts=6, group=2))
