"""Gopher's experiment: what is trained on, and that each verdict can come out either way."""

from itertools import islice
from pathlib import Path

import pytest
from needs import needs_data

from danlu.evaluate.gopher import MODELLING, Question, Slope
from danlu.model.transformer import Transformer
from danlu.papers.gopher import SIZES, _wrong, claims, mixture


def slope(category: str, low: float, high: float) -> Slope:
    return Slope(category, (low + high) / 2, (low, high), 10)


def test_text_is_judged_by_its_interval() -> None:
    by_task = {"logic": [0.0, 0.01, -0.01], "science": [0.0, 0.02, -0.01]}
    rises = claims([slope(MODELLING, 0.05, 0.1), slope("logic", -0.1, 0.1)], by_task)
    assert rises[0].verdict == "holds"
    falls = claims([slope(MODELLING, -0.05, 0.1), slope("logic", -0.1, 0.1)], by_task)
    assert falls[0].verdict == "does not hold"


def test_reasoning_is_compared_only_where_something_grows() -> None:
    low, high = [0.0, 0.01, 0.02], [0.2, 0.21, 0.19]
    flat = [slope(MODELLING, 0.05, 0.1), slope("science", -0.1, 0.1)]
    assert claims(flat, {"logic": low, "science": high})[1].verdict == "not testable"
    grows = [slope(MODELLING, 0.05, 0.1), slope("science", 0.1, 0.2)]
    assert claims(grows, {"logic": low, "science": high})[1].verdict == "holds"
    assert claims(grows, {"logic": high, "science": low})[1].verdict == "does not hold"


def test_the_control_takes_a_wrong_choice() -> None:
    for answer in range(4):
        one = Question(f"Question {answer}?", ("a", "b", "c", "d"), answer)
        assert _wrong(one, 0).answer != answer
        assert _wrong(one, 0) == _wrong(one, 0)


def test_sizes_are_as_the_rule_says() -> None:
    for name, size in SIZES.items():
        count = sum(one.numel() for one in Transformer(size.config(512)).parameters())
        assert f"{count / 1e6:.1f}M" == name


def test_news_and_conversations_are_mixed() -> None:
    first = list(islice(mixture(), 40))
    assert all(0 < len(one.text) <= 2000 for one in first)
    assert sum("A:" in one.text or "B:" in one.text for one in first) >= 10


@needs_data
@pytest.mark.slow
def test_it_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four models that hardly learn from little text, few questions."""
    from danlu.papers.config import ReproduceConfig
    from danlu.papers.gopher import Setup, run

    few = list(islice(mixture(), 600))
    monkeypatch.setattr("danlu.papers.gopher.mixture", lambda: iter(few))
    result = run(
        ReproduceConfig(name="gopher"), tmp_path, Setup(steps=2, batch_size=2, each=5, text_bytes=2000)
    )
    assert (tmp_path / "plot.png").exists()
    assert len(result.claims) == 2
    assert len(result.figures["parameters"]) == 4
