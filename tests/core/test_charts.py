"""Charts: what is drawn is what was measured, in the page's own colours."""

import math
import re
from xml.etree import ElementTree

import pytest

from danlu.core.charts import bar_chart, learning_chart, line_chart, series, smooth

SVG = "{http://www.w3.org/2000/svg}"
ROWS = [{"step": step, "loss": 5 / step, "tokens_per_second": 1000.0 + step} for step in range(1, 101)]


def loss_chart(rows: list[dict[str, object]], name: str) -> str:
    return learning_chart(rows, name, "loss", "loss", ("training", "held out"))


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def extent(d: str) -> tuple[float, float]:
    """(left, right) of a path of straight lines."""
    xs = [float(x) for x, _ in re.findall(r"(-?[\d.]+) (-?[\d.]+)", d)]
    return min(xs), max(xs)


def test_series_takes_what_is_a_finite_number() -> None:
    rows = [
        {"step": 1, "loss": 2},
        {"step": 2},
        {"step": 3, "loss": math.nan},
        {"step": 4, "loss": None},
        {"step": 5, "loss": 0.5},
    ]
    assert series(rows, "loss") == ([1, 5], [2, 0.5])


def test_smoothing_is_the_weighted_mean_of_what_came_before() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    for weight in (0.0, 0.5, 0.9):
        for n, got in enumerate(smooth(values, weight), 1):
            weights = [weight ** (n - 1 - k) for k in range(n)]
            mean = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
            assert got == pytest.approx(mean)


def test_bars_are_as_long_as_their_numbers() -> None:
    values = {"ours": 1.7, "gzip -9": 3.0, "xz, given the <training> text": 2.0}
    root = parse(bar_chart(values, "bits", "bits per byte", ours="ours"))
    bars = [
        (extent(path.attrib["d"]), path.attrib["style"])
        for path in root.iter(f"{SVG}path")
        if "clip-path" in path.attrib and "fill: #" in path.attrib.get("style", "")
    ]
    assert len(bars) == 3
    lengths = [right - left for (left, right), _ in bars]
    for length, number in zip(lengths, values.values(), strict=True):
        assert length / lengths[1] == pytest.approx(number / 3.0, abs=0.001)
    assert len({style for _, style in bars[1:]}) == 1
    assert bars[0][1] != bars[1][1]  # ours stands out
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert {"1.70", "3.00", "2.00", "gzip -9", "bits per byte"} <= set(texts)
    assert root.attrib["aria-label"] == (
        "bits per byte: ours 1.70, gzip -9 3.00, xz, given the <training> text 2.00"
    )


def test_the_loss_chart_tells_the_whole_run() -> None:
    held_out = [{"step": 50, "held_out_loss": 0.4}, {"step": 100, "held_out_loss": 0.25}]
    events = [
        {"step": 30, "event": "guard", "text": "went back"},
        {"step": 60, "event": "guard", "text": "again"},
    ]
    root = parse(loss_chart([*ROWS, *held_out, *events], "pretrain"))
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert {"step", "loss", "training", "held out", "the guard acted"} <= set(texts)
    assert root.attrib["aria-label"].startswith("Loss of pretrain over 100 steps, training from 5 to 0.0")
    assert root.attrib["aria-label"].endswith("held out 0.25 at the end")
    dashed = [p for p in root.iter(f"{SVG}path") if "stroke-dasharray" in p.attrib.get("style", "")]
    assert len([p for p in dashed if "clip-path" in p.attrib]) == 2  # one for each time that it acted


def test_without_held_out_text_or_events_nothing_is_said_of_them() -> None:
    svg = loss_chart(ROWS, "pretrain")
    assert "held out" not in svg
    assert "guard" not in svg


def test_a_line_begins_at_zero() -> None:
    root = parse(line_chart(ROWS, "pretrain", "tokens_per_second", "tokens per second"))
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert "0" in texts
    assert root.attrib["aria-label"] == "tokens per second of pretrain over 100 steps, 1,100 at the end"


def test_colours_are_the_pages_and_nothing_is_fetched() -> None:
    for svg in (
        loss_chart(ROWS, "a"),
        line_chart(ROWS, "a", "loss", "loss"),
        bar_chart({"a": 1.0}, "b", "x"),
    ):
        assert "currentColor" in svg
        assert "var(--grid)" in svg
        assert "#010203" not in svg
        assert "#000000" not in svg
        assert "<metadata" not in svg
        assert not re.search(r'(href|src)="(?!#)', svg)


def test_ids_of_several_charts_do_not_clash() -> None:
    charts = [
        loss_chart(ROWS, "pretrain"),
        loss_chart(ROWS, "chat"),
        line_chart(ROWS, "chat", "loss", "loss"),
        bar_chart({"a": 1.0}, "bits", "x"),
    ]
    clips = [set(re.findall(r'<clipPath id="([^"]+)"', chart)) for chart in charts]
    assert all(clips)
    assert sum(map(len, clips)) == len(set().union(*clips))
