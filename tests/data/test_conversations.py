"""The known forms of a conversation become the same messages."""

import json
from itertools import pairwise

import pytest

from danlu.data.chitchat import chitchat_file, read_chitchat
from danlu.data.conversations import detect_format, plain_text, to_messages

ANSWERED = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Well."}]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("form", "row", "messages"),
    [
        ("messages", {"messages": ANSWERED, "text": "x"}, ANSWERED),
        ("alpaca", {"instruction": "How are you?", "input": "", "output": "Well."}, ANSWERED),
        (
            "alpaca",
            {"instruction": "How are", "input": "you?", "output": "Well.", "system": "Be brief."},
            [SYSTEM, {"role": "user", "content": "How are\n\nyou?"}, ANSWERED[1]],
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "How are you?"},
                    {"from": "gpt", "value": "Well."},
                ]
            },
            [SYSTEM, *ANSWERED],
        ),
        ("prompt-completion", {"prompt": "How are you?", "completion": "Well."}, ANSWERED),
        ("text", {"text": "How are you?"}, None),
        (None, {"body": "x"}, None),
    ],
)
def test_each_form(form: str | None, row: dict, messages: list | None) -> None:
    assert detect_format(row) == form
    assert to_messages(row, "row 1") == messages


def test_plain_text_is_one_line_a_turn() -> None:
    assert plain_text([SYSTEM, *ANSWERED]) == "system: Be brief.\nA: How are you?\nB: Well.\n"


def test_chitchat_loses_no_word_and_keeps_the_speakers_apart() -> None:
    raw = json.loads(chitchat_file().read_text("utf-8"))
    documents = list(read_chitchat())
    assert len(documents) == len(raw) == 7168
    for document in documents:
        turns = raw[document.id]["messages"]
        words = [word for turn in turns for part in turn for word in part["text"].split()]
        lines = document.text.splitlines()
        assert [word for line in lines for word in line[3:].split()] == words
        assert all(a[:2] != b[:2] for a, b in pairwise(lines)), "turns alternate"
        assert (document.messages is not None) == any(line.startswith("B: ") for line in lines)
