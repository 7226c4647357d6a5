"""Preferences in every known form: a prompt, and replies to it, the best first."""

import gzip
import json
import os
import random
from collections import defaultdict
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from needs import needs_data

from danlu.core.errors import UserError
from danlu.data.check import check
from danlu.data.config import CheckConfig, DataConfig
from danlu.data.documents import read_documents
from danlu.data.prepare import prepare
from danlu.data.rankings import Ranked, merge_rankings, to_ranked

ASKED = [{"role": "user", "content": "Is the furnace hot?"}]
EXPECTED = Ranked(ASKED, ["It glows.", "No."])


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Is the furnace hot?", "chosen": "It glows.", "rejected": "No."},
        {"prompt": ASKED, "chosen": said("It glows."), "rejected": said("No.")},
        {"prompt": ASKED, "chosen": said("It glows.")[0], "rejected": "No."},
        {"chosen": ASKED + said("It glows."), "rejected": ASKED + said("No.")},
        {
            "chosen": "\n\nHuman: Is the furnace hot?\n\nAssistant: It glows.",
            "rejected": "\n\nHuman: Is the furnace hot?\n\nAssistant: No.",
        },
        {
            "conversations": [{"from": "human", "value": "Is the furnace hot?"}],
            "chosen": {"from": "gpt", "value": "It glows."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        {"instruction": "Is the furnace hot?", "input": "", "chosen": "It glows.", "rejected": "No."},
        {"prompt": "Is the furnace hot?", "replies": ["It glows.", "No."]},
        {"prompt": ASKED, "replies": ["No.", "It glows."], "rankings": [[1, 0], [1, 0], [0, 1]]},
        {
            "message_tree_id": "1",
            "prompt": {
                "role": "prompter",
                "text": "Is the furnace hot?",
                "replies": [
                    {"role": "assistant", "text": "No.", "rank": 1, "replies": []},
                    {"role": "assistant", "text": "It glows.", "rank": 0, "replies": []},
                ],
            },
        },
    ],
    ids=lambda row: "+".join(row),
)  # fmt: skip
def test_forms(row: dict[str, Any]) -> None:
    assert to_ranked(row, "here") == [EXPECTED]


def test_a_transcript_of_many_turns() -> None:
    text = "\n\nHuman: One\n\nline\n\nHuman: two\n\nAssistant: Three\n\nHuman: four\n\nAssistant: "
    (found,) = to_ranked({"chosen": text + "five", "rejected": text + "six"}, "here")
    assert [(m["role"], m["content"]) for m in found.prompt] == [
        ("user", "One\n\nline\n\ntwo"),
        ("assistant", "Three"),
        ("user", "four"),
    ]
    assert found.replies == ["five", "six"]


def test_what_models_wrote_in_a_tree_is_left_out() -> None:
    def message(role: str, text: str, *replies: Any, **more: Any) -> dict[str, Any]:
        return {"role": role, "text": text, "replies": list(replies), "rank": None, **more}

    again = message("prompter", "And now?", *(message("assistant", x, rank=n) for n, x in enumerate("cab")))
    best = message("assistant", "best", again, rank=0)
    made = message("assistant", "made", again, rank=1, synthetic=True)
    gone = message("assistant", "gone", rank=2, deleted=True)
    last = message("assistant", "last", again, rank=3)
    tree = message("prompter", "Start", last, made, gone, best, message("assistant", "unranked"))
    found = to_ranked({"message_tree_id": "1", "prompt": tree}, "here")
    assert [(len(one.prompt), one.replies) for one in found] == [
        (1, ["best", "last"]),
        (3, ["c", "a", "b"]),
        (3, ["c", "a", "b"]),
    ]
    assert found[1].prompt[1]["content"] == "last"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "a reply is no text"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "an empty prompt"),
        ({"prompt": said("a"), "chosen": "b", "rejected": "c"}, "the prompt ends with the assistant's turn"),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, "a list of messages that isn't empty"),
        ({"chosen": "b", "rejected": "c"}, "not a transcript"),
        ({"chosen": ASKED + said("a"), "rejected": said("q") + said("b")}, "answer different prompts"),
        ({"prompt": "a", "replies": "b"}, "a list of replies"),
        ({"prompt": "a", "replies": ["b", "c"], "rankings": [[0, 0]]}, "not all of the 2 replies once"),
        ({"prompt": "a", "replies": ["b", "c"], "rankings": []}, "not all of the 2 replies once"),
        ({"message_tree_id": 1, "prompt": {"text": "a"}}, "not a tree of OpenAssistant"),
    ],
)
def test_what_is_no_preference(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_ranked(row, "line 3")


@pytest.mark.parametrize("seed", range(20))
def test_rankings_are_merged_with_the_fewest_contradictions(seed: int) -> None:
    draw = random.Random(seed)
    n = draw.randint(2, 5)
    orders = [draw.sample(range(n), n) for _ in range(draw.randint(1, 5))]

    def contradictions(merged: list[int]) -> int:
        wrong = 0
        for order in orders:
            for place, better in enumerate(merged):
                wrong += sum(order.index(worse) < order.index(better) for worse in merged[place + 1 :])
        return wrong

    found = merge_rankings(orders)
    assert contradictions(found) == min(contradictions(list(order)) for order in permutations(range(n)))
    if len(orders) == 1:
        assert found == orders[0]


def test_many_replies_are_merged_too() -> None:
    order = random.Random(0).sample(range(12), 12)
    swapped = [*order[1::-1], *order[2:]]
    assert merge_rankings([order, order, swapped]) == order


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_is_split_by_prompts_and_bad_rows_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n % 20}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(100)]
    bad = [
        {"prompt": "x", "chosen": "same", "rejected": "same"},
        {"prompt": "x", "chosen": "some", "rejected": " "},
        {"prompt": "x", "replies": ["one"]},
        rows[3],
    ]
    source = write(tmp_path / "pairs.jsonl", rows + bad)
    stats = prepare(DataConfig(source=str(source), out=tmp_path / "out", held_out=0.3))
    assert stats["dropped: chosen equals rejected"] == stats["dropped: an empty reply"] == 1
    assert stats["dropped: a ranking of one reply"] == stats["dropped: copy"] == 1
    assert stats["train preferences"] + stats["held_out preferences"] == 100
    parts = [list(read_documents(tmp_path / "out" / f"{name}.jsonl.zst")) for name in ("train", "held_out")]
    prompts = [{str(document.messages) for document in part} for part in parts]
    assert prompts[0] & prompts[1] == set()
    assert sum(len(part) for part in parts) == 100
    for document in parts[0]:
        assert document.replies == [document.replies[0], document.replies[0].replace("yes", "no")]


def test_check_names_the_first_bad_row(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "b"}]
    found = check(CheckConfig(file=write(tmp_path / "good.jsonl", rows[:1])))
    assert found["preferences"] == 1
    with pytest.raises(UserError, match="line 2: chosen equals rejected"):
        check(CheckConfig(file=write(tmp_path / "bad.jsonl", rows)))


@needs_data
def test_open_assistant() -> None:
    """Every ranking, against the same messages in a flat table: nothing that a model wrote, or below it."""
    path = Path(os.environ["DANLU_DATA"]) / "oasst/en_100_tree.jsonl.gz"
    with gzip.open(path, "rt") as file:
        stack = [json.loads(line)["prompt"] for line in file]
    messages: dict[str, dict[str, Any]] = {}
    while stack:
        row = stack.pop()
        messages[row["message_id"]] = row
        stack += row["replies"]

    def by_people(row: dict[str, Any] | None) -> bool:
        while row is not None:
            if row["synthetic"] or row["deleted"]:
                return False
            row = messages.get(row.get("parent_id"))
        return True

    expected: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for row in messages.values():
        if row["role"] == "assistant" and row.get("rank") is not None and by_people(row):
            expected[row["parent_id"]].append((row["rank"], row["text"]))
    wanted = [[text for _, text in sorted(replies)] for replies in expected.values() if len(replies) > 1]
    found = [document.replies or [] for document in read_documents(path)]
    assert sorted(found) == sorted(wanted)
    assert len(found) > 200


@needs_data
def test_hh() -> None:
    path = Path(os.environ["DANLU_DATA"]) / "hh-rlhf/harmless-base-test.jsonl.gz"
    documents = list(read_documents(path))
    assert len(documents) == 2312
    assert sum(document.fault is not None for document in documents) == 4
