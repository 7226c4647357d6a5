"""Many processes under torchrun: who we are, and how a model is spread. Applied from outside the model.

- ddp: every process holds the whole model; gradients are summed (train/step.py does that).
- fsdp: every process holds a slice of every tensor (PyTorch FSDP2: `fully_shard`, DTensor).
- tensor: every process computes with a part of each matrix, for the same batch (DTensor; Shoeybi et al. 2019,
  "Megatron-LM", section 3): whole heads, whole columns of the feed-forward.

Without torchrun everything here is a no-op, so that the same code runs on a laptop.
"""

import os
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from danlu.core.errors import UserError
from danlu.model.transformer import Transformer

Way = Literal["ddp", "fsdp", "tensor"]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes the run folder."""
    return rank() == 0


def start(device: torch.device) -> torch.device:
    """Joins the processes that torchrun started; returns this process's device."""
    if "TORCHELASTIC_RUN_ID" not in os.environ and "WORLD_SIZE" not in os.environ:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def agree(value: Any) -> Any:
    """The main process's `value` (any picklable object), in every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every process's `value`, in the order of ranks."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def any_of(flag: bool) -> bool:
    """Whether `flag` is set in any process."""
    return any(gather(flag)) if world_size() > 1 else flag


def data_processes(way: Way) -> int:
    """How many processes have data of their own; in tensor parallelism all have the same."""
    return 1 if way == "tensor" else world_size()


def sum_over_ranks(values: list[float]) -> list[float]:
    """Element-wise sum over the processes, in float64."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def spread(model: Transformer, way: Way) -> bool:
    """Spreads a model over all processes, in place; whether each now holds only a part of its weights."""
    if world_size() == 1 or way == "ddp":
        return False
    if way == "fsdp":
        shard(model, list(model.layers))
    else:
        split_matrices(model, init_device_mesh(model.head_weight.device.type, (world_size(),)))
    return True


def shard(model: nn.Module, blocks: list[nn.Module]) -> None:
    """FSDP2: slices each of `blocks` and then the rest of `model` over the processes, in place.

    `hidden` is called beside `forward`, so it gathers the parameters too; the outermost ones (embedding,
    norm, head) stay gathered until the backward pass has used them.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in blocks:
        fully_shard(block)
    fully_shard(model, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")


def split_matrices(model: Transformer, mesh: DeviceMesh) -> None:
    """Tensor parallelism over the processes of a mesh of one dimension, in place.

    Queries, keys, values and what enters the feed-forward are split by their output, what leaves both by its
    input, and the sums over processes stand behind these. Embedding, norms and head stay whole everywhere.
    Raises UserError where heads or widths can't be cut evenly, for ALiBi, and for experts.
    """
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        RowwiseParallel,
        parallelize_module,
    )

    config, parts = model.config, mesh.size()
    if config.n_experts or config.positions == "alibi":
        what = "a mixture of experts" if config.n_experts else "ALiBi"
        raise UserError(f"{what} can't be split over processes by tensors", "use fsdp")
    for name in ("n_heads", "n_kv_heads", "ffn_width"):
        if getattr(config, name) % parts:
            raise UserError(
                f"{name} {getattr(config, name)} can't be split over {parts} processes", "use fewer, or fsdp"
            )
    ways: dict[str, ParallelStyle] = {"attention.out": RowwiseParallel(), "ffn.down": RowwiseParallel()}
    ways |= {f"attention.{name}": ColwiseParallel() for name in ("q", "k", "v")}
    ways |= {f"ffn.{name}": ColwiseParallel() for name in ("up", "gate")}
    for layer in model.layers:
        present = dict(layer.named_modules())
        parallelize_module(layer, mesh, {name: way for name, way in ways.items() if name in present})
        # Norms of single heads see the heads of their process only.
        for name, parameter in layer.named_parameters():
            if name.startswith(("attention.q_norm.", "attention.k_norm.")):
                parameter.register_hook(_summed(mesh))


def _summed(mesh: DeviceMesh) -> Callable[[torch.Tensor], torch.Tensor]:
    def hook(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        dist.all_reduce(total, group=mesh.get_group())
        return total

    return hook


def whole_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The unsharded weights on the CPU; every process has to call it, only the main one gets them all."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)  # type: ignore[return-value]
