"""Answers and judgements as verbs: turns, references, prompts, and what is refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from needs import needs_data
from small_models import save_random_model

from danlu.core.errors import UserError
from danlu.data.conversations import Messages
from danlu.evaluate import family, judging
from danlu.evaluate.config import AnswerConfig, JudgeConfig, TableConfig
from danlu.evaluate.judging import answer, judge, read_answers, read_questions
from danlu.tokens.bpe import train_bpe

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Say A.", "Say B."]},
    {"question_id": 2, "category": "math", "turns": ["1+1?", "2+2?"], "reference": ["two", "four"]},
    {"id": "x", "question": "Only one."},
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return written(tmp_path / "questions.jsonl", QUESTIONS)


def written(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def answered(path: Path, text: str) -> Path:
    rows = []
    for row in QUESTIONS:
        turns: Any = row.get("turns") or [row["question"]]
        rows.append({**row, "turns": turns, "answers": [f"{text} {n + 1}" for n in range(len(turns))]})
    return written(path, rows)


def judged_by(monkeypatch: pytest.MonkeyPatch, says: Any) -> list[Messages]:
    """A judge that is a function of what it reads; notes all of it."""
    seen: list[Messages] = []

    def made(*_: Any) -> Any:
        def ask(prompts: Sequence[Messages]) -> list[str]:
            seen.extend(prompts)
            return [says(one[-1]["content"]) for one in prompts]

        return ask

    monkeypatch.setattr(judging, "judge_of", made)
    return seen


def test_a_model_answers_turn_by_turn(questions: Path, tmp_path: Path) -> None:
    """A real one, of random weights: the second turn sees the first answer."""
    tokenizer = train_bpe(["say a say b only one 1+1 2+2 " * 20], 270)
    model = save_random_model(tmp_path / "model", tokenizer, noise=0.1)
    out = tmp_path / "answers.jsonl"
    config = AnswerConfig(model=str(model), questions=str(questions), out=out, max_tokens=5, dtype="float32")
    assert answer(config)["questions"] == 3
    found = read_answers(out)
    assert [len(one.answers) for one in found] == [2, 2, 1]
    assert found[1].reference == ["two", "four"]
    first = out.read_text("utf-8")
    answer(config)
    assert out.read_text("utf-8") == first, "greedy"


def test_grades(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def says(text: str) -> str:
        return "no idea" if "Only one." in text else "[[8]]" if "Say B." in text else "[[4]]"

    seen = judged_by(monkeypatch, says)
    file = answered(tmp_path / "a.jsonl", "I say")
    result = judge(JudgeConfig(answers=file, judge="j", out=tmp_path / "judged.jsonl"))
    assert (result["n"], result["unread"]) == (4, 1)
    assert result["grade"] == pytest.approx((4 + 8 + 4 + 4) / 4)
    assert result["by"] == {"turn 1": 4, "turn 2": 6, "writing": 6, "math": 4}
    assert "Say A.\nAnswer: I say 1\nQuestion: Say B.\nAnswer: I say 2" in seen[1][-1]["content"]
    rows = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text("utf-8").splitlines()]
    assert [row["grade"] for row in rows] == [4, 8, 4, 4, None]


def test_comparison_in_both_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge prefers what says "better"; of the first question whatever stands first."""

    def says(text: str) -> str:
        if "Say A." in text:
            return "[[A]]"
        return "[[A]]" if text.find("better") < text.find("worse") else "[[B]]"

    judged_by(monkeypatch, says)
    ours, theirs = answered(tmp_path / "a.jsonl", "better"), answered(tmp_path / "b.jsonl", "worse")
    result = judge(JudgeConfig(answers=ours, against=theirs, judge="j", out=tmp_path / "j.jsonl"))
    rate = result["win_rate"]
    assert rate["n"] == 5
    assert rate["rate"] == pytest.approx((0.5 + 0.5 + 3) / 5)
    assert rate["consistent"] == pytest.approx(3 / 5)
    rows = [json.loads(line) for line in (tmp_path / "j.jsonl").read_text("utf-8").splitlines()]
    assert (rows[0]["first"], rows[0]["second"]) == ("against", "answers")
    assert (rows[2]["first"], rows[2]["second"]) == ("answers", "answers")


@needs_data
def test_mt_bench_with_fastchat_s_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    asked = read_questions("mt-bench")
    assert len(asked) == 80
    assert {len(one.turns) for one in asked} == {2}
    assert {one.category for one in asked if one.reference} >= {"math", "reasoning", "coding"}
    rows = [
        {"question_id": one.id, "category": one.category, "turns": one.turns, "reference": one.reference}
        | {"answers": ["MY FIRST", "MY SECOND"]}
        for one in asked
    ]
    file = written(tmp_path / "a.jsonl", rows)
    seen = judged_by(monkeypatch, lambda text: "[[7]]")
    prompts = Path(os.environ["DANLU_DATA"]) / "fastchat" / "judge_prompts.jsonl"
    result = judge(JudgeConfig(answers=file, judge="j", prompts=prompts, out=tmp_path / "j.jsonl"))
    assert (result["grade"], result["n"]) == (7, 160)
    texts = [one[-1]["content"] for one in seen]
    assert all("MY FIRST" in text for text in texts)
    assert sum("MY SECOND" in text for text in texts) == 80
    assert not any("{" + name + "}" in text for text in texts for name in ("question", "answer", "answer_2"))
    references = [one.reference[0] for one in asked if one.reference]
    assert sum(any(ref in text for ref in references) for text in texts) >= 60


def test_a_judge_that_says_nonsense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged_by(monkeypatch, lambda text: "well")
    file = answered(tmp_path / "a.jsonl", "x")
    with pytest.raises(UserError, match="none of the judge's answers"):
        judge(JudgeConfig(answers=file, judge="j", out=tmp_path / "j.jsonl"))
    with pytest.raises(UserError, match="none of the judge's answers"):
        judge(JudgeConfig(answers=file, against=file, judge="j", out=tmp_path / "j.jsonl"))
    assert not (tmp_path / "j.jsonl").exists()


def test_files_that_are_none(questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged_by(monkeypatch, lambda text: "[[A]]")
    with pytest.raises(UserError, match="0 answers to 2 questions"):
        judge(JudgeConfig(answers=questions, judge="j", out=tmp_path / "j.jsonl"))
    with pytest.raises(UserError, match="line 1: no question"):
        read_questions(str(written(tmp_path / "bad.jsonl", [{"text": "?"}])))
    with pytest.raises(UserError, match="no questions"):
        read_questions(str(written(tmp_path / "empty.jsonl", [])))
    ours = answered(tmp_path / "a.jsonl", "x")
    fewer = written(tmp_path / "b.jsonl", [json.loads(line) for line in ours.read_text().splitlines()][1:])
    with pytest.raises(UserError, match="question 1 is missing"):
        judge(JudgeConfig(answers=ours, against=fewer, judge="j", out=tmp_path / "j.jsonl"))


def test_a_trained_judge_s_yes_is_its_likelihood(tmp_path: Path) -> None:
    """Against the logits of the whole conversations."""
    import danlu
    from danlu.evaluate.judging import yes_shares
    from danlu.tokens.chat import render_prompt

    tokenizer = train_bpe(["say a say b yes no true 1+1 2+2 " * 20], 270)
    folder = save_random_model(tmp_path / "model", tokenizer, noise=0.3)
    model, tokenizer = danlu.load(folder, dtype=torch.float32)
    asked = [("Is it hot?", "Very."), ("1+1?", "three")]
    for (question, said), share in zip(
        asked, yes_shares(danlu.Engine(model, tokenizer), asked, "True"), strict=True
    ):
        text = f"Q: {question}\nA: {said}\nTrue:"
        context = render_prompt([{"role": "user", "content": text}], tokenizer)
        found = []
        for word in ("yes", "no"):
            ids = tokenizer.encode(word)
            with torch.no_grad():
                logits = model(torch.tensor([[*context, *ids]]))[0, len(context) - 1 : -1].log_softmax(-1)
            found.append(float(logits.gather(1, torch.tensor(ids)[:, None]).sum()))
        assert share == pytest.approx(1 / (1 + np.exp(found[1] - found[0])), rel=1e-4)
    file = answered(tmp_path / "a.jsonl", "yes")
    config = JudgeConfig(
        answers=file, judge=str(folder), truth="true", out=tmp_path / "j.jsonl", dtype="float32"
    )
    result = judge(config)
    assert result["n"] == 5
    judging.show_judgements(result)
    with pytest.raises(UserError, match="likelihoods"):
        judge(config.model_copy(update={"against": file}))


def test_evaluations_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value, n in (("early", 0.25, 100), ("late", 0.5, 100), ("other", 0.75, 50)):
        folder = tmp_path / name
        folder.mkdir()
        kept = {
            "results": {"piqa": {"acc,none": value, "acc_stderr,none": 0.1, "alias": "piqa"}},
            "n-samples": {"piqa": {"effective": n}},
            "versions": {"piqa": 1},
        }
        (folder / "results.json").write_text(json.dumps(kept), "utf-8")
    found = family.scores(TableConfig(runs=(str(tmp_path / "early"), str(tmp_path / "late"))))
    assert [row["score"] for row in found["rows"]] == ["piqa · acc"]
    assert [one["value"] for one in found["rows"][0]["runs"].values()] == [0.25, 0.5]
    assert found["rows"][0]["alike"]
    mixed = family.scores(TableConfig(runs=(str(tmp_path / "early"), str(tmp_path / "other"))))
    assert not mixed["rows"][0]["alike"]
    family.show(mixed)
    assert "not the same questions" in capsys.readouterr().out
    with pytest.raises(UserError, match="is missing"):
        family.scores(TableConfig(runs=(str(tmp_path),)))
