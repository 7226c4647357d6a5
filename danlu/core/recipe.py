"""A recipe: the stages of a run, read from YAML and checked to the last option before anything runs."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from danlu.core.config import (
    Config,
    StageConfig,
    input_fields,
    make_config,
    merge,
    nearest,
    read_yaml,
)
from danlu.core.errors import UserError
from danlu.core.files import atomic_write
from danlu.core.verbs import Verb

_COMMAND_LINE = "on the command line"
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
RECIPES = Path(__file__).parents[2] / "recipes"
"""The recipes that come with danlu."""


class Stage(Config):
    """One step of a recipe."""

    name: str = Field(pattern=_NAME, description="folder of this stage within the run's")
    verb: str = Field(description="what it does, e.g. pretrain")
    reads: dict[str, str] = Field({}, description="option of the verb: stage whose output it takes")
    options: dict[str, Any] = Field({}, description="the verb's options")


class Recipe(Config):
    """A run: its stages, in the order in which they run."""

    name: str = Field(pattern=_NAME, description="folder of the run within runs/")
    seed: int = Field(0, ge=0, description="seed of every stage that doesn't name its own")
    without_bf16: dict[str, dict[str, Any]] = Field(
        {}, description="stage: options that are laid over its own where the device has no bf16 arithmetic"
    )
    stages: list[Stage] = Field(min_length=1, description="the steps, in order")

    def stage(self, name: str, where: str) -> Stage:
        """The stage of that name. Raises UserError with the nearest one."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise UserError(f'{where}: no stage is called "{name}"{nearest(name, [s.name for s in self.stages])}')

    def closure(self, names: Iterable[str]) -> list[Stage]:
        """The named stages and all that they read, directly or not, in the recipe's order."""
        wanted = set(names)
        for stage in reversed(self.stages):
            if stage.name in wanted:
                wanted.update(stage.reads.values())
        return [stage for stage in self.stages if stage.name in wanted]


def find_recipe(path: Path) -> Path:
    """`path`, or the recipe of that name that comes with danlu. Raises UserError."""
    shipped = RECIPES / f"{path.name}.yaml"
    if not path.is_file() and path.name == str(path) and shipped.exists():
        return shipped
    if not path.exists():
        known = [recipe.stem for recipe in sorted(RECIPES.glob("*.yaml"))]
        hint = nearest(path.stem, known).removeprefix("; ") if known else "check the path"
        raise UserError(f"{path}: no such recipe", hint)
    return path


def read_recipe(
    path: Path, verbs: Sequence[Verb], overrides: Mapping[str, Any] | None = None, seed: int | None = None
) -> Recipe:
    """Reads and checks a recipe. `overrides`: {stage: options}, laid over what it says.

    Where `without_bf16` holds, it has been laid over the stages, and that is said on stderr. Raises UserError
    naming the file, or the command line, and the key.
    """
    recipe = make_config(Recipe, read_yaml(path), str(path))
    _check(recipe, verbs, str(path))
    if recipe.without_bf16:
        smaller = _override(recipe, recipe.without_bf16, None, f"{path}, without_bf16")
        _check(smaller, verbs, f"{path}, without_bf16")
        if not _has_bf16():
            _say(f"no bf16 arithmetic here: what {path} says under without_bf16 holds")
            recipe = smaller
        recipe = recipe.model_copy(update={"without_bf16": {}})
    if not overrides and seed is None:
        return recipe
    recipe = _override(recipe, overrides or {}, seed, _COMMAND_LINE)
    _check(recipe, verbs, _COMMAND_LINE)
    return recipe


@cache
def _say(text: str) -> None:
    """Once, however often a recipe is read."""
    print(text, file=sys.stderr)


def _has_bf16() -> bool:
    from danlu.core.device import choose_device, has_native_bf16

    return has_native_bf16(choose_device())


def _override(recipe: Recipe, overrides: Mapping[str, Any], seed: int | None, where: str) -> Recipe:
    options = {stage.name: stage.options for stage in recipe.stages}
    for name, values in overrides.items():
        stage = recipe.stage(name, where)
        if not isinstance(values, Mapping):
            raise UserError(f"{where}: {name} is a stage", f"write {name}.OPTION=value")
        options[name] = merge(stage.options, values)
    stages = [stage.model_copy(update={"options": options[stage.name]}) for stage in recipe.stages]
    return recipe.model_copy(update={"stages": stages, "seed": recipe.seed if seed is None else seed})


def _check(recipe: Recipe, verbs: Sequence[Verb], where: str) -> None:
    """Names, verbs, what is read, and every option. Raises UserError."""
    earlier: list[str] = []
    for stage in recipe.stages:
        place = f"{where}, stage {stage.name}"
        if stage.name in earlier:
            raise UserError(f"{place}: two stages have this name", "rename one of them")
        find_verb(stage, verbs, place)
        for option, source in stage.reads.items():
            if source not in earlier:
                raise UserError(f"{place}: reads.{option}: {_no_source(recipe, stage, source, earlier)}")
        stage_config(recipe, stage, verbs, Path("runs"), where)
        earlier.append(stage.name)


def _no_source(recipe: Recipe, stage: Stage, source: str, earlier: Sequence[str]) -> str:
    """Why a stage can't read `source`."""
    if source == stage.name:
        return "a stage can't read itself"
    if any(other.name == source for other in recipe.stages):
        return f'stage "{source}" comes later; put it before this one'
    return f'no earlier stage is called "{source}"{nearest(source, earlier) if earlier else ""}'


def find_verb(stage: Stage, verbs: Sequence[Verb], place: str) -> Verb:
    """The row of a stage's verb. Raises UserError with the nearest one."""
    known = {verb.name: verb for verb in verbs if verb.stage}
    if stage.verb not in known:
        raise UserError(f'{place}: verb: no stage verb is called "{stage.verb}"{nearest(stage.verb, known)}')
    return known[stage.verb]


def stage_config(
    recipe: Recipe, stage: Stage, verbs: Sequence[Verb], runs: Path, where: str = "recipe"
) -> StageConfig:
    """The effective config of a stage: its options, the folders that it reads, its own folder and seed."""
    place = f"{where}, stage {stage.name}"
    cls = find_verb(stage, verbs, place).load_config()
    inputs = input_fields(cls)
    for option in stage.reads:
        if option not in inputs:
            raise UserError(
                f'{place}: reads: "{option}" is no input of {stage.verb}{nearest(option, inputs)}'
            )
        if option in stage.options:
            raise UserError(f"{place}: {option} is given in reads and in options", "remove one of them")
    if "out" in stage.options:
        raise UserError(f"{place}: out is set by the run", "remove it; name and stage name give the folder")
    folder = runs / recipe.name
    given = {option: str(folder / source) for option, source in stage.reads.items()}
    values = {"seed": recipe.seed, **stage.options, **given, "out": str(folder / stage.name)}
    config = make_config(cls, values, place)
    assert isinstance(config, StageConfig)
    return config


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Saves the recipe as it runs, overrides and all."""
    with atomic_write(path) as file:
        yaml.safe_dump(recipe.model_dump(mode="json"), file, sort_keys=False, allow_unicode=True)
