"""Contamination: which questions of a benchmark stand in the text that a model was trained on.

Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C: a question is dirty when one of its
n-grams of words, lower-case and without punctuation, stands in the training text; n is the fifth percentile
of the questions' lengths, at least 8 and at most 13. N-grams found in more than ten documents are set phrases
and don't count. The score on the clean questions is reported beside the whole one.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from danlu.core.artefacts import LINEAGE, stage_folder
from danlu.core.errors import UserError
from danlu.core.files import read_json
from danlu.core.progress import track
from danlu.data.documents import read_documents
from danlu.evaluate.text_measures import words

SHORTEST, LONGEST = 8, 13
COMMON = 10
"""Documents, beyond which an n-gram is a set phrase."""
TRAINING = "train.jsonl.zst"
HIDDEN = ("examples", "chain", "direct", "subject")
"""Fields of a question that are not its own text."""


def training_texts(ref: Path) -> list[Path]:
    """The training documents behind a model's folder, by danlu's lineage; none where it has none.

    Of a base that came from elsewhere nothing is known: only what danlu itself has trained on is found.
    """
    found: dict[Path, None] = {}
    seen: set[Path] = set()

    def visit(folder: Path | None) -> None:
        if folder is None or folder in seen or not (folder / LINEAGE).is_file():
            return
        seen.add(folder)
        if (folder / TRAINING).is_file():
            found[folder / TRAINING] = None
        for source in read_json(folder / LINEAGE).get("inputs", {}).values():
            for path in (folder / source.get("relative", "."), Path(source["path"])):
                if source.get("relative") and path.exists():
                    visit(stage_folder(path.resolve()))
                    break

    visit(stage_folder(ref.absolute()))
    return list(found)


def documents_of(path: Path) -> list[Path]:
    """A file of documents, or the training part of a `danlu data prepare` folder. Raises UserError."""
    file = path / TRAINING if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{file} is missing", "name a file of documents or the output of `danlu data prepare`"
        )
    return [file]


def dirty(questions: Sequence[str], documents: Iterable[str]) -> list[bool]:
    """Whether each question shares an n-gram with a document; one of fewer than n words has none."""
    split = [words(text) for text in questions]
    n = gram_length(split)
    own = [set(grams(one, n)) for one in split]
    wanted = set().union(*own) if own else set()
    counts: Counter[tuple[str, ...]] = Counter()
    for text in documents:
        counts.update(set(grams(words(text), n)) & wanted)
    found = {gram for gram, times in counts.items() if times <= COMMON}
    return [bool(one & found) for one in own]


def gram_length(split: Sequence[Sequence[str]]) -> int:
    """The fifth percentile of the lengths, within its bounds."""
    return int(np.clip(np.percentile([len(one) for one in split], 5), SHORTEST, LONGEST))


def grams(text: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """All n words in a row; a shorter text has none."""
    return (tuple(text[at : at + n]) for at in range(len(text) - n + 1))


def question_text(doc: Mapping[str, Any]) -> str:
    """All of a question's own texts, its choices and answers too."""
    parts: list[str] = []
    for field, value in doc.items():
        if field not in HIDDEN:
            values = value if isinstance(value, list) else [value]
            parts += [one for one in values if isinstance(one, str)]
    return " ".join(parts)


def mark(samples: Mapping[str, Sequence[dict[str, Any]]], files: Sequence[Path]) -> None:
    """Writes `dirty` into every sample of the harness."""
    rows = [row for task in samples.values() for row in task]
    texts = (document.text for file in files for document in read_documents(file))
    found = dirty(
        [question_text(row["doc"]) for row in rows], track(texts, "training text", unit="documents")
    )
    for row, one in zip(rows, found, strict=True):
        row["dirty"] = one


def clean_and_dirty(values: Sequence[float], marks: Sequence[bool]) -> dict[str, Any]:
    """The share of dirty questions, and the means of both parts; None of an empty one."""
    parts = {
        name: [value for value, one in zip(values, marks, strict=True) if one is wanted]
        for name, wanted in (("clean", False), ("dirty", True))
    }
    means = {name: float(np.mean(part)) if part else None for name, part in parts.items()}
    return {"contaminated": len(parts["dirty"]) / len(values), **means}
