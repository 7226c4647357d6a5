"""The report of a real run: the same figures for scripts and for people, in a page that fetches nothing."""

import gzip
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import zstandard
from toy_verbs import VERBS

from danlu.core.config import make_config
from danlu.core.errors import UserError
from danlu.core.metrics import read_metrics
from danlu.core.options import ReportConfig, RunConfig
from danlu.core.report import collect, report, write_report
from danlu.core.runner import run

RUN = Path("runs/tiny")
VOID = {"meta", "link", "br", "hr", "img", "input"}
FETCHES = {"src", "href", "xlink:href", "srcset", "action", "formaction", "data", "poster", "background"}


class Page(HTMLParser):
    """A page's texts, tables and attributes; every tag has to be closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def values(self, *names: str) -> list[str]:
        return [
            value
            for _, attributes in self.tags
            for name, value in attributes.items()
            if name in names and value
        ]


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a copy of the tiny run."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def html(tiny: Path) -> str:
    return (tiny / RUN / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


@pytest.fixture(scope="module")
def figures(tiny: Path) -> dict[str, Any]:
    return json.loads((tiny / RUN / "report.json").read_text("utf-8"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def held_out_text(data: Path) -> bytes:
    """Read without danlu: the held-out documents, a line end between them."""
    with open(data / "held_out.jsonl.zst", "rb") as file:
        lines = zstandard.ZstdDecompressor().stream_reader(file).read().decode().splitlines()
    return "\n".join(json.loads(line)["text"] for line in lines).encode()


def test_report_json_holds_the_figures_of_every_stage(tiny: Path, figures: dict[str, Any]) -> None:
    names = ["data", "tokenizer", "text-tokens", "chat-tokens", "pretrain", "chat", "scores"]
    assert [stage["name"] for stage in figures["stages"]] == names
    lineages = [read(tiny / RUN / name / "lineage.json") for name in names]
    assert figures["seconds"] == sum(lineage["seconds"] for lineage in lineages)
    assert figures["peak_memory_bytes"] == max(lineage["peak_memory_bytes"] for lineage in lineages)
    for stage, lineage in zip(figures["stages"], lineages, strict=True):
        folder = tiny / RUN / stage["name"]
        assert stage["done"]
        assert stage["result"] == read(folder / "result.json")
        assert stage["verb"] == lineage["verb"]
        assert stage["curves"] == read_metrics(folder)
    samples = (tiny / RUN / "pretrain/samples.jsonl").read_text().splitlines()
    assert figures["stages"][4]["samples"] == [json.loads(line) for line in samples]
    assert len(samples) == 2


def test_scores_stand_at_the_top_level(tiny: Path, figures: dict[str, Any]) -> None:
    scores = read(tiny / RUN / "scores/result.json")
    assert {key: figures[key] for key in scores} == scores
    assert figures["bits_per_byte"].keys() == {
        *("model", "gzip", "xz", "zstd", "zstd_dict", "zstd_raw", "xz_given_text"),
    }
    text = held_out_text(tiny / RUN / "data")
    assert figures["held_out_bytes"] == len(text)
    assert figures["bits_per_byte"]["gzip"] == 8 * len(gzip.compress(text, 9)) / len(text)
    own = 8 * figures["model_bytes"] / len(text)
    both = figures["bits_per_byte"]["model"], figures["bits_per_byte_with_model"]["model"]
    assert both[1] - both[0] == pytest.approx(own)


def test_the_page_shows_them(page: Page, figures: dict[str, Any]) -> None:
    for name, bits in figures["bits_per_byte"].items():
        whole = figures["bits_per_byte_with_model"][name]
        assert [figures["labels"][name], f"{bits:.3f}", f"{whole:.3f}"] in page.rows
    for check in figures["chat_quality"]["checks"]:
        passed = "✓ yes" if check["passed"] else "✗ no"
        assert [check["check"], check["found"], check["asked"], passed] in page.rows
    for stage in figures["stages"]:
        assert any(row[:2] == [stage["name"], stage["verb"]] for row in page.rows)
    trained = [stage for stage in figures["stages"] if stage["verb"] in ("pretrain", "sft")]
    assert len(trained) == 2
    for stage in trained:
        assert ["parameters", f"{stage['result']['parameters']:,}"] in page.rows
        assert f"Training: {stage['name']}" in page.text
    for sentence in figures["summary"]:
        assert sentence in page.text
    assert "Everything is still as it was when it was made." in page.text


def test_the_page_fetches_nothing(html: str, page: Page) -> None:
    tags = Counter(tag for tag, _ in page.tags)
    assert not tags.keys() & {"script", "iframe", "object", "embed", "img", "base", "form"}
    assert tags["svg"] == 9  # scores, thrice two curves and the time, and the lineage
    for value in page.values(*FETCHES):
        assert value.startswith(("#", "data:"))
    assert "@import" not in html
    assert not [value for value in html.split("url(")[1:] if not value.startswith("#")]
    # Names of namespaces are not addresses; beside them none is there.
    spaces = [value for value in page.values("xmlns", "xmlns:xlink") if value.startswith("http")]
    assert html.count("http") == len(spaces)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_ids_are_unique_and_every_link_leads_somewhere(page: Page) -> None:
    ids = Counter(page.values("id"))
    assert [name for name, count in ids.items() if count > 1] == []
    for value in page.values("href", "xlink:href"):
        assert value.startswith("data:") or value[1:] in ids


def test_every_drawing_is_told_in_words(page: Page) -> None:
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert len(attributes["aria-label"] or "") > 20


def test_what_a_model_or_a_user_wrote_is_text(html: str, page: Page) -> None:
    assert "It is <b>late</b> & cold" in page.text
    assert "<b>" not in html


def test_a_run_that_is_unfinished_and_changed(here: Path) -> None:
    (RUN / "chat/DONE").unlink()
    (RUN / "chat/result.json").unlink()
    with open(RUN / "data/stats.json", "a") as file:
        file.write("\n")
    result = report(ReportConfig(run=RUN))
    assert result == {"report": "runs/tiny/report.html", "figures": "runs/tiny/report.json"}
    page = Page((RUN / "report.html").read_text("utf-8"))
    assert "Not finished: chat." in page.text
    assert any(row[:2] == ["chat", "sft "] for row in page.rows)
    assert "data: stats.json was changed" in page.text
    assert "tokenizer: data is not what it was made from" in page.text
    assert "Everything is still as it was" not in page.text


def test_training_that_was_stopped_before_its_first_step(here: Path) -> None:
    first = read_metrics(RUN / "chat")[0]
    assert first.keys() >= {"held_out_loss"}
    (RUN / "chat/metrics.jsonl").write_text(json.dumps(first) + "\n")
    write_report(RUN)
    page = Page((RUN / "report.html").read_text("utf-8"))
    assert "Training: pretrain" in page.text
    assert "Training: chat" not in page.text


def test_what_the_guard_did_is_told(here: Path) -> None:
    with open(RUN / "pretrain/metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 7, "time": 0, "event": "guard", "text": "back to <step> 5"}) + "\n")
    write_report(RUN)
    page = Page((RUN / "report.html").read_text("utf-8"))
    assert "step 7: back to <step> 5" in page.text
    assert "the guard acted" in page.text


def test_long_curves_are_thinned_but_for_evaluations(here: Path) -> None:
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 5001)]
    rows += [{"step": step, "held_out_loss": 2.0} for step in range(100, 5001, 100)]
    rows.sort(key=lambda row: row["step"])
    (RUN / "pretrain/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = next(stage for stage in collect(RUN)["stages"] if stage["name"] == "pretrain")["curves"]
    losses = [row["step"] for row in curves if "loss" in row]
    assert 250 <= len(losses) <= 502
    assert losses[0] == 1
    assert losses[-1] >= 4980
    assert [row for row in curves if "held_out_loss" in row] == [
        row for row in rows if "held_out_loss" in row
    ]


def test_a_result_does_not_hide_the_report_s_own_figures(here: Path) -> None:
    found = read(RUN / "scores/result.json")
    odd = {"run": "x", "machine": 3, "seconds": "long", "stages": [], "summary": "good", "versions": None}
    (RUN / "scores/result.json").write_text(json.dumps(found | odd))
    figures = collect(RUN)
    assert figures["run"] == "tiny"
    assert len(figures["stages"]) == 7
    assert figures["machine"]["cores"] >= 1
    write_report(RUN)


def test_a_run_without_training_or_scores(recipe: Any) -> None:
    path = recipe("name: toy\nstages: [{name: one, verb: write, options: {source: '<i>sea</i>'}}]")
    run(make_config(RunConfig, {"recipe": str(path)}), VERBS)
    page = Page(Path("runs/toy/report.html").read_text("utf-8"))
    assert len(re.findall(r"1 stage took 0:0\d min", page.text)) == 1
    assert "<i>sea</i>" in page.text
    assert "Scores" not in page.text
    assert "danlu chat" not in page.text


def test_what_is_not_a_run_is_refused(here: Path) -> None:
    with pytest.raises(UserError, match="runs: not the folder of a run"):
        report(ReportConfig(run=Path("runs")))
    Path("odd").mkdir()
    Path("odd/recipe.yaml").write_text("eggs: 3\n")
    with pytest.raises(UserError, match=r"odd/recipe.yaml: name: is required"):
        report(ReportConfig(run=Path("odd")))
    Path("odd/recipe.yaml").write_text((RUN / "recipe.yaml").read_text())
    with pytest.raises(UserError, match="odd: no stage of this run has begun"):
        report(ReportConfig(run=Path("odd")))
    assert sorted(path.name for path in Path("odd").iterdir()) == ["recipe.yaml"]
