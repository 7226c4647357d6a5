"""`danlu plan`: what each stage of a recipe will take on this machine, before anything runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from danlu.core import host
from danlu.core.config import parse_overrides
from danlu.core.device import machine
from danlu.core.options import PlanConfig
from danlu.core.progress import clock
from danlu.core.recipe import find_recipe, read_recipe
from danlu.core.runner import Work
from danlu.core.show import console, show_size, table
from danlu.core.verbs import Estimate, Verb

IMPORTS_BYTES = 250_000_000
"""Resident memory of a run before its first stage: Python, torch, and what all verbs import."""


@dataclass
class StagePlan:
    """What one stage will take."""

    stage: str
    verb: str
    runs: bool
    why: str
    tokens: int
    flops: float
    memory_bytes: int
    seconds: float
    problems: list[str]


@dataclass
class Plan:
    """What a recipe will take; the sums are over the stages that are not done."""

    run: str
    machine: str
    stages: list[StagePlan]
    tokens: int = 0
    flops: float = 0.0
    memory_bytes: int = 0
    """The most that any stage needs."""
    available_memory_bytes: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def plan(config: PlanConfig, verbs: Sequence[Verb]) -> Plan:
    """Asks each stage's verb for its estimate, handing on what the stages before will have written."""
    path = find_recipe(config.recipe)
    recipe = read_recipe(path, verbs, parse_overrides(config.overrides), config.seed)
    work = Work(recipe, verbs, config.runs, str(path))
    here = machine()
    estimates: dict[str, Estimate] = {}
    stages = []
    for stage, intention in zip(recipe.stages, work.intentions(), strict=True):
        job = work.jobs[stage.name]
        upstream = {option: estimates[source] for option, source in stage.reads.items()}
        estimate = estimates[stage.name] = job.verb.run_estimate(job.config, upstream)
        memory = estimate.memory_bytes + IMPORTS_BYTES
        stages.append(
            StagePlan(
                stage=stage.name,
                verb=stage.verb,
                runs=intention.runs,
                why=intention.why,
                tokens=estimate.tokens,
                flops=estimate.flops,
                memory_bytes=memory,
                seconds=estimate.seconds,
                problems=estimate.problems,
            )
        )
    return _sum_up(Plan(recipe.name, here.name, stages), config.runs)


def _sum_up(made: Plan, runs: Path) -> Plan:
    todo = [stage for stage in made.stages if stage.runs]
    made.tokens = sum(stage.tokens for stage in todo)
    made.flops = sum(stage.flops for stage in todo)
    made.seconds = sum(stage.seconds for stage in todo)
    made.memory_bytes = max((stage.memory_bytes for stage in todo), default=0)
    made.available_memory_bytes = host.available_memory_bytes()
    made.problems = [f"{stage.stage}: {problem}" for stage in todo for problem in stage.problems]
    if machine().gpu is None:
        made.problems += [
            f"{stage.stage}: needs about {show_size(stage.memory_bytes)} of memory, "
            f"{show_size(made.available_memory_bytes)} are free now"
            for stage in todo
            if stage.memory_bytes > made.available_memory_bytes and not stage.problems
        ]
    return made


def show(made: Plan, verbs: Sequence[Verb]) -> None:
    """The plan as a table, on stdout."""
    here, out = machine(), console()
    out.print(
        f"{made.run} on {here.name}, {here.cores} cores: {here.bf16_gflops:,.0f} GFLOP/s in bfloat16, "
        f"{here.f32_gflops:,.0f} in float32, {show_size(made.available_memory_bytes)} of memory free",
        highlight=False,
    )
    rows = [
        (
            stage.stage,
            stage.verb,
            stage.tokens or None,
            f"{stage.flops:.2g}" if stage.flops else None,
            show_size(stage.memory_bytes),
            _time(stage.seconds),
            stage.why if stage.runs else "done",
        )
        for stage in made.stages
    ]
    shown = table("", ("stage", "verb", "tokens", "FLOPs", "memory", "time", "state"), rows)
    shown.add_section()
    shown.add_row(
        "to do",
        "",
        f"{made.tokens:,}",
        f"{made.flops:.2g}",
        show_size(made.memory_bytes),
        _time(made.seconds),
    )
    out.print(shown)
    for problem in made.problems:
        out.print(f"won't work: {problem}", style="bold red", highlight=False)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{clock(seconds)} min"
