"""The report card of an evaluation: scores, calibration, and the questions with what was answered."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from danlu.core import charts
from danlu.core.files import atomic_write
from danlu.core.report import Figure, page_templates
from danlu.evaluate.calibration import (
    brier_score,
    calibration_error,
    choice_probabilities,
    reliability,
)

SHOWN = 300
"""Questions of a task on the page; the samples file has them all."""

Sample = Mapping[str, Any]


def write_card(
    result: Mapping[str, Any], samples: Mapping[str, Sequence[Sample]], about: Any, path: Path
) -> None:
    """One HTML file that needs nothing else. `about`: what is said of the model, the command and the time."""
    tasks = []
    for name, rows in samples.items():
        scores = [score for score in result["scores"] if score["task"] == name]
        questions = items(rows[:SHOWN])
        tasks.append(
            {
                "name": name,
                "scores": scores,
                "calibration": result["calibration"].get(name),
                "figure": calibration_figure(name, rows) if name in result["calibration"] else None,
                "total": len(rows),
                "questions": questions,
            }
        )
    page = page_templates(Path(__file__).parent).get_template("card.html.jinja")
    with atomic_write(path) as file:
        file.write(
            page.render(
                about=about,
                made=datetime.now().astimezone().isoformat(timespec="minutes"),
                result=result,
                overview=score_figure(result["scores"]),
                tasks=tasks,
                data=embedded({task["name"]: task["questions"] for task in tasks}),
            )
        )


def embedded(value: Any) -> Markup:
    """JSON that can't end the element it stands in."""
    text = json.dumps(value, ensure_ascii=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


# Questions


def items(rows: Sequence[Sample]) -> dict[str, Any]:
    """What the questions have in common before them, and each: prompt, choices or answer, and how it went."""
    prompts = [str(arguments(row)[0][0]) for row in rows]
    first, last = min(prompts), max(prompts)  # what these two begin with, all do
    length = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    common = first[:length] if len(prompts) > 1 else ""
    common = common[: common.rfind("\n\n") + 2] if "\n\n" in common else ""
    return {
        "before": common,
        "items": [_item(row, p[len(common) :]) for row, p in zip(rows, prompts, strict=True)],
    }


def arguments(row: Sample) -> list[Sequence[Any]]:
    """Of each request: the context, and the continuation or how to generate."""
    found = row["arguments"]
    if isinstance(found, Mapping):  # as the harness writes it into files
        return [[*one.values()] for one in found.values()]
    return [*found]


def _item(row: Sample, prompt: str) -> dict[str, Any]:
    metric = row["metrics"][0]
    score = row[metric]
    score = float(score[1] if isinstance(score, tuple | list) else score)
    found: dict[str, Any] = {
        "id": row["doc_id"],
        "prompt": prompt,
        "right": score,
        "subject": row["doc"].get("subject", ""),
    }
    if thoughts := row.get("thoughts"):
        found["thoughts"] = thoughts
    if is_choice(row):
        logprobs = choice_logprobs(row)
        choices = [str(one[1]) for one in arguments(row)]
        found["choices"] = [
            {"text": text.strip(), "p": round(p, 4)}
            for text, p in zip(choices, choice_probabilities(logprobs), strict=True)
        ]
        found["answer"] = target_number(row)
    else:
        found["said"] = str(row["filtered_resps"][0])
        found["wanted"] = str(row["target"])
    return found


def is_choice(row: Sample) -> bool:
    """Whether the question was one of several continuations."""
    return len(row["filtered_resps"]) > 1 and len(arguments(row)) == len(row["filtered_resps"])


def choice_logprobs(row: Sample) -> list[float]:
    return [float(one[0]) for one in row["filtered_resps"]]


def target_number(row: Sample) -> int:
    """Which choice is right."""
    return int(row["target"]) if str(row["target"]).isdigit() else 0


# Figures


def calibration(rows: Sequence[Sample]) -> dict[str, float]:
    """Of a task of choices: expected calibration error and Brier score, and the mean confidence."""
    probabilities = [choice_probabilities(choice_logprobs(row)) for row in rows]
    right = [target_number(row) for row in rows]
    sure = [max(line) for line in probabilities]
    correct = [line.index(max(line)) == answer for line, answer in zip(probabilities, right, strict=True)]
    return {
        "ece": calibration_error(sure, correct),
        "brier": brier_score(probabilities, right),
        "confidence": sum(sure) / len(sure),
        "accuracy": sum(correct) / len(correct),
    }


def calibration_figure(name: str, rows: Sequence[Sample]) -> Figure:
    """How often the model is right, over how sure it is."""
    probabilities = [choice_probabilities(choice_logprobs(row)) for row in rows]
    sure = [max(line) for line in probabilities]
    correct = [
        line.index(max(line)) == target_number(row) for line, row in zip(probabilities, rows, strict=True)
    ]
    bins = reliability(sure, correct)
    with charts.chart(f"calibration {name}", "confidence", "share that is right", 3.0) as drawn:
        drawn.axes.plot([0, 1], [0, 1], color=charts.GREEN, linewidth=1, linestyle="--", label="as it says")
        xs, ys = [one.confidence for one in bins], [one.accuracy for one in bins]
        drawn.axes.plot(xs, ys, color=charts.BLUE, marker="o", markersize=4, label="the model")
        drawn.axes.set(xlim=(0, 1), ylim=(0, 1))
        drawn.axes.legend()
        drawn.alt = f"Reliability of {name}: " + ", ".join(
            f"{one.accuracy:.0%} right at {one.confidence:.0%}" for one in bins
        )
    return Figure(
        drawn.svg,
        "Ten groups of equally many questions, from the least to the most confident: below the dashed line "
        "the model is surer than it should be.",
    )


def score_figure(scores: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Each task's first score with its interval, and chance."""
    first = list({score["task"]: score for score in reversed(scores)}.values())[::-1]
    if not first:
        return None
    with charts.chart("scores", "score", "", 0.7 + 0.32 * len(first)) as drawn:
        axes = drawn.axes
        for place, score in enumerate(first):
            low, high = score["interval"]
            axes.plot([low, high], [place, place], color=charts.BLUE, linewidth=5, alpha=0.45)
            axes.plot(score["value"], place, marker="o", color=charts.BLUE)
            if score["chance"] is not None:
                axes.plot(
                    score["chance"], place, marker="|", markersize=14, markeredgewidth=2, color=charts.RED
                )
        axes.set_yticks(range(len(first)), [score["task"] for score in first])
        axes.set_ylim(len(first) - 0.5, -0.5)
        axes.set_xlim(0, max(1.0, *(score["interval"][1] for score in first)))
        drawn.alt = "Scores: " + ", ".join(f"{s['task']} {s['value']:.3f}" for s in first)
    return Figure(drawn.svg, "Dots are scores, bars their 95 % intervals, red marks what guessing gives.")
