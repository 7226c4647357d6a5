"""`danlu reproduce NAME`: one table from names to experiments."""

import sys
from collections.abc import Callable
from pathlib import Path

from danlu.core.config import nearest
from danlu.core.errors import UserError
from danlu.core.verbs import resolve
from danlu.papers.config import ReproduceConfig
from danlu.papers.protocol import Result, write_result

EXPERIMENTS = {
    "annollm": "danlu.papers.annollm:run",
    "best-of-n": "danlu.papers.best_of_n:run",
    "calibration": "danlu.papers.calibration:run",
    "chain-of-thought": "danlu.papers.chain_of_thought:run",
    "compression": "danlu.papers.compression:run",
    "dpo": "danlu.papers.dpo:run",
    "few-shot": "danlu.papers.few_shot:run",
    "gopher": "danlu.papers.gopher:run",
    "hh": "danlu.papers.hh:run",
    "inverse-prompting": "danlu.papers.inverse_prompting:run",
    "lora": "danlu.papers.lora:run",
    "nucleus": "danlu.papers.nucleus:run",
    "opt-logbook": "danlu.papers.opt_logbook:run",
    "overoptimization": "danlu.papers.overoptimization:run",
    "preference-pretraining": "danlu.papers.preference_pretraining:run",
    "reward-models": "danlu.papers.reward_models:run",
    "self-consistency": "danlu.papers.self_consistency:run",
}
"""name: "module:function", which takes (config, folder) and returns a protocol.Result."""


def reproduce(config: ReproduceConfig) -> Result:
    """Runs the experiment and writes result.json, plot and page. Raises UserError for an unknown name."""
    if config.name not in EXPERIMENTS:
        hint = nearest(config.name, EXPERIMENTS).removeprefix("; ")
        raise UserError(f'no experiment is called "{config.name}"', hint)
    folder = config.out or Path("runs") / "reproduce" / config.name
    experiment: Callable[[ReproduceConfig, Path], Result] = resolve(EXPERIMENTS[config.name])
    result = experiment(config, folder)
    write_result(result, folder)
    print(f"{folder / 'index.html'}: rule, verdicts, plot", file=sys.stderr)
    return result
