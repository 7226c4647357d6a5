"""The report card and the page of differences in a real browser: filters, phone, paper, no fetching."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from small_models import save_random_model

from danlu.evaluate.config import DiffConfig, EvalConfig
from danlu.evaluate.diff import diff
from danlu.evaluate.evaluate import evaluate
from danlu.tokens.bpe import train_bpe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FURNACE = Path(__file__).parents[2] / "recipes" / "tasks" / "furnace.yaml"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models' evaluations, and what differs."""
    folder = tmp_path_factory.mktemp("evaluated")
    tokenizer = train_bpe([FURNACE.with_suffix(".jsonl").read_text("utf-8")], 400)
    for name, noise in (("a", 0.1), ("b", 0.2)):
        model = save_random_model(folder / f"model-{name}", tokenizer, noise=noise)
        options: dict[str, Any] = {"tasks": (str(FURNACE),), "dtype": "float32", "cache": False}
        evaluate(EvalConfig(model=str(model), out=folder / name, **options))
    diff(DiffConfig(a=folder / "a", b=folder / "b", page=folder / "diff.html"))
    return folder


def test_questions_can_be_filtered(visit: Callable[..., Any], evaluated: Path) -> None:
    samples = [json.loads(line) for line in (evaluated / "a" / "samples_furnace.jsonl").open()]
    wrong = [row for row in samples if row["acc"] == 0]
    page = visit(evaluated / "a" / "report.html")
    assert page.get_by_text("24 of 24").is_visible()
    page.get_by_label("show").select_option("wrong")
    assert page.get_by_text(f"{len(wrong)} of 24").is_visible()
    page.get_by_role("searchbox").fill("bread dough")
    found = [row for row in wrong if "bread dough" in json.dumps(row["arguments"])]
    assert page.locator("article").count() == len(found)
    page.get_by_label("show").select_option("all")
    item = page.locator("article").first
    assert item.locator("li").count() == 4
    assert item.locator("li.answer").count() == item.locator("li.chosen").count() == 1


def test_what_differs_is_listed(visit: Callable[..., Any], evaluated: Path) -> None:
    one, other = (
        [json.loads(line)["acc"] for line in (evaluated / name / "samples_furnace.jsonl").open()]
        for name in "ab"
    )
    changed = sum(x != y for x, y in zip(one, other, strict=True))
    page = visit(evaluated / "diff.html")
    assert page.get_by_text(f"{changed} questions").is_visible()
    assert page.locator("article").count() == changed


@pytest.mark.parametrize("name", ["a/report.html", "diff.html"])
@pytest.mark.parametrize(
    "options",
    [{}, {"viewport": {"width": 360, "height": 740}}, {"color_scheme": "dark"}],
    ids=["desktop", "phone", "dark"],
)
def test_everybody_can_read_it(visit: Callable[..., Any], evaluated: Path, name: str, options: Any) -> None:
    page = visit(evaluated / name, **options)
    found = Axe().run(page).response["violations"]
    assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_on_paper(visit: Callable[..., Any], evaluated: Path, tmp_path: Path) -> None:
    page = visit(evaluated / "a" / "report.html")
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 20_000
    page.emulate_media(media="print")
    assert not page.locator(".filters").first.is_visible()
    assert page.locator("article").first.is_visible()
