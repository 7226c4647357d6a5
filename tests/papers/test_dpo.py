"""DPO's experiment: which pairs it takes, that its claims can come out either way, and all of it in small."""

import json
from pathlib import Path

import pytest
from small_models import save_random_model

from danlu.core.errors import UserError
from danlu.model.checkpoint import load
from danlu.papers import dpo
from danlu.papers.config import ReproduceConfig
from danlu.tokens.bpe import train_bpe

ROWS = [
    {
        "conversations": [{"from": "human", "value": f"Is furnace {n} hot?"}],
        "chosen": {"from": "gpt", "value": f"Yes, furnace {n} glows."},
        "rejected": {"from": "gpt", "value": "No."},
    }
    for n in range(12)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_bpe([json.dumps(row) for row in ROWS], 300)
    return save_random_model(tmp_path_factory.mktemp("model") / "chat", tokenizer, noise=0.05)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.json"
    same = {**ROWS[0], "chosen": ROWS[0]["rejected"]}
    long = {**ROWS[0], "rejected": {"from": "gpt", "value": "No! " * 500}}
    path.write_text(json.dumps([*ROWS, same, long]))
    return path


def test_pairs_that_are_short_and_differ(rows: Path, base: Path) -> None:
    tokenizer = load(base)[1]
    pairs = dpo.read_pairs(rows, tokenizer, 64)
    assert len(pairs) == len(ROWS)
    for pair, row in zip(pairs, ROWS, strict=True):
        for ids, which in zip(pair.replies, ("chosen", "rejected"), strict=True):
            assert tokenizer.decode(ids[:-1]).strip() == row[which]["value"]  # type: ignore[index]
            assert ids[-1] in tokenizer.stop_ids


def test_every_fold_and_its_control(
    rows: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In small: each pair is held out once, and a second run takes what the first has left."""
    monkeypatch.setattr(dpo, "piqa", lambda ref, out, setup: (0.5, (0.4, 0.6)))
    setup = dpo.Setup(base=str(base), longest=64, folds=3, steps=2, batch_size=2, rank=2)
    config = ReproduceConfig(name="dpo", data=rows)
    result = dpo.run(config, tmp_path / "out", setup)
    assert result.figures["pairs"] == 12
    assert len(result.figures["accuracy by fold"]) == 3
    assert result.figures["by length"]["share"] == 1
    assert (tmp_path / "out" / "plot.png").exists()
    held = [
        json.loads((tmp_path / "out" / f"real-{fold}" / "held_out.json").read_text()) for fold in range(3)
    ]
    assert [len(pairs) for pairs in held] == [4, 4, 4]
    again = dpo.run(config, tmp_path / "out", setup)
    assert again.figures == result.figures


def test_claims_can_come_out_either_way() -> None:
    ahead = [1.0] * 150 + [-1.0] * 60
    assert dpo.rank_claim(ahead).verdict == "holds"
    assert dpo.rank_claim(ahead[:190]).verdict == "does not hold"
    assert dpo.rank_claim([1.0, -1.0] * 105).verdict == "does not hold"
    assert dpo.share([1.0, 0.0, -1.0, -1.0]) == 0.375
    assert dpo.kept_claim((0.6, (0.55, 0.65)), (0.56, (0.5, 0.62))).verdict == "holds"
    assert dpo.kept_claim((0.6, (0.55, 0.65)), (0.5, (0.44, 0.56))).verdict == "does not hold"
    assert dpo.coin_control([1.0, -1.0] * 50).null
    assert not dpo.coin_control(ahead).null


def test_no_pairs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pairs to learn from"):
        dpo.run(ReproduceConfig(name="dpo"), tmp_path)
