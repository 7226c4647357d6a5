"""`danlu eval table`: the scores of several evaluations side by side, such as those of one family of runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from danlu.core.errors import UserError
from danlu.core.files import read_json
from danlu.core.show import console, table
from danlu.evaluate.config import TableConfig


def scores(config: TableConfig) -> dict[str, Any]:
    """By task and metric each evaluation's score. Raises UserError for a folder that holds none."""
    found: dict[str, dict[str, Any]] = {}
    names = []
    for folder in config.runs:
        path = Path(folder) / "results.json"
        if not path.is_file():
            raise UserError(f"{path} is missing", "name folders that danlu eval --tasks wrote with --out")
        kept = read_json(path)
        name = Path(folder).name if Path(folder).name not in names else str(folder)
        names.append(name)
        for task, metrics in kept["results"].items():
            for metric, value in metrics.items():
                label, _, filtered = metric.partition(",")
                if isinstance(value, int | float) and filtered and "stderr" not in label:
                    shown = task if filtered == "none" else f"{task} ({filtered})"
                    asked = kept.get("n-samples", {}).get(task, {}).get("effective")
                    row = found.setdefault(f"{shown} · {label}", {})
                    row[name] = {"value": value, "n": asked, "version": kept.get("versions", {}).get(task)}
    rows = [
        {
            "score": key,
            "runs": runs,
            "alike": len({(one["n"], str(one["version"])) for one in runs.values()}) == 1,
        }
        for key, runs in found.items()
    ]
    return {"runs": names, "rows": rows}


def show(result: Mapping[str, Any]) -> None:
    rows = []
    for row in result["rows"]:
        cells = [
            f"{row['runs'][name]['value']:.4f}" if name in row["runs"] else "" for name in result["runs"]
        ]
        rows.append((row["score"], *cells, "" if row["alike"] else "not the same questions"))
    console().print(table("Scores", ("", *result["runs"], ""), rows))
