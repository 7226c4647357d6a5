"""Low-rank adaptation, applied to a model from outside: y = x Wᵀ + s · drop(x) Aᵀ Bᵀ with W frozen.

Hu et al. 2022 (LoRA, equation 3; s = α / r); Kalajdzievski 2023 (rsLoRA; s = α / √r); Liu et al. 2024
(DoRA, equation 5: W + s B A, its rows scaled to learnt lengths m).
"""

import fnmatch
import math
from typing import cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from danlu.core.config import Config
from danlu.core.errors import UserError
from danlu.model.layers import Linear
from danlu.model.transformer import Transformer


class LoraConfig(Config):
    """An adapter's size and place."""

    rank: int = Field(16, ge=1, description="r: rows of A and columns of B")
    alpha: float = Field(32.0, gt=0, description="α: the adapter's output is multiplied by α / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the adapter's input, in training")
    targets: tuple[str, ...] = Field(
        ("attention.*", "ffn.*"), description="patterns of the matrices in a layer that are adapted"
    )
    rslora: bool = Field(False, description="multiply by α / √r instead (rsLoRA)")
    dora: bool = Field(False, description="learn the length of each row apart (DoRA)")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Adapter(nn.Module):
    """A, B and, with DoRA, the rows' lengths. B is zero at first, so that nothing changes."""

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        super().__init__()
        self.config = config
        n_out, n_in = base.weight.shape
        self.a = nn.Parameter(torch.empty(config.rank, n_in, device=base.weight.device))
        self.b = nn.Parameter(torch.zeros(n_out, config.rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.m = nn.Parameter(row_lengths(base.weight.float())) if config.dora else None

    def delta(self) -> Tensor:
        """s B A in float32."""
        return self.config.scale * (self.b.float() @ self.a.float())


class LoraLinear(nn.Module):
    """A frozen matrix with adapters, one of which is active."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None

    def adapter(self, name: str) -> Adapter:
        return cast(Adapter, self.adapters[name])

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.active is None:
            return y
        adapter = self.adapter(self.active)
        config = adapter.config
        dropped = F.dropout(x, config.dropout, self.training)
        change = F.linear(F.linear(dropped, adapter.a.to(x.dtype)), adapter.b.to(x.dtype)) * config.scale
        if adapter.m is None:
            return y + change
        # The length counts as a constant in the gradient (DoRA, section 4.3).
        lengths = row_lengths(self.base.weight.detach().float() + adapter.delta().detach())
        ratio = (adapter.m / lengths).to(x.dtype)
        plain = y if self.base.bias is None else y - self.base.bias.to(x.dtype)
        if config.dropout and self.training:
            plain = F.linear(dropped, self.base.weight.to(x.dtype))
        return y + (ratio - 1) * plain + ratio * change

    def merged(self) -> Tensor:
        """The matrix with the active adapter in it, in float32."""
        weight = self.base.weight.float()
        if self.active is None:
            return weight
        adapter = self.adapter(self.active)
        weight = weight + adapter.delta()
        return weight if adapter.m is None else (adapter.m / row_lengths(weight))[:, None] * weight


def row_lengths(weight: Tensor) -> Tensor:
    """(n_out,) Euclidean length of each row."""
    return torch.linalg.vector_norm(weight, dim=1)


def adapted_layers(model: Transformer) -> dict[str, LoraLinear]:
    """The matrices that have adapters, by the name of the module in whose place they stand."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def add_adapter(model: Transformer, config: LoraConfig, name: str = "default") -> list[nn.Parameter]:
    """Puts a new adapter on every matrix that `targets` names, and makes it active. Freezes the rest.

    Returns the trained parameters. Raises UserError where nothing matches.
    """
    model.requires_grad_(False)
    found = [
        module_name
        for module_name, module in model.named_modules()
        if isinstance(module, (Linear, LoraLinear)) and _matches(module_name, config.targets)
    ]
    if not found:
        raise UserError(
            f"no matrix matches {', '.join(config.targets)}", "patterns are like attention.q or ffn.*"
        )
    trained: list[nn.Parameter] = []
    for module_name in found:
        layer = model.get_submodule(module_name)
        if not isinstance(layer, LoraLinear):
            layer = LoraLinear(cast(nn.Linear, layer))
            model.set_submodule(module_name, layer)
        adapter = layer.adapters[name] = Adapter(layer.base, config)
        layer.train(model.training)
        trained += adapter.parameters()
    use_adapter(model, name)
    return trained


def _matches(name: str, targets: tuple[str, ...]) -> bool:
    parts = name.split(".", 2)
    inside = parts[2] if parts[0] == "layers" and len(parts) == 3 else ""
    return any(fnmatch.fnmatchcase(inside, pattern) for pattern in targets)


def use_adapter(model: Transformer, name: str | None) -> None:
    """Makes an adapter the active one; None: the model as it was."""
    layers = adapted_layers(model)
    known = {adapter for layer in layers.values() for adapter in layer.adapters}
    if name is not None and name not in known:
        raise UserError(f'no adapter is called "{name}"', f"there are {', '.join(sorted(known)) or 'none'}")
    for layer in layers.values():
        layer.active = name if name is not None and name in layer.adapters else None


@torch.no_grad()
def merge(model: Transformer) -> None:
    """Writes the active adapter into the matrices, computed in float32, and takes all adapters off."""
    for name, layer in adapted_layers(model).items():
        layer.base.weight.copy_(layer.merged())
        model.set_submodule(name, layer.base)
    model.requires_grad_(True)
