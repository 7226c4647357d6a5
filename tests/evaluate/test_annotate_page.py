"""The annotation page in a real browser: twenty pairs by keyboard, closed half-way, and exported."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from small_servers import listening

from danlu.evaluate.annotate import make_app
from danlu.evaluate.annotation import Study
from danlu.evaluate.config import AnnotateConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PAIRS = [{"prompt": f"Question {n}", "a": f"good {n}", "b": f"<b>bad</b> {n}"} for n in range(20)]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A study and where its page is; given up at the end."""
    with contextlib.ExitStack() as stack:

        def serve(kind: Any = "pair", items: Any = PAIRS, labels: Any = ()) -> tuple[Study, str]:
            study = Study(tmp_path / f"{kind}.sqlite", kind, labels, items)
            stack.callback(study.close)
            config = AnnotateConfig(
                items=tmp_path / "items.jsonl", kind=kind, labels=labels, guideline="Be fair."
            )
            port = stack.enter_context(listening(make_app(study, config)))
            return study, f"http://localhost:{port}"

        yield serve


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    contexts, said = [], []

    def visit(url: str, **options: Any) -> Any:
        context = browser.new_context(
            **{"viewport": {"width": 1100, "height": 800}, "locale": "en-GB", **options}
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        return page

    yield visit
    assert said == []
    for context in contexts:
        context.close()


def begin(page: Any, rater: str) -> None:
    page.get_by_label("Your name").fill(rater)
    page.keyboard.press("Enter")
    page.get_by_text("Be fair.").wait_for()


def choose_good(page: Any) -> None:
    """By keyboard, the side that has it."""
    left = page.locator(".sides .text").first.inner_text()
    before = page.locator("#progress").inner_text()
    page.keyboard.press("1" if "good" in left else "ArrowRight")
    page.wait_for_function("before => document.getElementById('progress').textContent !== before", arg=before)


def test_twenty_pairs_by_keyboard_closed_half_way_and_exported(
    serve: Callable[..., Any], visit: Callable[..., Any], tmp_path: Path
) -> None:
    study, url = serve()
    page = visit(url)
    begin(page, "Ann")
    for _ in range(8):
        choose_good(page)
    page.context.close()
    assert study.result()["answers"] == 8

    page = visit(url)
    begin(page, "Ann")
    assert page.locator("#progress").inner_text() == "8 of 20"
    page.keyboard.press("u")
    page.get_by_text("7 of 20").wait_for()
    for _ in range(13):
        choose_good(page)
    page.get_by_role("heading", name="All done").wait_for()
    assert study.result()["a_wins"] == 1

    other = visit(url)
    begin(other, "Bob")
    for _ in range(20):
        choose_good(other)
    with other.expect_download() as download:
        other.get_by_role("link", name="Export").click()
    rows = [json.loads(line) for line in Path(download.value.path()).read_text("utf-8").splitlines()]
    assert len(rows) == 40
    assert {row["answer"] for row in rows} == {"a"}
    assert {row["rater"] for row in rows} == {"Ann", "Bob"}
    assert all(row["seconds"] > 0 for row in rows)


def test_texts_are_shown_and_not_run(serve: Callable[..., Any], visit: Callable[..., Any]) -> None:
    _, url = serve(
        items=[{"prompt": "<img src=x onerror=alert(1)>", "a": "<script>alert(2)</script>", "b": "b"}]
    )
    page = visit(url)
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    begin(page, "Ann")
    assert "<script>alert(2)</script>" in page.locator("#shown").inner_text()
    assert page.locator("#shown img, #shown script").count() == 0


def test_labels_and_sense_by_keyboard(serve: Callable[..., Any], visit: Callable[..., Any]) -> None:
    study, url = serve("label", [{"text": f"Text {n}"} for n in range(3)], ("good", "bad", "unclear"))
    page = visit(url)
    begin(page, "Ann")
    for key in "123":
        page.keyboard.press(key)
        page.wait_for_timeout(150)
    page.get_by_role("heading", name="All done").wait_for()
    assert study.result()["counts"] == {"good": 1, "bad": 1, "unclear": 1}
    talk = [{"role": "user", "content": "Hi"}]
    study, url = serve("ssa", [{"context": talk, "response": f"Reply {n}"} for n in range(3)])
    page = visit(url)
    begin(page, "Ann")
    for keys in ("yy", "yn", "n"):
        for key in keys:
            page.keyboard.press(key)
            page.wait_for_timeout(150)
    page.get_by_role("heading", name="All done").wait_for()
    found = study.result()
    assert (found["sensible"], found["specific"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


@pytest.mark.parametrize(
    "options", [{}, {"viewport": {"width": 360, "height": 740}}, {"color_scheme": "dark"}], ids=str
)
def test_everybody_can_use_it(serve: Callable[..., Any], visit: Callable[..., Any], options: Any) -> None:
    _, url = serve()
    page = visit(url, **options)
    for state in ("name", "pair"):
        if state == "pair":
            begin(page, "Ann")
        found = Axe().run(page).response["violations"]
        assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_in_chinese(serve: Callable[..., Any], visit: Callable[..., Any]) -> None:
    _, url = serve()
    page = visit(url, locale="zh-CN")
    page.get_by_label("您的名字").fill("安")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="左边更好").wait_for()
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
