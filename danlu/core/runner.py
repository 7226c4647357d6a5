"""Runs the stages of a recipe in their order, each in its own folder."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danlu.core.artefacts import RECIPE
from danlu.core.config import Config, StageConfig, parse_overrides
from danlu.core.errors import UserError
from danlu.core.identity import Job, examine, identify, input_paths
from danlu.core.options import RunConfig
from danlu.core.progress import clock
from danlu.core.recipe import Recipe, Stage, find_recipe, find_verb, read_recipe, stage_config, write_recipe
from danlu.core.show import console, table
from danlu.core.stage import Outcome, command_line, is_main_process, reset, run_stage
from danlu.core.verbs import Verb


@dataclass(frozen=True)
class RunResult:
    """What `danlu run` did."""

    run: str
    folder: Path
    stages: list[Outcome]
    seconds: float
    report: Path | None
    """None where only a part of the recipe was asked for."""


@dataclass(frozen=True)
class Intention:
    """What `danlu run --dry-run` says of a stage."""

    stage: str
    verb: str
    runs: bool
    why: str


def run(config: RunConfig, verbs: Sequence[Verb]) -> RunResult | list[Intention]:
    """`danlu run`: every stage that is not done yet, then the report."""
    path = find_recipe(config.recipe)
    recipe = read_recipe(path, verbs, parse_overrides(config.overrides), config.seed)
    work = Work(recipe, verbs, config.runs, str(path))
    again = work.from_stage(config.start) if config.start else []
    if config.dry_run:
        return work.intentions(again)
    return work.run(recipe.stages, again)


def run_verb_of_recipe(
    verb: Verb, path: Path, options: Mapping[str, Any], verbs: Sequence[Verb], runs: Path = Path("runs")
) -> RunResult:
    """`danlu pretrain RECIPE`: the recipe's stages of this verb, and what they read that isn't done.

    `options` are laid over those stages' options.
    """
    path = find_recipe(path)
    recipe = read_recipe(path, verbs)
    wanted = [stage.name for stage in recipe.stages if stage.verb == verb.name]
    if not wanted:
        raise UserError(f"{path}: no stage of verb {verb.name}", f"run all of it: danlu run {path}")
    recipe = read_recipe(path, verbs, dict.fromkeys(wanted, options))
    return Work(recipe, verbs, runs, str(path)).run(recipe.closure(wanted))


def run_verb(verb: Verb, config: Config) -> Any:
    """A verb run alone, without a recipe. One that can be a stage keeps its run folder."""
    if not isinstance(config, StageConfig):
        return verb.load_function()(config)
    return run_stage(Job(verb, config, command_line(), rebuild=False)).result


class Work:
    """A recipe that is about to run."""

    def __init__(self, recipe: Recipe, verbs: Sequence[Verb], runs: Path, where: str) -> None:
        self.recipe, self.where, self.folder = recipe, where, runs / recipe.name
        self.jobs = {
            stage.name: Job(
                find_verb(stage, verbs, where),
                stage_config(recipe, stage, verbs, runs, where),
                command_line(),
                rebuild=True,
            )
            for stage in recipe.stages
        }

    def from_stage(self, name: str) -> list[Stage]:
        """That stage and those after it."""
        first = self.recipe.stages.index(self.recipe.stage(name, self.where))
        return self.recipe.stages[first:]

    def run(self, stages: Sequence[Stage], again: Sequence[Stage] = ()) -> RunResult:
        """Runs `stages`; those in `again` from scratch. Raises UserError."""
        started = time.monotonic()
        for stage in stages:
            self._check_files(stage)
        if again and "WORLD_SIZE" in os.environ:
            raise UserError("--from does not go with torchrun", "remove the stages' folders instead")
        for stage in again:
            reset(self.jobs[stage.name].folder)
        outcomes = []
        for stage in stages:
            outcomes.append(run_stage(self.jobs[stage.name]))
            if is_main_process():  # not before: a run that fails at once leaves nothing behind
                write_recipe(self.recipe, self.folder / RECIPE)
        complete = len(stages) == len(self.recipe.stages)
        report = self._report(outcomes) if complete and is_main_process() else None
        return RunResult(self.recipe.name, self.folder, outcomes, time.monotonic() - started, report)

    def _check_files(self, stage: Stage) -> None:
        """The inputs that no stage makes are there, before the first stage runs."""
        made = {self.folder / source for source in stage.reads.values()}
        try:
            input_paths(self.jobs[stage.name].config, made)
        except UserError as error:
            raise UserError(f"{self.where}, stage {stage.name}: {error.message}", error.remedy) from None

    def _report(self, outcomes: list[Outcome]) -> Path:
        from danlu.core.report import write_report

        path = self.folder / "report.html"
        if any(outcome.outcome != "skipped" for outcome in outcomes) or not path.exists():
            write_report(self.folder)
        return path

    def intentions(self, again: Sequence[Stage] = ()) -> list[Intention]:
        """What `run` would do."""
        redone = {stage.name for stage in again}
        running: set[str] = set()
        result = []
        for stage in self.recipe.stages:
            self._check_files(stage)
            first = [source for source in stage.reads.values() if source in running]
            if stage.name in redone:
                runs, why = True, "asked for by --from"
            elif first:
                runs, why = True, f"reads {' and '.join(first)}"
            else:
                job = self.jobs[stage.name]
                state = examine(job, identify(job))
                runs, why = state.kind != "done", state.why
            if runs:
                running.add(stage.name)
            result.append(Intention(stage.name, stage.verb, runs, why))
        return result


def show(result: RunResult | list[Intention], verbs: Sequence[Verb]) -> None:
    """What `danlu run` did, the result of its last stage, and where the report is; or what it would do."""
    out = console()
    if isinstance(result, list):
        rows = [(i.stage, i.verb, "runs" if i.runs else "is skipped", i.why) for i in result]
        out.print(table("", ("stage", "verb", "", "why"), rows))
        return
    last = result.stages[-1]
    next(verb for verb in verbs if verb.name == last.verb).load_show()(last.result)
    done = [(o.stage, o.verb, o.outcome, clock(o.seconds)) for o in result.stages]
    out.print(table(str(result.folder), ("stage", "verb", "", "time"), done))
    if result.report is not None:
        out.print(f"The report: {result.report}", highlight=False)
