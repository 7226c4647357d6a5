"""`danlu quickstart`: the recipe that comes with danlu, from raw conversations to a model that talks back."""

from collections.abc import Sequence
from pathlib import Path

from danlu.core import runner
from danlu.core.options import QuickstartConfig, RunConfig
from danlu.core.recipe import RECIPES
from danlu.core.runner import RunResult
from danlu.core.show import console
from danlu.core.verbs import Verb


def quickstart(config: QuickstartConfig, verbs: Sequence[Verb]) -> RunResult:
    """Runs `recipes/quickstart.yaml`; what is done is skipped."""
    result = runner.run(RunConfig(recipe=RECIPES / "quickstart.yaml", runs=config.runs), verbs)
    assert isinstance(result, RunResult)
    return result


def show(result: RunResult, verbs: Sequence[Verb]) -> None:
    """The scores, where the report is, and what to try next."""
    runner.show(result, verbs)
    danlu = ".venv/bin/danlu" if Path(".venv/bin/danlu").exists() else "danlu"
    console().print(
        f"To try next:\n  {danlu} chat {result.folder}\n  {danlu} plan quickstart pretrain.steps=2000",
        highlight=False,
    )
