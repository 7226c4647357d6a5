"""What the processes of test_processes.py run, alone or under torchrun.

VERB CONFIG: a run. gradients OUT [[VERB, CONFIG], …]: those of the first step of each.
"""

import json
import sys
from pathlib import Path

import torch

from danlu.align.config import DPOConfig, GRPOConfig, PPOConfig, RewardConfig
from danlu.align.dpo import dpo, make_objective
from danlu.align.grpo import grpo
from danlu.align.ppo import ppo
from danlu.align.reward import Rewards, reward
from danlu.model import parallel
from danlu.model.checkpoint import load
from danlu.tokens.loader import PackedLoader
from danlu.tokens.shards import Shards
from danlu.train.objective import Objective
from danlu.train.step import TrainStep

VERBS = {
    "dpo": (DPOConfig, dpo),
    "grpo": (GRPOConfig, grpo),
    "ppo": (PPOConfig, ppo),
    "reward": (RewardConfig, reward),
}


class Recorder(torch.optim.SGD):
    """Keeps the gradients instead of using them."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def gradients(verb: str, values: dict[str, object]) -> list[torch.Tensor]:
    """Of the first step of a loss of preferences."""
    config = VERBS[verb][0].model_validate(values)
    model = load(str(config.init_from), dtype=torch.float32)[0]
    torch.manual_seed(0)
    objective: Objective
    if isinstance(config, RewardConfig):
        objective = Rewards(model, config)
    else:
        assert isinstance(config, DPOConfig)
        objective = make_objective(model, config)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the reference, where every loss is alike
            parameter.add_(torch.randn_like(parameter) * 0.02)
    recorder = Recorder(model.parameters(), lr=0.0)
    size, rank = parallel.world_size(), parallel.rank()
    loader = PackedLoader(
        Shards(config.data / "train"),
        config.batch_size // size,
        config.sequence_length,
        seed=config.seed,
        rank=rank,
        world_size=size,
    )
    step = TrainStep(model, recorder, clip=0.0, objective=objective)
    step.step(next(iter(loader)).split(config.accumulate))
    return recorder.gradients


if __name__ == "__main__":
    torch.set_num_threads(1)
    task, *arguments = sys.argv[1:]
    if task == "gradients":
        parallel.start(torch.device("cpu"))
        found = [gradients(verb, values) for verb, values in json.loads(arguments[1])]
        if parallel.is_main():
            torch.save(found, Path(arguments[0]))
    else:
        make, run = VERBS[task]
        run(make.model_validate(json.loads(arguments[0])))  # type: ignore[operator]
    parallel.stop()
