"""The page of `danlu eval code` in a browser: filters, what failed with which input, phone, no fetching."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from danlu.evaluate.code.config import CodeConfig
from danlu.evaluate.code.score import code

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three problems: one always solved, one sometimes, one never, whose programs try the page itself too."""
    folder = tmp_path_factory.mktemp("code")
    problems = [
        {
            "task_id": f"Try/{n}",
            "prompt": f'def add(x: int) -> int:\n    """Adds {n}."""\n',
            "canonical_solution": f"    return x + {n}\n",
            "test": f"def check(candidate):\n    for x in (0, 7):\n        assert candidate(x) == x + {n}\n",
            "entry_point": "add",
        }
        for n in (1, 2, 3)
    ]
    bodies = {
        1: ["    return x + 1\n", "    return 1 + x\n"],
        2: ["    return x + 2\n", "    return 2 if x == 0 else 0\n"],
        3: ["    return '<script>document.title = 1</script>'\n", "    return " + "x" * 300 + "\n"],
    }
    rows = [{"task_id": f"Try/{n}", "completion": body} for n, those in bodies.items() for body in those]
    for name, values in (("problems", problems), ("samples", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    code(
        CodeConfig(
            problems=str(folder / "problems.jsonl"), samples=folder / "samples.jsonl", out=folder / "out"
        )
    )
    return folder / "out" / "report.html"


def test_problems_can_be_filtered(visit: Callable[..., Any], report: Path) -> None:
    page = visit(report)
    assert page.get_by_role("status").inner_text() == "3 of 3"
    for state, name in (("none", "Try/3"), ("some", "Try/2"), ("every", "Try/1")):
        page.get_by_label("show").select_option(state)
        assert page.get_by_role("status").inner_text() == "1 of 3"
        assert page.get_by_text(name).is_visible()
    page.get_by_label("show").select_option("all")
    page.get_by_role("searchbox").fill("adds 2")
    assert page.get_by_role("status").inner_text() == "1 of 3"
    assert page.get_by_text("Try/2").is_visible()


def test_what_failed_and_with_which_input(visit: Callable[..., Any], report: Path) -> None:
    page = visit(report)
    item = page.locator("details.item").nth(1)
    assert not item.get_by_text("add(7) → 0").is_visible()
    item.locator("summary").click()
    assert item.get_by_text("1 of 2 passed").is_visible()
    assert item.get_by_text("add(7) → 0").is_visible()
    programs = item.locator(".program b").all_inner_texts()
    assert programs == ["failed", "passed"]  # what is wrong comes first


def test_programs_are_text(visit: Callable[..., Any], report: Path) -> None:
    page = visit(report)
    page.locator("details.item").nth(2).locator("summary").click()
    assert page.get_by_text("<script>document.title = 1</script>").first.is_visible()
    assert page.title().endswith("danlu eval code")


@pytest.mark.parametrize(
    "options",
    [{}, {"viewport": {"width": 360, "height": 740}}, {"color_scheme": "dark"}],
    ids=["desktop", "phone", "dark"],
)
def test_everybody_can_read_it(visit: Callable[..., Any], report: Path, options: Any) -> None:
    page = visit(report, **options)
    for item in page.locator("details.item").all():
        item.locator("summary").first.click()
    found = Axe().run(page).response["violations"]
    assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_on_paper(visit: Callable[..., Any], report: Path) -> None:
    page = visit(report)
    page.emulate_media(media="print")
    assert not page.locator(".filters").is_visible()
    assert page.locator("summary").first.is_visible()
