"""Prepared data: nothing lost, nothing twice, nothing held out is in train, whatever the order."""

import json
import random
from pathlib import Path

import pytest

from danlu.core.errors import UserError
from danlu.data.config import CHITCHAT, DataConfig
from danlu.data.documents import read_documents, read_rows
from danlu.data.prepare import prepare, require_disjoint


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"id": f"d{n}", "text": t}) for n, t in enumerate(texts)))
    return path


def run(path: Path, out: Path, **options: object) -> dict:
    return prepare(DataConfig.model_validate({"source": str(path), "out": out, **options}))


def part(out: Path, name: str) -> set[str]:
    return {document.text for document in read_documents(out / f"{name}.jsonl.zst")}


TEXTS = [f"document {number % 180}" for number in range(200)] + ["", " \n", "cafe\u0301", "café"]


def test_every_document_is_in_one_part_or_dropped_with_its_reason(tmp_path: Path) -> None:
    stats = run(write_rows(tmp_path / "a.jsonl", TEXTS), tmp_path / "out", held_out=0.2)
    train, held_out = part(tmp_path / "out", "train"), part(tmp_path / "out", "held_out")
    assert train | held_out == {f"document {number}" for number in range(180)} | {"café"}
    assert not train & held_out
    assert 15 <= len(held_out) <= 60, "about a fifth of 181"
    dropped = {row["id"]: row for _, row in read_rows(tmp_path / "out" / "dropped.jsonl.zst")}
    assert dropped["d180"] == {"id": "d180", "reason": "copy", "twin": "d0"}
    assert dropped["d200"]["reason"] == dropped["d201"]["reason"] == "empty"
    assert dropped["d203"]["twin"] == "d202", "the same after normalisation"
    assert stats["read"] == 204 == stats["train"] + stats["held_out"] + len(dropped)
    assert json.loads((tmp_path / "out" / "stats.json").read_text()) == stats


def test_the_split_is_the_same_in_any_order_and_another_with_another_seed(tmp_path: Path) -> None:
    shuffled = random.Random(1).sample(TEXTS, len(TEXTS))
    for name, texts, seed in (("a", TEXTS, 1), ("b", shuffled, 1), ("c", TEXTS, 2)):
        run(write_rows(tmp_path / f"{name}.jsonl", texts), tmp_path / name, held_out=0.2, seed=seed)
    assert part(tmp_path / "a", "held_out") == part(tmp_path / "b", "held_out")
    assert part(tmp_path / "a", "held_out") != part(tmp_path / "c", "held_out")


def test_a_held_out_text_in_train_is_found(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(write_rows(tmp_path / "a.jsonl", TEXTS), out, held_out=0.2)
    (out / "train.jsonl.zst").write_bytes((out / "held_out.jsonl.zst").read_bytes())
    with pytest.raises(RuntimeError, match=r"train's .* is the held-out"):
        require_disjoint(out)


def test_chitchat_is_prepared_whole(tmp_path: Path) -> None:
    stats = prepare(DataConfig(source=CHITCHAT, out=tmp_path / "out"))
    assert stats["read"] == 7168
    assert stats["held_out"] / stats["read"] == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"text": "only one"}'], "of 1 documents none is left for"),
        (
            ['{"text": "a"}', '{"messages": [{"role": "user", "content": "Hello?"}]}'],
            r"in\.jsonl, line 2: no assistant turn",
        ),
        (
            ['{"messages": [{"role": "user", "content": "Hm"}, {"role": "assistant", "content": " "}]}'],
            r"in\.jsonl, line 1: no assistant turn",
        ),
    ],
)
def test_a_fault_leaves_nothing_half_written(tmp_path: Path, rows: list[str], message: str) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match=message):
        run(tmp_path / "in.jsonl", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
