"""What a training run needs, predicted, against what it takes."""

import subprocess
import sys

import pytest
import torch

from danlu.model import count
from danlu.model.config import LoraConfig, ModelConfig
from danlu.model.transformer import Transformer
from danlu.tokens.loader import Batch
from danlu.train.config import OptimConfig
from danlu.train.optim import make_optimizer
from danlu.train.step import TrainStep

SIZES = ModelConfig(
    vocab_size=512, width=128, n_layers=4, n_heads=4, n_kv_heads=2, ffn_width=320, max_positions=256
)


def batch(rows: int, length: int) -> Batch:
    ids = torch.arange(rows * length).view(rows, length) % 500
    positions = torch.arange(length).expand(rows, length)
    return Batch(ids, ids, torch.ones(rows, length), positions, torch.zeros(rows, length, dtype=torch.int32))


def saved_bytes(dtype: torch.dtype, compile: bool) -> int:
    """Bytes that autograd keeps for the backward pass of one step, weights and their copies left out."""
    model = Transformer(SIZES)
    step = TrainStep(model, make_optimizer(model, OptimConfig()), dtype=dtype, compile=compile)
    examples = batch(4, 256)
    step.step([examples])  # compiles
    matrices = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape not in matrices:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step.accumulate([examples])
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_activations_are_those_that_autograd_keeps(dtype: torch.dtype, compile: bool) -> None:
    layer = count.activation_bytes(SIZES, dtype.itemsize, fused=compile)
    assert saved_bytes(dtype, compile) == pytest.approx(4 * 256 * SIZES.n_layers * layer, rel=0.1)


PEAK = """
import sys
from danlu.core.allocator import give_back_freed_memory
from danlu.core.host import peak_rss_bytes, reset_peak_rss
from danlu.train.run import adapt
sys.path.insert(0, sys.argv[1])
import test_estimate as t
rows, length, name = 16, 256, sys.argv[2]  # of the optimiser, or of the adapter that adamw trains
model = t.Transformer(t.BIG)
if name in t.ADAPTED:
    adapt(model, t.ADAPTED[name], t.torch.float32)
    name = "adamw"
    give_back_freed_memory()  # of the base before it was packed
    reset_peak_rss()
step = t.TrainStep(model, t.make_optimizer(model, t.OptimConfig(name=name)), dtype=t.torch.float32,
                   checkpoint_activations=sys.argv[3] == "True")
before = peak_rss_bytes()
for _ in range(3):
    step.step([t.batch(rows, length)])
weights = sum(p.nbytes for p in model.parameters())
print(peak_rss_bytes() - before + weights)
"""
ADAPTED = {"lora": LoraConfig(rank=8), "nf4": LoraConfig(rank=8, quantise="nf4")}
BIG = ModelConfig(
    **SIZES.model_dump(exclude={"width", "head_width", "ffn_width", "n_layers", "vocab_size"}),
    width=384,
    ffn_width=1024,
    n_layers=8,
    vocab_size=2048,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "checkpointed"),
    [
        *(("adamw", False), ("muon", False), ("muon", True)),
        *(("lora", False), ("lora", True), ("nf4", False), ("nf4", True)),
    ],
)
def test_the_peak_of_a_real_step(optimizer: str, checkpointed: bool, request: pytest.FixtureRequest) -> None:
    """Within a quarter, in a process of its own."""
    command = [sys.executable, "-c", PEAK, str(request.path.parent), optimizer, str(checkpointed)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    predicted = count.training_memory(BIG, 16 * 256, 4, checkpointed, optimizer, lora=ADAPTED.get(optimizer))
    assert predicted == pytest.approx(int(done.stdout), rel=0.25)
