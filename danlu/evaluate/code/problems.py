"""Programming problems, as the field's files hold them: HumanEval, MBPP, HumanEval-X in five languages.

Chen et al. 2021 ("Evaluating Large Language Models Trained on Code"), Austin et al. 2021 ("Program Synthesis
with Large Language Models"), Zheng et al. 2023 ("CodeGeeX"). Any file in one of their formats is read.
"""

import ast
import builtins
import gzip
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from danlu.core.errors import UserError
from danlu.core.files import os_errors
from danlu.data.documents import read_rows
from danlu.evaluate.sets import archive_files

Language = Literal["python", "cpp", "java", "js", "go"]
LANGUAGES: dict[str, Language] = {
    "python": "python",
    "cpp": "cpp",
    "java": "java",
    "javascript": "js",
    "go": "go",
}
"""By what stands before the number of a problem of HumanEval-X, in small letters."""


NAMES: dict[Language, str] = {
    "python": "Python",
    "cpp": "C++",
    "java": "Java",
    "js": "JavaScript",
    "go": "Go",
}


@dataclass(frozen=True)
class Problem:
    """A text that a model goes on with, and a test of what comes out."""

    id: str
    language: Language
    prompt: str
    """What a completion is put behind: the beginning of the program."""
    reference: str
    """The completion that its makers wrote."""
    test: str
    names: tuple[str, ...] = ()
    """Python: what of the candidate the test calls."""
    imports: str = ""
    """Python: what the test needs before it. Go: the program's own imports."""
    setup: str = ""
    """Go: what stands before the program."""
    declaration: str = ""
    """HumanEval-X: the head of the function, without the words that say what it does."""
    ask: str = ""
    """What the model is shown, where that isn't the prompt (translation)."""

    def program(self, completion: str) -> str:
        return self.prompt + completion


def read_problems(path: Path) -> dict[str, Problem]:
    """By id, in the file's order. Raises UserError, naming file and line, where a problem isn't one."""
    found: dict[str, Problem] = {}
    for where, row in _rows(path):
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a problem", "a problem is an object with task_id, prompt and test")
        try:
            problem = parse(row)
        except KeyError as missing:
            raise UserError(f"{where}: the problem has no {missing}", KNOWN) from None
        except (TypeError, ValueError, SyntaxError) as error:
            raise UserError(f"{where}: not a problem: {error}", KNOWN) from None
        if problem.id in found:
            raise UserError(f'{where}: a second problem "{problem.id}"', "remove one of them")
        found[problem.id] = problem
    if not found:
        raise UserError(f"{path}: no problem in it", KNOWN)
    return found


def translation(sources: Mapping[str, Problem], targets: Mapping[str, Problem]) -> dict[str, Problem]:
    """HumanEval-X: a solution in one language is to be said in another (Zheng et al. 2023, section 4.1).

    Raises UserError where a problem has no declaration, or no partner of the same number.
    """
    by_number = {name.partition("/")[2]: problem for name, problem in sources.items()}
    found = {}
    for name, target in targets.items():
        source = by_number.get(name.partition("/")[2])
        if source is None or not source.declaration or not target.declaration:
            raise UserError(
                f"{name} can't be translated into", "translation takes HumanEval-X in both languages"
            )
        solution = f"{source.declaration}{source.reference}".strip()
        ask = f"code translation\n{NAMES[source.language]}:\n{solution}\n\n{NAMES[target.language]}:\n"
        head = target.declaration.lstrip("\n")
        found[name] = replace(target, prompt=head, ask=f"{ask}{head}")
    return found


def read_code_align(path: Path, folder: str) -> dict[str, Problem]:
    """Chen et al. 2021's code-align-evals-data: a folder of the archive, each file a problem.

    Folders: human_eval (with solutions by people), alignment/find_bug, bad-solutions (whose reference is a
    wrong solution). Raises UserError where the archive or the folder can't be read.
    """
    found = {}
    for member, text in archive_files(path, rf"^{folder}/[^/]+\.py$"):
        name = Path(member).stem
        problem = _align(f"{folder}/{name}", text)
        found[problem.id] = problem
    if not found:
        raise UserError(f"{path}: no {folder}/*.py in it", "fetch code-align-evals-data again")
    return found


def _align(name: str, text: str) -> Problem:
    text = re.sub(r"(?m)^\s*#\s*\[(PROMPT|SOLUTION|CHECK)\]\s*$", r"#[\1]", text)
    if entry := re.match(r"ENTRY_POINT = '(\w+)'\n", text):
        text = text[entry.end() :]
    begin, _, check = text.partition("\ndef check(")
    check = re.sub(r"(?m)^if __name__ ==.*\n(?:\s+.*\n?)*", "", f"def check({check}")
    begin = begin.removesuffix("#[CHECK]").replace("#[PROMPT]\n", "")
    for mark in ("#[SOLUTION]\n", "    # END OF CONTEXT\n"):
        prompt, found, reference = begin.partition(mark)
        if found:
            break
    else:
        # The whole function is the reference: its body follows the text that says what it does.
        head = re.search(r"""(?ms)^def .*?:[^\n]*\n(?:\s*(\"\"\"|''').*?\1[^\n]*\n)?""", begin)
        if head is None:
            raise UserError(f"{name}: no function in it", "fetch code-align-evals-data again")
        prompt, reference = begin[: head.end()], begin[head.end() :]
    function = entry[1] if entry else re.findall(r"^def (\w+)", prompt, re.MULTILINE)[-1]
    test = f"{check}\ncheck({function})\n"
    context = prompt + reference
    return Problem(name, "python", prompt, reference, test, names=(function,), imports=context)


KNOWN = "known are the formats of HumanEval, HumanEval-X and MBPP; docs/code.md shows them"


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    name = path.name.removesuffix(".gz")
    if not name.endswith(".json"):
        for number, row in read_rows(path):
            yield f"{path}, line {number}", row
        return
    with os_errors(path), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            rows = json.load(file)
        except (ValueError, EOFError) as error:
            raise UserError(f"{path}: not valid JSON: {error}", "fetch the file again") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: not a list of problems", KNOWN)
    for number, row in enumerate(rows, 1):
        yield f"{path}, problem {number}", row


def parse(row: Mapping[str, Any]) -> Problem:
    """A row of a file. Raises KeyError, TypeError, ValueError or SyntaxError where it is no problem."""
    if "test_list" in row:
        return _mbpp(row)
    begin = str(row["task_id"]).partition("/")[0].lower()
    language = LANGUAGES.get(begin, "python")
    plain = {
        "declaration": row.get("declaration", ""),
        "id": row["task_id"],
        "language": language,
        "prompt": row["prompt"],
        "reference": row["canonical_solution"],
        "test": row["test"],
    }
    if broken := [name for name, text in plain.items() if not isinstance(text, str)]:
        raise TypeError(f"{broken[0]} is not a text")
    if language == "go":
        prompt = row["prompt"].replace(row["import"], "", 1)
        return Problem(**plain | {"prompt": prompt}, imports=row["import"], setup=row["test_setup"])
    if language != "python":
        return Problem(**plain)
    # What is defined before the function is the test's too, and so is the reference: the solution of
    # HumanEval/32 is put into a polynomial that the prompt defines.
    context = row["prompt"] + row["canonical_solution"]
    if "entry_point" in row:
        test = f"{row['test']}\ncheck({row['entry_point']})\n"
        return Problem(**plain | {"test": test}, imports=context, names=(row["entry_point"],))
    defined = re.findall(r"^def (\w+)", row["prompt"], re.MULTILINE)
    if not defined:
        raise ValueError("the prompt defines no function")
    return Problem(**plain, imports=context, names=(defined[-1],))


def _mbpp(row: Mapping[str, Any]) -> Problem:
    """Austin et al. 2021: asked in words, tested by lines that each assert something."""
    test = "\n".join(row["test_list"]) + "\n"
    solution = ast.parse(row["code"]).body
    # Some tests use what the solution imports.
    own = [ast.unparse(node) for node in solution if isinstance(node, ast.Import | ast.ImportFrom)]
    given = row.get("test_imports") or row.get("test_setup_code", "").splitlines()
    imports = "\n".join([*given, *own]) + "\n"
    kinds = ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef
    defined = {node.name for node in solution if isinstance(node, kinds)}
    used = {node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
    names = tuple(sorted(defined & used))
    if not names:
        raise ValueError("the test calls nothing that the solution defines")
    unknown = used - defined - set(dir(builtins)) - _imported(imports)
    if unknown := {name for name in unknown if name not in _assigned(test)}:
        raise ValueError(f"the test needs {sorted(unknown)[0]}, which nobody defines")
    return Problem(
        id=f"MBPP/{row['task_id']}",
        language="python",
        prompt=_docstring(row.get("prompt") or row["text"], row["test_list"]),
        reference=row["code"],
        test=test,
        names=names,
        imports=imports,
    )


def _docstring(task: str, tests: list[str]) -> str:
    """What Austin et al. show a model, the task and its tests, in the form that a program can begin with."""
    text = "\n".join([task, *tests]).replace('"' * 3, "'" * 3)
    return f'{"r" if chr(92) in text else ""}"""{text}\n"""\n'


def _imported(source: str) -> set[str]:
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {(alias.asname or alias.name).partition(".")[0] for node in found for alias in node.names}


def _assigned(source: str) -> set[str]:
    """Names that the test gives values to by itself, in comprehensions and the like."""
    nodes = ast.walk(ast.parse(source))
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} | {
        arg.arg for arg in ast.walk(ast.parse(source)) if isinstance(arg, ast.arg)
    }
