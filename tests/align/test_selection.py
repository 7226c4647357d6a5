"""`danlu best-of-n`: which replies are kept, what the best of n is worth, and runs that were cut."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from danlu.align import selection
from danlu.align.config import BestOfNConfig
from danlu.align.rollouts import Drawer
from danlu.align.selection import best_of_n
from danlu.core.errors import UserError
from danlu.data.documents import read_rows
from danlu.data.rankings import to_ranked
from danlu.tokens.config import TokenizeConfig
from danlu.tokens.shards import Shards
from danlu.tokens.tokenize import tokenize


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Where is the cat {n}?"}) + "\n" for n in range(40)))
    return path


def config(prompts: Path, chat_model: Path, out: Path, **values: Any) -> BestOfNConfig:
    return BestOfNConfig.model_validate(
        {
            "data": prompts,
            "init_from": str(chat_model),
            "out": out,
            "n": 4,
            "max_tokens": 10,
            "sequence_length": 64,
            "held_out": 0.25,
            "rewards": [{"rule": "length"}],
            **values,
        }
    )


def rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path)]


def test_the_best_replies_become_conversations(prompts: Path, chat_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = best_of_n(config(prompts, chat_model, out))
    answered = rows(out / "replies.jsonl")
    assert result["prompts"] == len(answered) == 40
    for part in ("train", "held_out"):
        kept = {
            row["messages"][0]["content"]: row["messages"][1]["content"]
            for row in rows(out / f"{part}.jsonl.zst")
        }
        asked = [row for row in answered if row["part"] == part and len(set(row["rewards"])) > 1]
        assert len(asked) == len(kept) == result[f"{part} rows"] > 3
        for row in asked:
            assert len(kept[row["prompt"][0]["content"]]) == max(map(len, row["replies"]))
    for n in (1, 2, 4):
        by_hand = [
            sum(max(group) for group in groups) / len(groups)
            for row in answered
            for groups in [list(combinations(row["rewards"], n))]
        ]
        assert result["of all"][f"best of {n}"]["reward"] == pytest.approx(sum(by_hand) / len(by_hand))


def test_pairs_of_the_best_and_the_worst(prompts: Path, chat_model: Path, tmp_path: Path) -> None:
    """They are preferences, which can be learnt from."""
    out = tmp_path / "out"
    best_of_n(config(prompts, chat_model, out, keep="pairs"))
    kept = rows(out / "train.jsonl.zst")
    assert all(len(row["replies"][0]) > len(row["replies"][1]) for row in kept)
    settings = {"data": out, "tokenizer": chat_model, "kind": "preferences", "out": tmp_path / "tokens"}
    tokenize(TokenizeConfig.model_validate(settings))
    assert Shards(tmp_path / "tokens" / "train").n_supervised > 0


def test_questions_for_people(
    prompts: Path, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At random, or what judges disagree about most; what comes back from the page is a preference."""
    result = best_of_n(
        config(prompts, chat_model, tmp_path / "random", keep="questions", rewards=[], questions=7)
    )
    asked = rows(tmp_path / "random" / "questions.jsonl")
    assert result["questions"] == len(asked) == 7
    assert len({row["prompt"] for row in asked}) == 7
    assert {row["part"] for row in rows(tmp_path / "random" / "replies.jsonl")} == {"train"}
    assert all(row["a"] != row["b"] for row in asked)

    def judge(ref: str, *_: Any) -> Any:
        sign = 1 if ref == str(prompts) else -1
        return lambda prompts, texts: [sign * len(text) for text in texts]

    monkeypatch.setattr(selection, "RewardModel", judge)
    both = [str(prompts), str(chat_model)]
    out = tmp_path / "judged"
    best_of_n(config(prompts, chat_model, out, keep="questions", rewards=[], judges=both))
    asked = rows(out / "questions.jsonl")
    gaps = [abs(len(row["a"]) - len(row["b"])) for row in asked]
    assert gaps == sorted(gaps, reverse=True)
    assert [row["disagreement"] for row in asked] == gaps
    drawn = {
        row["prompt"][0]["content"]: list(map(len, row["replies"])) for row in rows(out / "replies.jsonl")
    }
    for row, gap in zip(asked, gaps, strict=True):
        lengths = drawn[row["messages"][0]["content"]]
        assert gap == max(lengths) - min(lengths)
    for answer, better in (("a", "a"), ("b", "b")):
        (ranked,) = to_ranked({**asked[0], "answer": answer}, "here")
        assert ranked.prompt == asked[0]["messages"]
        assert ranked.replies[0] == asked[0][better]
        assert ranked.fault is None
    assert to_ranked({**asked[0], "answer": "tie"}, "here")[0].fault == "neither reply is better"
    with pytest.raises(UserError, match="the answer is 'c'"):
        to_ranked({**asked[0], "answer": "c"}, "here")


def test_only_what_is_worth_so_much(prompts: Path, chat_model: Path, tmp_path: Path) -> None:
    """Also where all replies are; none at all is an error."""
    right: dict[str, Any] = {"rewards": [{"regex": "^"}], "least": 1.0}
    assert best_of_n(config(prompts, chat_model, tmp_path / "all", **right))["train rows"] > 20
    for values in ({**right, "least": 2.0}, {**right, "least": None}):
        with pytest.raises(UserError, match="no reply is worth keeping"):
            best_of_n(config(prompts, chat_model, tmp_path / "none", **values))


def test_a_run_that_was_cut_goes_on(
    prompts: Path, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had written down is not asked again, but for a chunk that is not whole."""
    whole = best_of_n(config(prompts, chat_model, tmp_path / "whole"))
    out = tmp_path / "cut"
    out.mkdir()
    text = (tmp_path / "whole" / "replies.jsonl").read_text()
    (out / "replies.jsonl").write_text("".join(text.splitlines(keepends=True)[:20]) + text[:30])
    asked: list[int] = []
    draw = Drawer.draw

    def counted(self: Drawer, some: Any, n: int, seed: int) -> Any:
        asked.append(len(some))
        return draw(self, some, n, seed)

    monkeypatch.setattr(Drawer, "draw", counted)
    again = best_of_n(config(prompts, chat_model, out))
    assert sum(asked) == 40 - selection.CHUNK
    assert again == whole
    assert (out / "replies.jsonl").read_text() == text
    with pytest.raises(UserError, match="drawn with other settings"):
        best_of_n(config(prompts, chat_model, out, n=3))
