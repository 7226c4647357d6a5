"""Two evaluations compared: the interval covers the truth, and what isn't the same question is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from danlu.core.errors import UserError
from danlu.evaluate.config import DiffConfig
from danlu.evaluate.diff import compare, diff


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Two models whose answers hang together: 1,000 draws of 200 questions."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        hard = generator.uniform(size=200)
        a = (generator.uniform(size=200) < 0.2 + 0.5 * hard).astype(float)
        b = np.where(generator.uniform(size=200) < 0.6, a, generator.uniform(size=200) < 0.6)
        # E[b − a] = 0.4 · (0.6 − E[a]), E[a] = 0.2 + 0.5 · 0.5
        low, high = compare("t", "acc", a.tolist(), b.tolist(), resamples=1000).interval
        covered += low <= 0.4 * (0.6 - 0.45) <= high
    assert 930 <= covered <= 970


def test_unpaired_it_would_be_wider() -> None:
    generator = np.random.default_rng(1)
    a = (generator.uniform(size=300) < 0.5).astype(float)
    b = a.copy()
    b[:12] = 1 - b[:12]
    low, high = compare("t", "acc", a.tolist(), b.tolist()).interval
    assert high - low < 0.1 < 2 * 1.96 * (2 * 0.25 / 300) ** 0.5


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, **tasks: list[dict[str, Any]]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for task, rows in tasks.items():
            (folder / f"samples_{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


def sample(number: int, right: float, text: str = "") -> dict[str, Any]:
    """As the harness writes one: the second choice is right."""
    prompt = text or f"What is {number}?"
    return {
        "doc_id": number,
        "doc": {"question": prompt},
        "target": "1",
        "arguments": {f"gen_args_{k}": {"arg_0": prompt, "arg_1": f" {k}"} for k in range(2)},
        "filtered_resps": [["-2.0", "False"], [str(-3.0 + 2 * right), "False"]],
        "filter": "none",
        "metrics": ["acc"],
        "doc_hash": str(hash(prompt)),
        "acc": right,
    }


def test_what_flipped(write: Callable[..., Path], tmp_path: Path) -> None:
    before = write("a", quiz=[sample(n, float(n < 20)) for n in range(40)], gone=[sample(0, 1.0)])
    after = write("b", quiz=[sample(n, float(n < 30 and n != 3)) for n in range(40)], new=[sample(0, 1.0)])
    found = diff(DiffConfig(a=before, b=after, page=tmp_path / "diff.html"))
    [one] = found["differences"]
    assert (one["a"], one["b"], one["n"], one["only_a"], one["only_b"]) == (0.5, 29 / 40, 40, 1, 10)
    assert one["difference"] == pytest.approx(9 / 40)
    assert one["verdict"] == "B is better"
    assert (found["only_in_a"], found["only_in_b"]) == (["gone"], ["new"])
    page = (tmp_path / "diff.html").read_text("utf-8")
    assert "What is 3?" in page
    assert "What is 35?" not in page, "nothing changed there"


def test_the_same_is_no_difference(write: Callable[..., Path], tmp_path: Path) -> None:
    rows = [sample(n, float(n % 2)) for n in range(30)]
    found = diff(DiffConfig(a=write("a", quiz=rows), b=write("b", quiz=rows), page=tmp_path / "diff.html"))
    assert found["differences"][0]["interval"] == (0.0, 0.0)
    assert found["differences"][0]["verdict"] == "no difference seen"


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"else": [sample(0, 1.0)]}, "no task in common"),
        ({"quiz": [sample(1, 1.0, text="Who are you?")]}, "not the same question"),
        ({"quiz": [sample(9, 1.0)]}, "no question was asked in both"),
        ({"quiz": []}, "is empty"),
        ({"quiz": [{"doc_id": 1}]}, "row 1: not a sample"),
        ({}, "no samples_TASK.jsonl"),
    ],
)
def test_what_cannot_be_compared_is_said(
    write: Callable[..., Path], tmp_path: Path, other: dict[str, Any], told: str
) -> None:
    config = DiffConfig(
        a=write("a", quiz=[sample(1, 1.0)]), b=write("b", **other), page=tmp_path / "diff.html"
    )
    with pytest.raises(UserError, match=told):
        diff(config)
    assert not config.page.exists()
