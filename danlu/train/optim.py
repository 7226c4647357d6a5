"""Optimisers: AdamW, and Muon for the matrices with AdamW for the rest.

Weights and state are float32. Loshchilov and Hutter 2019 (AdamW, algorithm 2); Jordan et al. 2024 (Muon).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from danlu.core.device import choose_dtype
from danlu.train.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimiser of `config` for a Transformer; each group's `lr` is its peak.

    Weight decay holds for matrices, not for norms. Frozen parameters are left out.
    """
    matrices, embeddings, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif name.startswith("layers."):
            matrices.append(parameter)
        else:
            embeddings.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": embeddings, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adamw: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "fused": True,
    }
    if config.name == "adamw":
        groups[0]["params"] = [*embeddings, *matrices]
    groups = [{**group, "params": alike} for group in groups for alike in by_kind(group["params"])]
    if config.name == "adamw":
        return AdamW(groups, **adamw)
    muon = Muon(matrices, config.muon_lr, config.momentum, config.weight_decay)
    return Joined([muon, AdamW(groups, **adamw)])


def by_kind(tensors: list[Any]) -> list[list[Any]]:
    """Those that are spread over processes, and the others: one operation can't take both."""
    spread = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    whole = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    return [alike for alike in (spread, whole) if alike]


class Muon(Optimizer):
    """Momentum, orthogonalised: every direction of a matrix moves equally far (Jordan et al. 2024).

    As torch.optim.Muon, but for the dtype: that one computes in bfloat16 also where the processor can't,
    and a step then takes seven times as long.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                mean = self.state[p]["momentum_buffer"]
                mean.lerp_(p.grad, 1 - group["momentum"])
                direction = orthogonalise(p.grad.lerp(mean, group["momentum"]))  # Nesterov's look ahead
                scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction, alpha=-group["lr"] * scale)


def orthogonalise(x: Tensor) -> Tensor:
    """About U Vᵀ of x = U S Vᵀ, by five Newton–Schulz steps of a quintic (singular values near 1).

    In the dtype that the device multiplies fastest; returns the dtype of x.
    """
    y = x.to(choose_dtype("auto", x.device))
    tall = y.shape[0] > y.shape[1]
    y = y.mT if tall else y
    y = y / y.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    return (y.mT if tall else y).to(x.dtype)


class Joined(Optimizer):
    """Several optimisers of different parameters as one, with one state and one list of groups."""

    def __init__(self, parts: list[Optimizer]) -> None:
        self.parts = parts
        self.sizes = [len(part.param_groups) for part in parts]
        super().__init__([group for part in parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        start = 0
        for part, size in zip(self.parts, self.sizes, strict=True):
            part.state, part.param_groups = self.state, self.param_groups[start : start + size]
            part.step()
            start += size
