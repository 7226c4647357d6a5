"""The page of `danlu eval code`: each problem, its programs, what failed and with which input."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from danlu.core.files import atomic_write
from danlu.core.report import page_templates
from danlu.evaluate.code.problems import NAMES, Problem
from danlu.evaluate.code.run import Verdict, key_of
from danlu.evaluate.code.samples import Sample

SHOWN = 20
"""Programs of a problem on the page, wrong ones first; results.jsonl has them all."""
LONGEST = 4000
"""Characters of a program on the page."""


def write_page(
    result: Mapping[str, Any],
    problems: Mapping[str, Problem],
    samples: Sequence[Sample],
    verdicts: Mapping[str, Verdict],
    path: Path,
    harder: Mapping[str, Problem],
) -> None:
    """One HTML file that needs nothing else. `harder`: the problems with a test of more inputs."""
    by: dict[str, Counter[str]] = {name: Counter() for name in problems}
    texts, later = {}, {}
    for sample in samples:
        key = key_of(problems[sample.task], sample.program)
        by[sample.task][key] += 1
        texts[key] = sample.completion
        if sample.task in harder:
            later[key] = verdicts.get(key_of(harder[sample.task], sample.program))
    shown = []
    for name, problem in problems.items():
        if name in result["broken_references"]:
            continue
        rows: list[dict[str, Any]] = [
            {
                "times": times,
                "text": texts[key][:LONGEST],
                "verdict": verdicts[key],
                "later": later.get(key),
            }
            for key, times in by[name].most_common()
        ]
        rows.sort(key=lambda row: row["verdict"].passed)
        passed = sum(row["times"] for row in rows if row["verdict"].passed)
        shown.append(
            {
                "id": name,
                "language": NAMES[problem.language],
                "prompt": problem.prompt,
                "n": sum(by[name].values()),
                "passed": passed,
                "programs": rows[:SHOWN],
                "more": len(rows) - SHOWN,
                "plus": result.get("plus", {}).get("problems", {}).get(name),
            }
        )
    page = page_templates(Path(__file__).parent).get_template("code.html.jinja")
    made = datetime.now().astimezone().isoformat(timespec="minutes")
    with atomic_write(path) as file:
        file.write(page.render(result=result, problems=shown, made=made, scores=scores_of(result)))


def scores_of(result: Mapping[str, Any]) -> list[tuple[str, float, tuple[float, float]]]:
    """Name, score and interval of each pass@k."""
    names = [name for name in result if name.startswith("pass@") and not name.endswith(" interval")]
    return [(name, result[name], result[f"{name} interval"]) for name in names]
