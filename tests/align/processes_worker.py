"""What the processes of test_processes.py run, alone or under torchrun.

VERB CONFIG: a run. gradients OUT VERB CONFIG: the gradients of its first step.
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


def gradients(out: Path, verb: str, values: dict[str, object]) -> None:
    """Of the first step of a loss of preferences."""
    parallel.start(torch.device("cpu"))
    config = VERBS[verb][0].model_validate(values)
    model = load(str(config.init_from), dtype=torch.float32)[0]
    torch.manual_seed(0)
    objective = (
        Rewards(model, config) if isinstance(config, RewardConfig) else make_objective(model, config)  # type: ignore[arg-type]
    )
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
    TrainStep(model, recorder, clip=0.0, objective=objective).step(
        next(iter(loader)).split(config.accumulate)
    )
    if parallel.is_main():
        torch.save(recorder.gradients, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    task, *arguments = sys.argv[1:]
    if task == "gradients":
        gradients(Path(arguments[0]), arguments[1], json.loads(arguments[2]))
    else:
        make, run = VERBS[task]
        run(make.model_validate(json.loads(arguments[0])))  # type: ignore[operator]
    parallel.stop()
