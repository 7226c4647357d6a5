"""HumanEval as a task of lm-evaluation-harness: what it calls for each answer."""

import atexit
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from danlu.evaluate.code.config import CodeConfig
from danlu.evaluate.code.problems import parse
from danlu.evaluate.code.run import Runner, check
from danlu.evaluate.code.samples import completed, program_of
from danlu.evaluate.code.score import backend_of


@cache
def _runner() -> Runner:
    """One for all questions, closed when danlu ends."""
    runner = Runner(["python"], 1, backend_of(CodeConfig()))
    atexit.register(runner.__exit__)
    return runner


def passes(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the completion passes the problem's test, in the sandbox. Raises UserError where none holds."""
    problem = parse(doc)
    program = program_of(completed(results[0], problem), problem)
    verdict = _runner().inside(check(problem, program, CodeConfig().least_seconds))
    return {"pass@1": float(verdict.passed)}
