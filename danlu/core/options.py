"""Config of the verbs that work on recipes and runs. Imports no torch."""

from pathlib import Path

from pydantic import Field

from danlu.core.config import Config


class RecipeConfig(Config):
    """A recipe, and what is changed in it for once."""

    recipe: Path = Field(description="recipe file, or the name of one that comes with danlu")
    overrides: tuple[str, ...] = Field((), description="STAGE.option=value, over what the recipe says")
    seed: int | None = Field(None, ge=0, description="seed of the run, over what the recipe says")
    runs: Path = Field(Path("runs"), description="folder that holds the runs")


class RunConfig(RecipeConfig):
    """`danlu run`."""

    start: str | None = Field(
        None, alias="from", description="run this stage and those after it again, from scratch"
    )
    dry_run: bool = Field(False, description="only say what would run, and why")


class PlanConfig(RecipeConfig):
    """`danlu plan`."""


class QuickstartConfig(Config):
    """`danlu quickstart`."""

    runs: Path = Field(Path("runs"), description="folder that holds the runs")


class PathConfig(Config):
    """A verb that looks at one file or folder of a run."""

    path: Path = Field(description="file or folder in a run")


class ReportConfig(Config):
    """`danlu report`."""

    run: Path = Field(description="folder of a run, e.g. runs/quickstart")


class BenchConfig(Config):
    """`danlu bench`."""

    name: str = Field(description="file of benchmarks/, e.g. train-throughput")
    options: tuple[str, ...] = Field((), description="handed on to it, e.g. --options=--sizes --options=10M")


class GetConfig(Config):
    """`danlu get`."""

    name: str = Field(description="what to install: smollm2 (a chat model of 135M parameters, 98 MB)")


class DoctorConfig(Config):
    """`danlu doctor`."""
