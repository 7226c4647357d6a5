"""One optimiser step: forward, backward, sums over processes, clipping, update."""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from danlu.core.allocator import keep_freed_memory
from danlu.core.errors import UserError
from danlu.model import parallel
from danlu.model.compiling import compiled_layers
from danlu.model.transformer import Transformer
from danlu.tokens.loader import Batch
from danlu.train.objective import LanguageModelling, Objective
from danlu.train.optim import by_kind


@dataclass(frozen=True)
class StepResult:
    """Of all processes. `count`: what the loss is a mean over; `grad_norm`: before clipping."""

    loss: float
    count: float
    grad_norm: float


class TrainStep:
    """Updates a model by batches.

    Every loss is a sum divided by what the objective counts in the whole step (supervised tokens), over
    all micro-batches and all processes, so that how a batch is cut does not change the gradient.

    Weights, gradients and the optimiser's state are float32; `dtype` is that of activations and products.
    Only parameters that require a gradient are updated. The model is in training mode (dropout) only here.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: Optimizer,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        clip: float = 1.0,
        checkpoint_activations: bool = False,
        way: parallel.Way = "ddp",
        objective: Objective | None = None,
    ) -> None:
        """`clip`: largest global norm of the gradient, 0 = none; `compile`: see `compiling.py`.

        `way`: how the model is spread over processes (`parallel.spread`).
        """
        self.shares_data = parallel.data_processes(way) > 1
        self.model, self.optimizer, self.clip, self.compile = model, optimizer, clip, compile
        self.objective = objective or LanguageModelling()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.sharded = isinstance(model, FSDPModule)
        model.compute_dtype = dtype
        model.checkpoint_activations = checkpoint_activations
        keep_freed_memory()

    def step(self, batches: list[Batch]) -> StepResult:
        """One update by the micro-batches in `batches` (and by those of the other processes).

        Raises UserError where nothing counts. Where the loss or the gradient is not finite the
        weights stay as they are; the caller sees it in the result.
        """
        loss, count = self.accumulate(batches)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        result = StepResult(loss, count, _total_norm(gradients))
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            if self.clip and result.grad_norm > self.clip:
                for alike in by_kind(gradients):
                    torch._foreach_mul_(alike, self.clip / result.grad_norm)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return result

    def accumulate(self, batches: list[Batch]) -> tuple[float, float]:
        """Leaves the gradient of the mean loss in the parameters; returns that loss and what was counted."""
        counts = torch.stack([self.objective.count(batch) for batch in batches]).sum()
        count = self._sum_over_processes(counts).item()
        if count == 0:
            raise UserError(self.objective.nothing, "look at the data with `danlu inspect`")
        self.model.train()
        with compiled_layers(self.model) if self.compile else nullcontext():
            losses = [self._backward(batch, count) for batch in batches]
        self.model.eval()
        if not self.sharded:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    self._sum_over_processes(parameter.grad)
        return self._sum_over_processes(torch.stack(losses).sum()).item(), count

    def _backward(self, batch: Batch, count: float) -> Tensor:
        """Adds the gradient of one micro-batch; returns its share of the mean loss."""
        loss = self.objective.loss(self.model, batch, count)
        # FSDP2 averages gradients over the processes; the sum is wanted.
        (loss * dist.get_world_size() if self.sharded else loss).backward()
        return loss.detach()

    def _sum_over_processes(self, value: Tensor) -> Tensor:
        if self.shares_data:
            dist.all_reduce(value)
        return value


def _total_norm(gradients: list[Tensor]) -> float:
    """The length of all gradients together, also where some are spread and others whole."""
    norms = [torch.nn.utils.get_total_norm(alike) for alike in by_kind(gradients)]
    return math.hypot(*(n.full_tensor().item() if isinstance(n, DTensor) else n.item() for n in norms))
