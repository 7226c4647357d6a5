"""What people say of items: kept in SQLite, an answer for each item and rater, and how far they agree.

Four kinds of question. `label`: one of some labels of a text. `pair`: which of two answers to a prompt is
better, or neither; a rater doesn't see whose they are, and in which order they stand is drawn. `acute`: the
same of two whole conversations (ACUTE-Eval, Li et al. 2019). `ssa`: whether a reply makes sense, and whether
it is specific (Adiwardana et al. 2020, "Towards a Human-like Open-Domain Chatbot": the average of both
shares); what makes no sense counts as not specific.
"""

import hashlib
import json
import math
import random
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from danlu.core.errors import UserError
from danlu.core.files import make_folder
from danlu.data.documents import read_rows
from danlu.evaluate.agreement import cohen_kappa, fleiss_kappa, krippendorff_alpha

Kind = Literal["label", "pair", "acute", "ssa"]

NEEDS: dict[Kind, tuple[str, ...]] = {
    "label": ("text",),
    "pair": ("prompt", "a", "b"),
    "acute": ("a", "b"),
    "ssa": ("context", "response"),
}
"""Fields of an item."""

_TABLES = """
create table if not exists study (key text primary key, value text not null);
create table if not exists items (id integer primary key, row text not null);
create table if not exists answers (
  item integer not null references items(id), rater text not null, value text not null,
  seconds real not null, at real not null, primary key (item, rater)
);
"""


def read_items(path: Path, kind: Kind) -> list[dict[str, Any]]:
    """Rows of a JSONL file, each looked at. Raises UserError with the first that is wrong."""
    found = []
    for number, row in read_rows(path):
        where = f"{path}, line {number}"
        missing = [name for name in NEEDS[kind] if not isinstance(row, dict) or name not in row]
        if missing:
            raise UserError(f"{where}: no {missing[0]}", f"{kind} needs {', '.join(NEEDS[kind])}")
        for name in NEEDS[kind]:
            talk = kind == "acute" or name == "context"
            if not (isinstance(row[name], str) or (talk and _is_talk(row[name]))):
                wanted = "a text or messages" if talk else "a text"
                raise UserError(f"{where}: {name} is not {wanted}", "mend the row")
        found.append(row)
    if not found:
        raise UserError(f"{path} has no items", "give a JSON object a line")
    return found


def _is_talk(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str) and isinstance(turn.get("role"), str)
        for turn in value
    )


class Study:
    """The file with everything. Several threads may use it."""

    def __init__(
        self, path: Path, kind: Kind, labels: Sequence[str], items: Sequence[dict[str, Any]]
    ) -> None:
        """Goes on with a file that is there. Raises UserError where that is about something else."""
        make_folder(path.parent)
        self.path, self.kind, self.labels = path, kind, tuple(labels)
        if kind == "label" and len(set(labels)) < 2:
            raise UserError("labels are missing", "name at least two: --labels good,bad")
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.executescript(_TABLES)
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path} is no study: {error}", "name another file with --db") from None
        asked = json.dumps([kind, self.labels, [*items]], sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(asked.encode()).hexdigest()
        with self._lock, self._db:
            self._db.execute("insert or ignore into study values ('digest', ?)", (digest,))
            [(kept,)] = self._db.execute("select value from study where key = 'digest'")
            if kept != digest:
                raise UserError(
                    f"{path} is a study of other items, labels or of another kind",
                    "name another file with --db",
                )
            rows = [(number, json.dumps(row, ensure_ascii=False)) for number, row in enumerate(items)]
            self._db.executemany("insert or ignore into items values (?, ?)", rows)
        self.items = list(items)

    def close(self) -> None:
        self._db.close()

    # A rater's way through the items

    def order(self, rater: str) -> list[int]:
        """Each rater goes another way, always the same one."""
        numbers = list(range(len(self.items)))
        random.Random(f"order {rater}").shuffle(numbers)
        return numbers

    def is_turned(self, rater: str, item: int) -> bool:
        """Whether this rater sees B first."""
        return self.kind in ("pair", "acute") and random.Random(f"side {rater} {item}").random() < 0.5

    def next(self, rater: str) -> dict[str, Any]:
        """What the rater is asked now: `item` is None when all is done."""
        done = {item for item, _ in self._of(rater)}
        left = [item for item in self.order(rater) if item not in done]
        found: dict[str, Any] = {"done": len(done), "total": len(self.items), "item": None}
        if left:
            row = {name: self.items[left[0]][name] for name in NEEDS[self.kind]}
            if self.is_turned(rater, left[0]):
                row["a"], row["b"] = row["b"], row["a"]
            found |= {"item": left[0], "row": row}
        return found

    def answer(self, rater: str, item: int, value: Any, seconds: float) -> None:
        """Keeps an answer; "a" and "b" are sides as the rater saw them. Raises UserError for what is none."""
        if not 0 <= item < len(self.items):
            raise UserError(f"there is no item {item}", f"0 to {len(self.items) - 1}")
        kept = json.dumps(self._checked(rater, item, value))
        with self._lock, self._db:
            row = (item, rater, kept, seconds, time.time())
            self._db.execute("insert or replace into answers values (?, ?, ?, ?, ?)", row)

    def undo(self, rater: str) -> int | None:
        """Takes the rater's last answer back, and says which item it was."""
        with self._lock, self._db:
            last = self._db.execute(
                "select item from answers where rater = ? order by at desc, rowid desc limit 1", (rater,)
            ).fetchone()
            if last is None:
                return None
            self._db.execute("delete from answers where rater = ? and item = ?", (rater, last[0]))
            return int(last[0])

    def _checked(self, rater: str, item: int, value: Any) -> Any:
        if self.kind == "ssa":
            if not isinstance(value, dict) or not all(
                isinstance(value.get(k), bool) for k in ("sensible", "specific")
            ):
                raise UserError("an answer says whether it is sensible and specific", "send both")
            return {"sensible": value["sensible"], "specific": value["sensible"] and value["specific"]}
        known = self.labels if self.kind == "label" else ("a", "b", "tie")
        if value not in known:
            raise UserError(f"{value!r} is no answer", f"one of {', '.join(known)}")
        if self.is_turned(rater, item):
            return {"a": "b", "b": "a"}.get(value, value)
        return value

    def _of(self, rater: str) -> list[tuple[int, Any]]:
        with self._lock:
            rows = self._db.execute("select item, value from answers where rater = ?", (rater,)).fetchall()
        return [(item, json.loads(value)) for item, value in rows]

    # What came out

    def export(self) -> Iterator[dict[str, Any]]:
        """Every answer with its item, a row each."""
        with self._lock:
            rows = self._db.execute(
                "select item, rater, value, seconds, at from answers order by item, rater"
            ).fetchall()
        for item, rater, value, seconds, at in rows:
            answer = json.loads(value)
            yield {
                **self.items[item],
                "item": item,
                "rater": rater,
                "answer": answer,
                "seconds": seconds,
                "at": at,
            }

    def result(self) -> dict[str, Any]:
        """Shares, and agreement of the raters beyond chance where there are several."""
        answers = list(self.export())
        raters = sorted({one["rater"] for one in answers})
        found: dict[str, Any] = {"answers": len(answers), "items": len(self.items), "raters": len(raters)}
        if self.kind == "ssa":
            for name in ("sensible", "specific"):
                values = [one["answer"][name] for one in answers]
                found[name] = sum(values) / len(values) if values else None
                found[f"agreement_{name}"] = agreement(answers, lambda answer, name=name: answer[name])
            if answers:
                found["ssa"] = (found["sensible"] + found["specific"]) / 2
            return found
        known = self.labels if self.kind == "label" else ("a", "b", "tie")
        counts = {label: sum(one["answer"] == label for one in answers) for label in known}
        found["counts"] = counts
        if self.kind != "label":
            decided = counts["a"] + counts["b"]
            found["a_wins"] = (counts["a"] + counts["tie"] / 2) / len(answers) if answers else None
            found["a_wins_without_ties"] = counts["a"] / decided if decided else None
        found["agreement"] = agreement(answers, lambda answer: answer)
        return found


def agreement(answers: Sequence[dict[str, Any]], read: Any) -> dict[str, float | None]:
    """Krippendorff's alpha, Fleiss' kappa where all items have as many answers, Cohen's for two raters."""
    by_item: dict[int, dict[str, Any]] = defaultdict(dict)
    for one in answers:
        by_item[one["item"]][one["rater"]] = read(one["answer"])
    several = [by_rater for by_rater in by_item.values() if len(by_rater) > 1]
    found: dict[str, float | None] = {"items_with_several": len(several), "krippendorff_alpha": None}
    if not several:
        return found
    labels = [[*by_rater.values()] for by_rater in several]
    found["krippendorff_alpha"] = _number(krippendorff_alpha(labels))
    if len({len(own) for own in labels}) == 1:
        found["fleiss_kappa"] = _number(fleiss_kappa(labels))
    raters = sorted({rater for by_rater in several for rater in by_rater})
    if len(raters) == 2:
        first, second = ([by_rater[rater] for by_rater in several] for rater in raters)
        found["cohen_kappa"] = _number(cohen_kappa(first, second))
    return found


def _number(value: float) -> float | None:
    """None where all said the same: chance could have got nothing wrong."""
    return None if math.isnan(value) else value
