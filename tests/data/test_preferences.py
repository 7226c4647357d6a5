"""Rows of preferences: the two forms, what is refused and how it is told, and files that stay whole."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from danlu.core.errors import UserError
from danlu.data.preferences import append_preference, check_preference, form_of

USER = {"role": "user", "content": "Is it gold?"}
YES, NO = ({"role": "assistant", "content": content} for content in ("Yes.", "No."))
JUDGED: dict[str, Any] = {"prompt": [USER], "completion": [YES], "label": True}
PAIR: dict[str, Any] = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
FORMS = {"judged": JUDGED, "pair": PAIR}


@pytest.mark.parametrize("form", FORMS)
def test_both_forms_are_known(form: str) -> None:
    row = FORMS[form]
    assert form_of(row) == form
    assert check_preference(row, "row 1") is row
    assert check_preference({**row, "model": "tiny", "made": "2026-01-01"}, "row 1")["model"] == "tiny"


@pytest.mark.parametrize("form", FORMS)
def test_rows_have_the_shape_that_trl_reads(form: str) -> None:
    """trl, "Dataset formats and types": conversational preference with explicit prompt, unpaired preference.

    Each is a list of messages with exactly role and content; an unpaired label is a boolean.
    """
    keys = {"judged": {"prompt", "completion", "label"}, "pair": {"prompt", "chosen", "rejected"}}
    row = check_preference(FORMS[form], "row")
    assert row.keys() == keys[form]
    for name in keys[form] - {"label"}:
        assert [message.keys() for message in row[name]] == [{"role", "content"}]
    assert form == "pair" or type(row["label"]) is bool


def test_an_earlier_conversation_and_tools_may_stand_in_the_prompt() -> None:
    system = {"role": "system", "content": "Be brief."}
    result = {"role": "tool", "content": "24 carats"}
    check_preference({**JUDGED, "prompt": [system, USER, NO, USER]}, "row")
    check_preference({**JUDGED, "prompt": [USER, result]}, "row")


@pytest.mark.parametrize(
    ("row", "place", "told"),
    [
        ([], "", "not a preference"),
        ("text", "", "not a preference"),
        ({}, "", "not a preference"),
        ({"prompt": [USER], "completion": [YES]}, "", "not a preference"),
        ({**JUDGED, "weight": 1}, "", '"weight"'),
        ({**JUDGED, "chosen": [YES]}, "", '"chosen"'),
        ({**JUDGED, "label": 1}, "", "neither true nor false"),
        ({**JUDGED, "label": "true"}, "", "neither true nor false"),
        ({**JUDGED, "label": None}, "", "neither true nor false"),
        ({**JUDGED, "prompt": "Is it gold?"}, ", prompt", "list of messages"),
        ({**JUDGED, "prompt": []}, ", prompt", "list of messages"),
        ({**JUDGED, "prompt": [USER, YES]}, ", prompt", "assistant"),
        ({**JUDGED, "prompt": [USER, "text"]}, ", prompt, message 2", "role"),
        ({**JUDGED, "prompt": [{"role": "robot", "content": ""}]}, ", prompt, message 1", "robot"),
        ({**JUDGED, "prompt": [{"role": [], "content": ""}]}, ", prompt, message 1", "unknown role"),
        ({**JUDGED, "prompt": [{"role": {}, "content": ""}]}, ", prompt, message 1", "unknown role"),
        ({**JUDGED, "prompt": [{"role": "user", "content": None}]}, ", prompt, message 1", "not text"),
        ({**JUDGED, "completion": [USER]}, ", completion", "assistant"),
        ({**JUDGED, "completion": [YES, NO]}, ", completion", "one message"),
        ({**JUDGED, "completion": [{**YES, "content": " \n"}]}, ", completion", "empty"),
        ({**PAIR, "rejected": [{**NO, "content": ""}]}, ", rejected", "empty"),
        ({**PAIR, "chosen": [USER]}, ", chosen", "assistant"),
        ({**PAIR, "rejected": [YES]}, "", "the same"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(row: Any, place: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as found:
        check_preference(row, "votes.jsonl, line 7")
    assert found.value.message.startswith(f"votes.jsonl, line 7{place}: ")
    assert told in found.value.message
    file = tmp_path / "votes.jsonl"
    with pytest.raises(UserError):
        append_preference(file, row)
    assert not file.exists()


@pytest.mark.parametrize(
    ("row", "remedy"),
    [({}, "completion"), ({**JUDGED, "weight": 1}, "label"), ({**JUDGED, "prompt": [YES]}, "user")],
)
def test_a_remedy_is_named(row: Any, remedy: str) -> None:
    with pytest.raises(UserError) as found:
        check_preference(row, "row")
    assert remedy in found.value.remedy


def read(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text("utf-8").removesuffix("\n").split("\n")]


TEXTS = [
    "金 🥇 é",
    "\u2028 two \u2029 lines \x85",
    "\x00 \x1f \x7f",
    'a "quoted" \\ text\r\n',
    "\ufdd0 \ufeff",
]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folders" / "votes.jsonl"
    rows = [{**JUDGED, "completion": [{**YES, "content": text}]} for text in TEXTS] + [PAIR]
    for row in rows:
        append_preference(file, row)
    assert read(file) == rows
    assert file.read_bytes().count(b"\n") == len(rows)


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    append_preference(file, JUDGED)
    file.write_bytes(file.read_bytes() + b'{"prompt": [{"ro')
    append_preference(file, PAIR)
    first, cut, last = file.read_text("utf-8").splitlines()
    assert (json.loads(first), cut, json.loads(last)) == (JUDGED, '{"prompt": [{"ro', PAIR)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", {1, 2}], ids=repr)
def test_what_is_no_json_is_refused(value: Any, tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    append_preference(file, PAIR)
    with pytest.raises(UserError, match="can't be written"):
        append_preference(file, {**JUDGED, "model": value})
    assert read(file) == [PAIR]


def test_a_full_disk_is_told() -> None:
    with pytest.raises(UserError) as found:
        append_preference(Path("/dev/full"), JUDGED)
    assert "no space left" in found.value.message
    assert "/dev/full" in found.value.message
    assert "free some space" in found.value.remedy


@contextmanager
def at_most_4096_bytes() -> Iterator[None]:
    """No file may become larger: a write that goes beyond is done in part, then fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:  # at once: what pytest reports may go into a file too
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [200, 3900, 9000, 100_000])
def test_a_row_that_does_not_fit_leaves_the_file_as_it_was(size: int, tmp_path: Path) -> None:
    """Below and above what Python's files keep back before they write."""
    file = tmp_path / "votes.jsonl"
    append_preference(file, PAIR)
    before = file.read_bytes()
    file.write_bytes(before * (4000 // len(before)))
    before = file.read_bytes()
    with pytest.raises((OSError, UserError)), at_most_4096_bytes():
        append_preference(file, {**JUDGED, "completion": [{**YES, "content": "x" * size}]})
    assert file.read_bytes() == before


def test_a_wrong_path_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "votes.jsonl"):
        with pytest.raises(UserError) as found:
            append_preference(path, JUDGED)
        assert found.value.remedy
