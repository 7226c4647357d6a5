import json
from pathlib import Path

import pytest

from danlu.core.errors import UserError
from danlu.papers.config import ReproduceConfig
from danlu.papers.protocol import Claim, Control, Result, at_least, at_most, judged, show, write_result
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


def test_verdicts_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show(judged(result(null=False)).model_copy(update={"figures": {"share": 0.25}}))
    shown = capsys.readouterr().out
    for text in ("VOID", "not testable", "<b>x</b> & y", "0.5 [0.4, 0.6]", "NOT NULL", "shuffled", "0.25"):
        assert text in shown
    assert "the rule" not in shown


def test_an_unknown_experiment_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="opt-logbok") as error:
        reproduce(ReproduceConfig(name="opt-logbok", out=tmp_path))
    assert "opt-logbook" in error.value.remedy
