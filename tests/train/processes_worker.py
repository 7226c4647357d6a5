"""What the processes of test_processes.py run, alone or under torchrun.

gradients OUT ACCUMULATE: the gradients of one step on eight ragged conversations.
spread OUT WAY [FROM]: logits and gradients of a model that is spread over the processes, and its checkpoint;
its weights are those of the checkpoint in FROM, if given.
train CONFIG: a pretraining run.
"""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from danlu.model import parallel
from danlu.model.config import ModelConfig
from danlu.model.transformer import Transformer
from danlu.tokens.loader import Batch
from danlu.train.checkpoint import Checkpointer, load_weights_and_moments
from danlu.train.config import TrainConfig
from danlu.train.pretrain import pretrain
from danlu.train.step import TrainStep

LENGTHS = [64, 7, 23, 41, 2, 55, 12, 30]
SPREAD = ModelConfig(
    vocab_size=300, width=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_width=64, max_positions=64,
    qk_norm=True, qkv_bias=True, out_bias=True, ffn_bias=True, norm="layernorm",
)  # fmt: skip


class Recorder(torch.optim.SGD):
    """Keeps the gradients instead of using them."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def ragged() -> Batch:
    """Eight conversations of different lengths, half of each supervised; one has a single such token."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(LENGTHS), max(LENGTHS))
    ids = torch.randint(300, shape, generator=generator)
    place = torch.arange(shape[1]).expand(shape)
    lengths = torch.tensor(LENGTHS)[:, None]
    inside = place < lengths
    return Batch(
        ids=ids,
        targets=ids.roll(-1, 1),
        weights=(inside & (place >= lengths // 2)).float(),
        positions=torch.where(inside, place, 0),
        segments=torch.where(inside, 0, -1).to(torch.int32),
    )


def gradients(out: Path, accumulate: int) -> None:
    torch.manual_seed(1)
    model = Transformer(
        ModelConfig(
            vocab_size=300, width=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_width=64, max_positions=64
        )
    )
    recorder = Recorder(model.parameters(), lr=0.0)
    mine = ragged().split(parallel.world_size())[parallel.rank()]
    TrainStep(model, recorder, clip=0.0).step(mine.split(accumulate))
    if parallel.is_main():
        torch.save(recorder.gradients, out)


def spread(out: Path, way: str, start: Path | None) -> None:
    torch.manual_seed(1 if start is None else 2)
    model = Transformer(SPREAD)
    if way == "tensor":
        parallel.split_matrices(model, init_device_mesh("cpu", (parallel.world_size(),)))
    elif way == "fsdp":
        parallel.shard(model, list(model.layers))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if start is not None:
        load_weights_and_moments(start / "checkpoints" / "step-00000001", model, optimizer)
    batch = ragged()
    logits = model(batch.ids, batch.positions, batch.segments)
    (logits.float().logsumexp(-1) * batch.weights).sum().backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
    checkpoints = Checkpointer(out / "checkpoints", keep=1)
    checkpoints.save(1, model, optimizer, {})
    checkpoints.wait()
    if parallel.is_main():
        torch.save((logits.detach(), gradients), out / "result")


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


if __name__ == "__main__":
    task, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    if task == "gradients":
        parallel.start(torch.device("cpu"))
        gradients(Path(arguments[0]), int(arguments[1]))
    elif task == "spread":
        parallel.start(torch.device("cpu"))
        spread(Path(arguments[0]), arguments[1], Path(arguments[2]) if len(arguments) > 2 else None)
    else:
        pretrain(TrainConfig.model_validate(json.loads(arguments[0])))
    parallel.stop()
