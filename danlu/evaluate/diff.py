"""`danlu eval diff A B`: whether one evaluation's scores differ from another's, item by item."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from danlu.core.errors import UserError
from danlu.core.files import atomic_write
from danlu.core.report import page_templates
from danlu.core.show import console, table
from danlu.data.documents import read_rows
from danlu.evaluate.card import embedded, items
from danlu.evaluate.config import DiffConfig
from danlu.evaluate.intervals import Interval, bootstrap_interval


@dataclass(frozen=True)
class Difference:
    """Of one metric of a task: B minus A on the same questions."""

    task: str
    metric: str
    a: float
    b: float
    difference: float
    interval: Interval
    """95 %, by bootstrap of the questions, each with both of its scores."""
    n: int
    only_a: int
    """Questions on which A did better."""
    only_b: int

    @property
    def verdict(self) -> str:
        if self.interval[0] > 0:
            return "B is better"
        return "B is worse" if self.interval[1] < 0 else "no difference seen"


def compare(
    task: str, metric: str, a: Sequence[float], b: Sequence[float], resamples: int = 10_000
) -> Difference:
    """Scores of the same questions, in the same order."""
    gaps = [after - before for before, after in zip(a, b, strict=True)]
    return Difference(
        task=task,
        metric=metric,
        a=sum(a) / len(a),
        b=sum(b) / len(b),
        difference=sum(gaps) / len(gaps),
        interval=bootstrap_interval(gaps, resamples=resamples),
        n=len(gaps),
        only_a=sum(gap < 0 for gap in gaps),
        only_b=sum(gap > 0 for gap in gaps),
    )


def diff(config: DiffConfig) -> dict[str, Any]:
    """Compares every task that both have. Raises UserError where there is none, or one is not the same."""
    before, after = (samples_of(folder) for folder in (config.a, config.b))
    tasks = [task for task in before if task in after]
    if not tasks:
        raise UserError(
            f"{config.a} and {config.b} have no task in common: {', '.join(before)}; {', '.join(after)}",
            "evaluate both on the same tasks",
        )
    found: list[Difference] = []
    flipped: dict[str, Any] = {}
    for task in tasks:
        pairs = matched(task, before[task], after[task])
        for metric in pairs[0][0]["metrics"]:
            one = [_score(row, metric) for row, _ in pairs]
            other = [_score(row, metric) for _, row in pairs]
            found.append(compare(task, metric, one, other))
        flipped[task] = _flips(pairs)
    result = {
        "a": str(config.a),
        "b": str(config.b),
        "differences": [{**asdict(one), "verdict": one.verdict} for one in found],
        "only_in_a": [task for task in before if task not in after],
        "only_in_b": [task for task in after if task not in before],
    }
    page = page_templates(Path(__file__).parent).get_template("diff.html.jinja")
    with atomic_write(config.page) as file:
        made = datetime.now().astimezone().isoformat(timespec="minutes")
        file.write(page.render(result=result, tasks=tasks, made=made, data=embedded(flipped)))
    return {**result, "page": str(config.page)}


def samples_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """By task, from the files that `danlu eval --tasks` and the harness write. Raises UserError."""
    files = sorted(folder.glob("samples_*.jsonl"))
    if not files:
        raise UserError(
            f"{folder} has no samples_TASK.jsonl", "name the folder that danlu eval --tasks wrote with --out"
        )
    found = {}
    for file in files:
        rows = [row for _, row in read_rows(file)]
        if not rows:
            raise UserError(f"{file} is empty", "evaluate again")
        if wrong := [
            n for n, row in enumerate(rows, 1) if not {"doc_id", "metrics", "doc_hash"} <= row.keys()
        ]:
            raise UserError(
                f"{file}, row {wrong[0]}: not a sample of lm-evaluation-harness", "evaluate again"
            )
        found[file.stem.removeprefix("samples_")] = rows
    return found


def matched(task: str, before: Sequence[Any], after: Sequence[Any]) -> list[tuple[Any, Any]]:
    """The questions that both were asked. Raises UserError where they are not the same ones."""
    others = {(row["doc_id"], row.get("filter")): row for row in after}
    pairs = [(row, others[key]) for row in before if (key := (row["doc_id"], row.get("filter"))) in others]
    if not pairs:
        raise UserError(f"{task}: no question was asked in both", "evaluate both with the same limit")
    for one, other in pairs:
        if one["doc_hash"] != other["doc_hash"]:
            raise UserError(
                f"{task}, question {one['doc_id']}: not the same question in both",
                "evaluate both on the same version of the task",
            )
    return pairs


def _score(row: Mapping[str, Any], metric: str) -> float:
    score = row[metric]
    return float(score[1] if isinstance(score, list) else score)


def _flips(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """Questions on which the first metric differs, with both answers."""
    metric = pairs[0][0]["metrics"][0]
    changed = [pair for pair in pairs if _score(pair[0], metric) != _score(pair[1], metric)]
    if not changed:
        return {"before": "", "items": []}
    one, other = (items([pair[side] for pair in changed]) for side in (0, 1))
    return {
        "before": one["before"],
        "items": [{**a, "other": b} for a, b in zip(one["items"], other["items"], strict=True)],
    }


def show(result: Mapping[str, Any]) -> None:
    """The table, and where the page is."""
    rows = [
        (
            one["task"],
            one["metric"],
            f"{one['a']:.4f}",
            f"{one['b']:.4f}",
            f"{one['difference']:+.4f}",
            f"{one['interval'][0]:+.3f} … {one['interval'][1]:+.3f}",
            f"{one['only_a']} / {one['only_b']}",
            str(one["n"]),
            one["verdict"],
        )
        for one in result["differences"]
    ]
    out = console()
    columns = ("task", "metric", "A", "B", "B − A", "95 %", "only A / B right", "n", "")
    out.print(table(f"A = {result['a']}, B = {result['b']}", columns, rows))
    for side in ("a", "b"):
        if missing := result[f"only_in_{side}"]:
            out.print(f"only in {side.upper()}, not compared: {', '.join(missing)}")
    out.print(f"What changed, question by question: {result['page']}", soft_wrap=True)
