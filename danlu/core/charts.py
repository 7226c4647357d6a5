"""Charts of a run as SVG: matplotlib draws, the page's own colours and fonts are used."""

import io
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

BLUE, ORANGE, GREEN, RED = "#4c8dd6", "#e08a2e", "#35a06a", "#d9534f"
"""Readable on white and on dark grey, and apart for the colour-blind."""
_INK, _GRID = "#010203", "#040506"
"""Stand for the page's own colours, and are replaced by them."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
_METADATA = ("Creator", "Date", "Format", "Type")
"""What matplotlib would say about itself in every chart."""

Row = Mapping[str, Any]


class Chart:
    """A figure that is being drawn; `svg` is there once the `with` block has ended."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.alt = ""
        """The chart in words, for those who don't see it."""
        self.svg = ""


@contextmanager
def chart(name: str, xlabel: str, ylabel: str, height: float) -> Iterator[Chart]:
    """`name` keeps the chart's ids apart from those of the page's other charts. `height`: inches of 4.8."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(4.8, height), layout="constrained")
        drawn = Chart(figure.add_subplot())
        drawn.axes.set(xlabel=xlabel, ylabel=ylabel)
        yield drawn
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    svg = buffer.getvalue().replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    svg = re.sub(r'<g id="[^"]+"', "<g", svg)  # the same in every chart, and nothing refers to them
    opening = f'<svg class="chart" role="img" aria-label="{escape(drawn.alt, quote=True)}"'
    drawn.svg = svg[svg.index("<svg") :].replace("<svg", opening, 1)


def series(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the rows that have a finite number under `key`."""
    found = [(row["step"], row.get(key)) for row in rows]
    kept = [(step, v) for step, v in found if isinstance(v, int | float) and math.isfinite(v)]
    return [step for step, _ in kept], [value for _, value in kept]


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average without the pull towards its start (Adam's bias correction)."""
    mean, total, result = 0.0, 0.0, []
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        result.append(mean / total)
    return result


def learning_chart(rows: Sequence[Row], name: str, key: str, ylabel: str, labels: tuple[str, str]) -> str:
    """What is learnt by, raw and smoothed, the same of held-out data, and where the guard acted.

    `key`: loss or reward, with held_out_ before it of held-out data; `labels`: of the two lines.
    """
    steps, values = series(rows, key)
    calm = smooth(values, 1 - 1 / max(1.0, len(values) / 30))  # over a thirtieth of the run
    held_steps, held = series(rows, f"held_out_{key}")
    with chart(f"{key} {name}", "step", ylabel, 2.9) as drawn:
        axes = drawn.axes
        axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=0.8)
        axes.plot(steps, calm, color=BLUE, linewidth=1.8, label=labels[0])
        if held:
            axes.plot(held_steps, held, color=ORANGE, marker="o", markersize=4, label=labels[1])
        for number, row in enumerate(row for row in rows if "event" in row):
            label = "the guard acted" if number == 0 else None
            axes.axvline(row["step"], color=RED, linewidth=1, linestyle="--", label=label)
        axes.legend()
        drawn.alt = f"{key.capitalize()} of {name} over {steps[-1]} steps, "
        drawn.alt += f"{labels[0]} from {values[0]:.3g} to {calm[-1]:.3g}"
        if held:
            drawn.alt += f", {labels[1]} {held[-1]:.3g} at the end"
    return drawn.svg


def line_chart(rows: Sequence[Row], name: str, key: str, ylabel: str, scale: float = 1.0) -> str:
    """One figure over the steps, from zero."""
    steps, values = series(rows, key)
    scaled = [value * scale for value in values]
    with chart(f"{key} {name}", "step", ylabel, 2.3) as drawn:
        drawn.axes.plot(steps, scaled, color=GREEN, linewidth=1.4)
        drawn.axes.set_ylim(0, 1.15 * max(scaled))
        drawn.axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        drawn.alt = f"{ylabel} of {name} over {steps[-1]} steps, {scaled[-1]:,.4g} at the end"
    return drawn.svg


def gain_chart(rows: Sequence[Row], name: str) -> str:
    """Reward over the root of the divergence that it costs, a point a rollout, later ones darker."""
    found = [(row["reply_kl"], row["reward"]) for row in rows if {"reply_kl", "reward"} <= row.keys()]
    with chart(f"gain {name}", "√ nats a reply from the model before", "mean reward", 2.9) as drawn:
        for number, (kl, reward) in enumerate(found):
            shade = 0.15 + 0.85 * number / len(found)
            drawn.axes.plot(math.sqrt(max(kl, 0.0)), reward, "o", color=BLUE, alpha=shade, markersize=3)
        kl, reward = found[-1]
        drawn.alt = f"Reward of {name} over the divergence: {reward:.3g} at {kl:.3g} nats at the end"
    return drawn.svg


def bar_chart(values: Mapping[str, float], name: str, xlabel: str, ours: str = "", digits: int = 2) -> str:
    """Horizontal bars in the order given, each with its number; `ours` stands out."""
    labels, numbers = list(values), list(values.values())
    ticks = [textwrap.fill(label, 24) for label in labels]
    lines = sum(tick.count("\n") + 2 for tick in ticks)
    with chart(name, xlabel, "", 0.6 + 0.2 * lines) as drawn:
        axes = drawn.axes
        colours = [ORANGE if label == ours else BLUE for label in labels]
        bars = axes.barh(range(len(labels)), numbers, color=colours, height=0.65)
        axes.bar_label(bars, [f"{number:,.{digits}f}" for number in numbers], padding=4, color=_INK)
        axes.set_yticks(range(len(labels)), ticks)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15 * max(numbers))
        axes.grid(axis="y", visible=False)
        told = ", ".join(f"{label} {number:,.{digits}f}" for label, number in values.items())
        drawn.alt = f"{xlabel}: {told}"
    return drawn.svg
