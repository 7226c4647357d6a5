"""Optimisers: AdamW, and Muon for the matrices with AdamW for the rest.

Weights and state are float32. Loshchilov and Hutter 2019 (AdamW, algorithm 2); Jordan et al. 2024 (Muon).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from danlu.train.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimiser of `config` for a Transformer; each group's `lr` is its peak.

    Weight decay holds for matrices, not for norms.
    """
    matrices, embeddings, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif name.startswith("layers."):
            matrices.append(parameter)
        else:
            embeddings.append(parameter)
    groups = [
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
        return AdamW(groups, **adamw)
    muon = torch.optim.Muon(
        matrices, lr=config.muon_lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    return Joined([muon, AdamW(groups, **adamw)])


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
