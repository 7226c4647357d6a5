"""What people say of items: kept, blind, taken back, exported; and what is refused."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from danlu.core.errors import UserError
from danlu.evaluate.agreement import cohen_kappa, fleiss_kappa, krippendorff_alpha
from danlu.evaluate.annotation import Study, read_items

PAIRS = [{"prompt": f"Question {n}", "a": f"A{n}", "b": f"B{n}", "source": n} for n in range(20)]


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Callable[..., Study]]:
    opened: list[Study] = []

    def study(kind: Any = "pair", labels: Any = (), items: Any = PAIRS, name: str = "study") -> Study:
        opened.append(Study(tmp_path / f"{name}.sqlite", kind, labels, items))
        return opened[-1]

    yield study
    for one in opened:
        one.close()


def prefers_a(study: Study, rater: str, item: int) -> str:
    """The side on which A stands for this rater."""
    return "b" if study.is_turned(rater, item) else "a"


def test_a_rater_sees_each_item_once_and_not_whose_answers_they_are(study: Callable[..., Study]) -> None:
    kept = study()
    seen, sides = [], []
    while (asked := kept.next("Ann"))["item"] is not None:
        row = asked["row"]
        assert row.keys() == {"prompt", "a", "b"}, "nothing else of the item"
        sides.append(row["a"].startswith("A"))
        seen.append(asked["item"])
        assert asked["done"] == len(seen) - 1
        kept.answer("Ann", asked["item"], "tie", 1.5)
    assert sorted(seen) == list(range(20))
    assert seen != sorted(seen)
    assert 0 < sum(sides) < 20, "either may stand first"
    assert [kept.next("Bob")["item"]] == kept.order("Bob")[:1]


def test_what_is_kept_is_of_a_and_b_and_not_of_left_and_right(study: Callable[..., Study]) -> None:
    kept = study()
    for item in range(20):
        kept.answer("Ann", item, prefers_a(kept, "Ann", item), 1)
    assert [row["answer"] for row in kept.export()] == ["a"] * 20
    assert kept.result()["a_wins"] == 1
    assert [row["source"] for row in kept.export()] == list(range(20))


def test_it_goes_on_where_it_was_closed(study: Callable[..., Study]) -> None:
    first = study()
    for _ in range(7):
        first.answer("Ann", first.next("Ann")["item"], "tie", 1)
    following = first.next("Ann")
    first.close()
    again = study()
    assert again.next("Ann") == following
    assert following["done"] == 7


def test_an_answer_can_be_taken_back_and_changed(study: Callable[..., Study]) -> None:
    kept = study()
    first = kept.next("Ann")["item"]
    kept.answer("Ann", first, "tie", 1)
    kept.answer("Bob", 3, "tie", 1)
    assert kept.undo("Ann") == first
    assert kept.next("Ann") | {"row": None} == {"done": 0, "total": 20, "item": first, "row": None}
    assert kept.undo("Ann") is None
    assert len(list(kept.export())) == 1, "nobody else's is touched"
    kept.answer("Bob", 3, prefers_a(kept, "Bob", 3), 1)
    assert [row["answer"] for row in kept.export()] == ["a"]


def test_agreement_is_that_of_the_measures(study: Callable[..., Study]) -> None:
    texts = [{"text": str(n)} for n in range(12)]
    kept = study("label", ("yes", "no"), texts)
    ann = ["yes"] * 6 + ["no"] * 6
    bob = ["yes"] * 5 + ["no"] * 6 + ["yes"]
    for item in range(12):
        kept.answer("Ann", item, ann[item], 1)
        kept.answer("Bob", item, bob[item], 1)
    found = kept.result()["agreement"]
    items = list(zip(ann, bob, strict=True))
    assert found["cohen_kappa"] == pytest.approx(cohen_kappa(ann, bob))
    assert found["fleiss_kappa"] == pytest.approx(fleiss_kappa(items))
    assert found["krippendorff_alpha"] == pytest.approx(krippendorff_alpha(items))
    kept.answer("Cem", 0, "no", 1)
    found = kept.result()["agreement"]
    assert "fleiss_kappa" not in found, "items have different numbers of answers"
    assert found["krippendorff_alpha"] is not None


def test_where_all_say_the_same_there_is_no_agreement_beyond_chance(study: Callable[..., Study]) -> None:
    kept = study("label", ("yes", "no"), [{"text": "a"}, {"text": "b"}])
    for rater in ("Ann", "Bob"):
        for item in range(2):
            kept.answer(rater, item, "yes", 1)
    found = kept.result()["agreement"]
    assert found["krippendorff_alpha"] is found["fleiss_kappa"] is found["cohen_kappa"] is None
    json.dumps(kept.result(), allow_nan=False)


def test_sensibleness_and_specificity(study: Callable[..., Study]) -> None:
    rows = [{"context": "Hi", "response": str(n)} for n in range(4)]
    kept = study("ssa", (), rows)
    for item, (sensible, specific) in enumerate([(True, True), (True, False), (False, True), (False, False)]):
        kept.answer("Ann", item, {"sensible": sensible, "specific": specific}, 1)
    found = kept.result()
    assert (found["sensible"], found["specific"], found["ssa"]) == (0.5, 0.25, 0.375)


def test_many_at_once(study: Callable[..., Study]) -> None:
    kept = study()

    def rate(rater: str) -> None:
        while (item := kept.next(rater)["item"]) is not None:
            kept.answer(rater, item, prefers_a(kept, rater, item), 0.1)

    threads = [threading.Thread(target=rate, args=(f"rater {n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept.result()["answers"] == 160
    assert {row["answer"] for row in kept.export()} == {"a"}


@pytest.mark.parametrize(
    ("kind", "labels", "value", "told"),
    [
        ("pair", (), "c", "a, b, tie"),
        ("pair", (), None, "a, b, tie"),
        ("label", ("yes", "no"), "maybe", "yes, no"),
        ("ssa", (), "yes", "sensible"),
        ("ssa", (), {"sensible": True}, "sensible"),
    ],
)
def test_what_is_no_answer(
    study: Callable[..., Study], kind: str, labels: Any, value: Any, told: str
) -> None:
    items = {"pair": PAIRS, "label": [{"text": "t"}], "ssa": [{"context": "c", "response": "r"}]}[kind]
    kept = study(kind, labels, items)
    with pytest.raises(UserError, match="answer") as caught:
        kept.answer("Ann", 0, value, 1)
    assert told in str(caught.value)
    with pytest.raises(UserError, match="no item"):
        kept.answer("Ann", 99, "a", 1)
    assert list(kept.export()) == []


def test_another_study_is_not_written_into(study: Callable[..., Study], tmp_path: Path) -> None:
    study()
    with pytest.raises(UserError, match="other items"):
        study(items=PAIRS[:5])
    with pytest.raises(UserError, match="labels are missing"):
        study("label", (), [{"text": "t"}], name="other")
    (tmp_path / "text.sqlite").write_text("this is not a database at all, whatever its name says")
    with pytest.raises(UserError, match="is no study"):
        study(name="text")


@pytest.mark.parametrize(
    ("kind", "row", "told"),
    [
        ("label", {"txt": "a"}, "no text"),
        ("pair", {"prompt": "p", "a": "x"}, "no b"),
        ("pair", {"prompt": "p", "a": "x", "b": 3}, "b is not a text"),
        ("acute", {"a": [{"role": "user"}], "b": "x"}, "a is not a text or messages"),
        ("label", ["a list"], "no text"),
    ],
)
def test_items_are_looked_at(tmp_path: Path, kind: Any, row: Any, told: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="line 1") as caught:
        read_items(path, kind)
    assert told in str(caught.value)
    path.write_text("")
    with pytest.raises(UserError, match="no items"):
        read_items(path, kind)
    talk = [{"role": "user", "content": "Hi"}]
    path.write_text(json.dumps({"a": talk, "b": talk}) + "\n")
    assert len(read_items(path, "acute")) == 1
