"""The report in a real browser, without a network: nothing breaks, nothing sticks out, nothing is unnamed."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from real_runs import Quickstart

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NARROW, WIDE = 400, 1280


@pytest.fixture(params=[(mode, width) for mode in ("light", "dark") for width in (WIDE, NARROW)], ids=str)
def page(request: pytest.FixtureRequest, browser: Any, quickstart: Quickstart) -> Iterator[Any]:
    """The page of the quickstart, every part of it unfolded; asks for nothing but its file."""
    mode, width = request.param
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=mode, offline=True, reduced_motion="reduce"
    )
    page = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda asking: asked.append(asking.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    address = (quickstart.run / "report.html").as_uri()
    page.goto(address)
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    yield page
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [address]
    context.close()


def test_nothing_sticks_out(page: Any) -> None:
    sizes = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert sizes[0] <= sizes[1]
    outside = page.evaluate(
        """[...document.querySelectorAll('h1, h2, h3, p, li, figure, svg, summary, nav a, caption')]
        .filter(e => !e.closest('.wide'))
        .filter(e => e.getBoundingClientRect().right > window.innerWidth + 1)
        .map(e => e.outerHTML.slice(0, 100))"""
    )
    assert outside == []


def test_every_drawing_is_seen_and_has_a_name(page: Any) -> None:
    drawings = page.locator("svg").all()
    assert len(drawings) == 9
    for drawing in drawings:
        box = drawing.bounding_box()
        assert box["width"] > 250
        assert box["height"] > 100
        assert drawing.is_visible()
    images = page.get_by_role("img")
    assert images.count() == len(drawings)
    names = {image.get_attribute("aria-label") for image in images.all()}
    assert len(names) == len(drawings)
    assert all(len(name) > 20 for name in names)


def test_text_is_readable(page: Any) -> None:
    """Contrast of 4.5 at least between texts and what is behind them, in the drawings too (WCAG 2.2, AA)."""
    pale = page.evaluate(
        """() => {
        const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
        const luminance = ([r, g, b]) => [r, g, b]
            .map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const behind = e => {
            for (; e; e = e.parentElement) {
                const colour = getComputedStyle(e).backgroundColor;
                if (colour.startsWith('rgb') && (numbers(colour)[3] ?? 1) === 1) return numbers(colour);
                if (colour.startsWith('color(srgb')) return numbers(colour).map(v => v * 255);
            }
            return [255, 255, 255];
        };
        const found = [];
        for (const e of document.querySelectorAll('body *')) {
            if (![...e.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.data.trim())) continue;
            if (e.tagName === 'title') continue;
            const style = getComputedStyle(e);
            const ink = numbers(e.tagName === 'text' ? style.fill : style.color);
            const [a, b] = [luminance(ink), luminance(behind(e))].sort((x, y) => y - x);
            if ((a + 0.05) / (b + 0.05) < 4.5) found.push(e.textContent.slice(0, 40));
        }
        return found;
        }"""
    )
    assert pale == []


def test_parts_can_be_reached_by_their_names(page: Any) -> None:
    assert page.title().startswith("quickstart")
    assert page.get_by_role("heading", level=1).inner_text() == "quickstart"
    assert page.locator("html").get_attribute("lang") == "en"
    for role in ("banner", "main", "contentinfo", "navigation"):
        assert page.get_by_role(role).count() == 1
    links = page.get_by_role("navigation").get_by_role("link").all()
    assert [link.inner_text() for link in links] == [
        "Scores", "pretrain", "chat", "Time and memory", "Lineage", "Settings",
    ]  # fmt: skip
    for link in links:
        link.click()
        target = page.locator(page.evaluate("location.hash"))
        assert target.count() == 1
        assert target.bounding_box()["y"] < 900
    for table in page.get_by_role("table").all():
        assert table.locator("caption").inner_text().strip()
        assert table.get_by_role("columnheader").count() >= 2


def test_the_figures_are_on_the_page(page: Any, quickstart: Quickstart) -> None:
    figures = json.loads((quickstart.run / "report.json").read_text())
    table = page.get_by_role("table", name="Bits per byte of held-out text")
    row = table.get_by_role("row", name=figures["labels"]["model"])
    cells = row.get_by_role("cell").all_inner_texts()
    bits = figures["bits_per_byte"]["model"], figures["bits_per_byte_with_model"]["model"]
    assert cells == [f"{number:.3f}" for number in bits]
    for sentence in figures["summary"]:
        assert page.get_by_text(sentence, exact=True).is_visible()
