"""What generated inputs find that a problem's own test lets through, told by mutants of the reference.

    python benchmarks/evalplus.py [--problems 50] [--inputs 2000] [--agree 10000] [--json FILE]

HumanEval's problems, drawn by a seed. Each mutant of the reference (one small fault on its syntax tree) that
passes the base test is asked for its answers on --agree inputs of another seed: one that agrees on all is
taken to be equivalent, and doesn't count. Of the others, how many do --inputs generated inputs tell from the
reference, and does the reduced suite tell as many? Programs run in the sandbox, two at once on two cores.
"""

import argparse
import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from _racing import say

from danlu.core.device import machine
from danlu.core.errors import UserError
from danlu.core.host import cores
from danlu.core.sandbox.host import Jail
from danlu.core.sandbox.limits import Limits
from danlu.evaluate.code.config import CodeConfig
from danlu.evaluate.code.evalplus import Plus, answers, kills, plus, reduced
from danlu.evaluate.code.mutants import mutants
from danlu.evaluate.code.problems import Problem
from danlu.evaluate.code.score import problems_of

BASE_SECONDS = 3.0
PART = 2000
"""Inputs that go into the jail at once."""


def told(jail: Jail, problem: Problem, program: str, made: Plus) -> set[int]:
    """The inputs on which a program differs from the reference."""
    found: set[int] = set()
    for begin in range(0, len(made.inputs), PART):
        part = slice(begin, begin + PART)
        answered = answers(jail, problem, program, made.inputs[part])
        found |= {begin + one for one in kills(made.expected[part], answered)}
    return found


def measure(jail: Jail, problem: Problem, inputs: int, agree: int) -> dict[str, Any]:
    """One problem."""
    made = plus(jail, problem, inputs)
    if made.why_not:
        return {"problem": problem.id, "why_not": made.why_not}
    many = plus(jail, problem, agree, seed=1)
    source = problem.program(problem.reference)
    row = {"problem": problem.id, "inputs": len(made.inputs), "mutants": 0, "survive_base": 0, "differ": 0}
    killed: dict[str, set[int]] = {}
    for change, mutant in mutants(source, problem.names[0]):
        row["mutants"] += 1
        base = jail.examine(
            mutant, problem.imports, problem.test, problem.names, Limits(seconds=BASE_SECONDS)
        )
        found = told(jail, problem, mutant, made)
        if base.passed:
            row["survive_base"] += 1
            if found or told(jail, problem, mutant, many):
                row["differ"] += 1
                killed[f"{change} survives"] = found
                continue
        killed[change] = found
    kept = reduced(killed)
    row["killed"] = sum(bool(found) for name, found in killed.items() if name.endswith(" survives"))
    row["reduced"] = len(kept)
    row["kills_lost"] = sum(bool(found) and not found & set(kept) for found in killed.values())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--problems", type=int, default=50)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--agree", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    try:
        everything = list(problems_of(CodeConfig()).values())
    except UserError as error:
        parser.error(str(error))
    chosen = random.Random(options.seed).sample(everything, options.problems)
    jails: SimpleQueue[Jail] = SimpleQueue()
    for number in range(cores()):
        jails.put(Jail("namespaces", number))

    def work(problem: Problem) -> dict[str, Any]:
        jail = jails.get()
        try:
            row = measure(jail, problem, options.inputs, options.agree)
        finally:
            jails.put(jail)
        say(json.dumps(row))
        return row

    with ThreadPoolExecutor(cores()) as pool:
        rows = list(pool.map(work, chosen))
    for _ in range(cores()):
        jails.get().close()
    judged = [row for row in rows if "why_not" not in row]
    total = {
        name: sum(row[name] for row in judged)
        for name in ("inputs", "mutants", "survive_base", "differ", "killed", "reduced", "kills_lost")
    }
    print(f"{len(judged)} problems, {total['inputs']} inputs, {total['mutants']} mutants")
    print(f"the base tests kill {1 - total['survive_base'] / total['mutants']:.1%}")
    print(f"{total['differ']} of the survivors aren't equivalent as far as {options.agree} inputs tell")
    print(f"generated inputs kill {total['killed']} of these, {total['killed'] / total['differ']:.1%}")
    print(f"reduced to {total['reduced']} inputs, {total['kills_lost']} kills are lost")
    for row in rows:
        if "why_not" in row:
            print(f"left out: {row['problem']}: {row['why_not']}")
    if options.json:
        ratios = {"killed": total["killed"] / total["differ"]}
        result = {"machine": asdict(machine()), "rows": rows, "total": total, "ratios": ratios}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
