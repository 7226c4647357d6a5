import json
from pathlib import Path

import numpy as np
import pytest

from danlu.core.errors import UserError
from danlu.evaluate.intervals import bootstrap_interval, relative_change, t_interval, t_quantile
from danlu.papers.config import ReproduceConfig
from danlu.papers.protocol import Claim, Control, Result, at_least, at_most, judged, write_result
from danlu.papers.reproduce import reproduce


def result(null: bool) -> Result:
    claim = Claim(claim="<b>x</b> & y", verdict="holds", value=0.5, interval=(0.4, 0.6), required="≤ 1")
    return Result(
        paper="P",
        rule="the rule",
        claims=[claim],
        controls=[Control(control="shuffled", null=null, value=0.0)],
        seeds=[0, 1],
        seconds=1.5,
        not_tested="scale",
    )


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 4, 2.7764), (0.95, 9, 1.8331), (0.995, 29, 2.7564)],
)
def test_t_quantile_equals_the_printed_tables(probability: float, freedom: int, expected: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(expected, abs=1e-4)


def test_t_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, (1000, 5))
    covered = [low <= 3.0 <= high for low, high in map(t_interval, draws[:300].tolist())]
    assert 0.91 < np.mean(covered) < 0.99


def test_bootstrap_interval_is_close_to_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(0, 1, 400)
    low, high = bootstrap_interval(values.tolist())
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_relative_change_is_paired() -> None:
    """Items of very different sizes that all change by a tenth: hardly any doubt. The delta method agrees."""
    chance = np.random.default_rng(0)
    before = chance.uniform(1, 1000, 300)
    after = before * chance.normal(0.9, 0.05, 300)
    value, (low, high) = relative_change(after.tolist(), before.tolist())
    assert value == pytest.approx(after.sum() / before.sum() - 1)
    residuals = after - (1 + value) * before
    half = 1.96 * residuals.std() * 300**0.5 / before.sum()
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.2 * half)


def test_a_verdict_needs_the_whole_interval() -> None:
    assert at_most((0.0, 0.9), 1.0) == "holds"
    assert at_most((0.0, 1.1), 1.0) == "does not hold"
    assert at_least((1.1, 2.0), 1.0) == "holds"
    assert at_least((0.9, 2.0), 1.0) == "does not hold"


def test_a_control_that_is_not_null_voids_the_experiment() -> None:
    assert judged(result(null=True)).claims[0].verdict == "holds"
    void = judged(result(null=False))
    assert void.void
    assert void.claims[0].verdict == "not testable"


def test_result_and_page_are_written_and_escaped(tmp_path: Path) -> None:
    write_result(result(null=True), tmp_path)
    saved = json.loads((tmp_path / "result.json").read_text("utf-8"))
    assert {"paper", "claims", "controls", "seeds", "seconds", "not_tested"} <= saved.keys()
    page = (tmp_path / "index.html").read_text("utf-8")
    assert "&lt;b&gt;x&lt;/b&gt; &amp; y" in page
    assert "http" not in page


def test_an_unknown_experiment_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="opt-logbok") as error:
        reproduce(ReproduceConfig(name="opt-logbok", out=tmp_path))
    assert "opt-logbook" in error.value.remedy
