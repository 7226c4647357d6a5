"""One page about a run, for people (`report.html`), and the same figures for scripts (`report.json`)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from danlu.core import charts
from danlu.core.artefacts import DONE, read_lineage
from danlu.core.drawing import draw
from danlu.core.errors import UserError
from danlu.core.files import atomic_write, read_jsonl, read_text
from danlu.core.lineage import Node, results_of, stages_of, trace
from danlu.core.metrics import read_metrics
from danlu.core.options import ReportConfig
from danlu.core.progress import clock
from danlu.core.show import show_size, show_value
from danlu.core.stage import as_json, read_result, write_json
from danlu.core.summary import summary

_LONGEST_CURVE = 500
"""Points of a curve in report.json; `metrics.jsonl` has them all."""


@dataclass(frozen=True)
class Figure:
    """A drawing with its caption."""

    svg: str
    caption: str


def report(config: ReportConfig) -> dict[str, Any]:
    """`danlu report`: makes the page again. Returns where it is."""
    write_report(config.run)
    return {"report": str(config.run / "report.html"), "figures": str(config.run / "report.json")}


def write_report(run: Path) -> None:
    """Writes `report.html` and `report.json`. Raises UserError where the folder holds no run."""
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run}: not the folder of a run", "give a folder under runs/ that `danlu run` wrote")
    figures = collect(run)
    write_json(as_json(figures), run / "report.json")
    known: dict[Path, Node] = {}
    nodes = [trace(folder, known) for folder in results_of(run)]
    page = page_templates().get_template("report.html.jinja")
    with atomic_write(run / "report.html") as file:
        file.write(
            page.render(
                report=figures,
                folder=run,
                labels=figures.get("labels", {}),
                drawing=Markup(draw(nodes)),
                changed=[f"{Path(n.path).name}: {line}" for n in known.values() for line in n.changed],
                training=[_training(stage) for stage in figures["stages"] if _has_trained(stage)],
                costs=_costs(figures["stages"]),
                scores=_scores(figures),
                loses=_loses(figures),
                recipe=read_text(run / "recipe.yaml"),
            )
        )


def collect(run: Path) -> dict[str, Any]:
    """Every figure of the report. What an evaluation has found, such as `bits_per_byte` by compressor,
    stands at the top level too: it is the result of a stage that trains nothing and that no other reads."""
    stages = [_stage(folder) for folder in stages_of(run)]
    last = {folder.name for folder in results_of(run)}
    scores: dict[str, Any] = {}
    for stage in stages:
        if stage["name"] in last and not stage["curves"]:
            scores |= stage["result"]
    figures: dict[str, Any] = {
        **scores,  # first: the names below are the report's own
        "run": run.resolve().name,
        "made": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": sum(stage["seconds"] for stage in stages),
        "peak_memory_bytes": max(stage["peak_memory_bytes"] for stage in stages),
        "machine": stages[-1]["machine"],
        "versions": stages[-1]["versions"],
        "stages": stages,
    }
    return {"summary": summary(figures), **figures}


def _stage(folder: Path) -> dict[str, Any]:
    lineage = read_lineage(folder)
    rows = read_metrics(folder)
    return {
        "name": folder.name,
        "verb": lineage["verb"],
        "done": (folder / DONE).exists(),
        "command": lineage["command"],
        "seconds": lineage.get("seconds", 0.0),
        "peak_memory_bytes": lineage.get("peak_memory_bytes", 0),
        "sha256": lineage.get("sha256", ""),
        "inputs": lineage["inputs"],
        "machine": lineage["machine"],
        "versions": lineage["versions"],
        "config": yaml.safe_load(read_text(folder / "config.yaml")),
        "result": read_result(folder),
        "curves": _thin([row for row in rows if "event" not in row]),
        "events": [row for row in rows if "event" in row],
        "samples": read_jsonl(folder / "samples.jsonl"),
        "held_out": read_jsonl(folder / "held_out.jsonl"),
        "logbook": read_text(folder / "logbook.md") if (folder / "logbook.md").exists() else "",
    }


def _thin(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most so many rows of training, evenly; every row of an evaluation."""
    every = math.ceil(len(rows) / _LONGEST_CURVE)
    last = len(rows) - 1
    return [
        row for number, row in enumerate(rows) if number % every == 0 or number == last or "loss" not in row
    ]


def _has_trained(stage: Mapping[str, Any]) -> bool:
    """Whether there is a step of training to show."""
    return bool(charts.series(stage["curves"], "loss")[0])


def _training(stage: Mapping[str, Any]) -> dict[str, Any]:
    """What is shown of a training stage."""
    rows, name = stage["curves"], stage["name"]
    figures = _reward_figures(rows, name) or [
        Figure(
            charts.learning_chart([*rows, *stage["events"]], name, "loss", "loss", ("training", "held out")),
            f"Loss over the steps: {_LOSSES.get(stage['verb'], _LOSSES[''])}; lower is better. The faint "
            "line is each step, the strong one their moving average; the dots are held-out data, which is "
            "never trained on: where they rise while the line falls, the model learns by heart.",
        )
    ]
    if charts.series(rows, "tokens_per_second")[0]:
        chart = charts.line_chart(rows, name, "tokens_per_second", "tokens per second")
        caption = (
            "Speed of the steps alone, without evaluations. A first step that is slow is being compiled; "
            "other dips are checkpoints being written, or another program at work."
        )
        figures.append(Figure(chart, caption))
    if charts.series(rows, "memory")[0]:
        chart = charts.line_chart(rows, name, "memory", "memory, GB", 1e-9)
        figures.append(Figure(chart, "Peak memory so far, of the whole process."))
    prompts: dict[str, list[dict[str, Any]]] = {}
    for row in stage["samples"]:
        prompts.setdefault(row["prompt"], []).append(row)
    return {**stage, "figures": figures, "prompts": prompts, "before_and_after": _compared(stage)}


_LOSSES = {
    "": "how surprised the model is by the next token",
    "reward": "how wrong the model is about which of two replies is preferred",
    "dpo": "how far the policy is from telling preferred replies from others",
}
"""By verb, what a loss means."""


def _reward_figures(rows: Sequence[Mapping[str, Any]], name: str) -> list[Figure]:
    """Of a policy that learns from rewards; none of another."""
    if not charts.series(rows, "reward")[0]:
        return []
    figures = [
        Figure(
            charts.learning_chart(
                rows, name, "reward", "mean reward", ("drawn to learn from", "held-out prompts")
            ),
            "What the policy's replies are worth. The faint line is each rollout, the strong one their "
            "moving average; the dots are replies to prompts that it never learns from.",
        )
    ]
    if charts.series(rows, "reply_kl")[0]:
        figures.append(
            Figure(
                charts.gain_chart(rows, name),
                "What it costs: how far the replies have gone from the model before. Where the points no "
                "longer rise to the right, going on buys nothing; a model of rewards may be wrong out there.",
            )
        )
    return figures


def _compared(stage: Mapping[str, Any]) -> dict[str, Any] | None:
    """Replies to held-out prompts by the first and by the last model, and how often the last one wins."""
    rows = stage["held_out"]
    steps = sorted({row["step"] for row in rows})
    if len(steps) < 2:
        return None
    before, after = ([row for row in rows if row["step"] == step] for step in (steps[0], steps[-1]))
    wins = [row for row in stage["curves"] if row["step"] == steps[-1] and "wins" in row]
    return {
        "step": steps[-1],
        "wins": wins[-1] if wins else None,
        "pairs": [
            {"prompt": one["prompt"], "before": one, "after": other}
            for one, other in zip(before, after, strict=False)
        ],
    }


def _costs(stages: Sequence[Mapping[str, Any]]) -> Figure | None:
    seconds = {stage["name"]: stage["seconds"] for stage in stages if stage["seconds"]}
    if not seconds:
        return None
    chart = charts.bar_chart(seconds, "time by stage", "seconds", digits=1)
    return Figure(chart, "Where the time went.")


def _scores(figures: Mapping[str, Any]) -> Figure | None:
    bits = figures.get("bits_per_byte")
    if not isinstance(bits, Mapping):
        return None
    labels = figures.get("labels", {})
    ordered = {labels.get(name, name): bits[name] for name in sorted(bits, key=lambda name: bits[name])}
    ours = labels.get("model", "model")
    chart = charts.bar_chart(ordered, "bits per byte", "bits per byte of held-out text", ours)
    return Figure(
        chart,
        "What one byte of text that the model has never seen costs under each compressor; shorter is better. "
        "A model that predicts text well compresses it well.",
    )


def _loses(figures: Mapping[str, Any]) -> bool:
    """Whether some compressor needs fewer bytes than the model once the model's own bytes count."""
    bits = figures.get("bits_per_byte_with_model")
    return isinstance(bits, Mapping) and "model" in bits and bits["model"] > min(bits.values())


def _listed(values: Sequence[Any]) -> str:
    """The first of them, and how many more there are."""
    more = f" … and {len(values) - 12} more" if len(values) > 12 else ""
    return ", ".join(show_value(value) for value in values[:12]) + more


def page_templates(*folders: Path) -> jinja2.Environment:
    """Templates of these folders, and what they share: `page.css` and filters."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "clock": clock,
        "size": show_size,
        "value": show_value,
        "words": lambda name: str(name).replace("_", " "),
        "listed": _listed,
        "svg": lambda figure: Markup(figure.svg),
        "yaml": lambda values: yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
    }
    environment.tests["table"] = lambda value: isinstance(value, Mapping)
    environment.tests["rows"] = lambda value: (
        isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)
    )
    return environment
